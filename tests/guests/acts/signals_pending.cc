// Signals that are pending at the checkpoint are delivered once, in order, with their values: several of one real-time
// signal, a classic one, process-directed and thread-directed, for the main and another thread.

#include <pthread.h>

#include <atomic>
#include <thread>

#include "act.h"

static void queue_to_thread(pid_t tid, int signal_number, int value) {
  siginfo_t info{};
  info.si_signo = signal_number;
  info.si_code = SI_QUEUE;
  info.si_pid = getpid();
  info.si_uid = getuid();
  info.si_value.sival_int = value;
  MUST(syscall(SYS_rt_tgsigqueueinfo, getpid(), tid, signal_number, &info));
}

static siginfo_t next_pending(int signal_number) {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, signal_number);
  siginfo_t info{};
  timespec none{};
  if (sigtimedwait(&set, &info, &none) < 0) info.si_signo = 0;
  return info;
}

static void expect_queued(const std::string& what, int signal_number, int value) {
  siginfo_t info = next_pending(signal_number);
  if (!act::expect_equal(what + ": signal", signal_number, info.si_signo)) return;
  act::expect_equal(what + ": value", value, info.si_value.sival_int);
  act::expect_equal(what + ": si_code", SI_QUEUE, info.si_code);
  act::expect_equal(what + ": si_pid", getpid(), info.si_pid);
  act::expect_equal(what + ": si_uid", getuid(), info.si_uid);
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  sigset_t all;
  sigfillset(&all);
  MUST_ZERO(pthread_sigmask(SIG_SETMASK, &all, nullptr));

  std::atomic<int> proceed{0};
  std::atomic<pid_t> other_tid{0};
  std::thread other([&] {
    other_tid = gettid();
    proceed.wait(0);
    expect_queued("first queued to the other thread", SIGRTMIN + 3, 301);
    expect_queued("second queued to the other thread", SIGRTMIN + 3, 302);
    act::expect_equal("no third one", 0, next_pending(SIGRTMIN + 3).si_signo);
    siginfo_t info = next_pending(SIGUSR2);
    act::expect_equal("tgkill to the other thread", SIGUSR2, info.si_signo);
    act::expect_equal("tgkill si_code", SI_USER, info.si_code);  // glibc turns SI_TKILL into this
  });
  while (other_tid == 0) act::sleep_ms(1);

  for (int value : {101, 102, 103}) {
    sigval v{};
    v.sival_int = value;
    MUST(sigqueue(getpid(), SIGRTMIN + 1, v));
  }
  MUST(kill(getpid(), SIGUSR1));
  MUST(kill(getpid(), SIGCHLD));  // ignored by default, but kept while blocked
  queue_to_thread(gettid(), SIGRTMIN + 2, 201);
  queue_to_thread(other_tid, SIGRTMIN + 3, 301);
  queue_to_thread(other_tid, SIGRTMIN + 3, 302);
  MUST_ZERO(pthread_kill(other.native_handle(), SIGUSR2));
  std::string process_pending = act::status_field("/proc/self/status", "ShdPnd");
  std::string main_pending = act::status_field("/proc/self/status", "SigPnd");

  act::intermission();

  act::expect_equal("ShdPnd", process_pending, act::status_field("/proc/self/status", "ShdPnd"));
  act::expect_equal("SigPnd", main_pending, act::status_field("/proc/self/status", "SigPnd"));
  for (int value : {101, 102, 103}) expect_queued("queued to the process", SIGRTMIN + 1, value);
  act::expect_equal("no fourth one", 0, next_pending(SIGRTMIN + 1).si_signo);
  expect_queued("queued to the main thread", SIGRTMIN + 2, 201);
  siginfo_t classic = next_pending(SIGUSR1);
  act::expect_equal("classic signal", SIGUSR1, classic.si_signo);
  act::expect_equal("classic signal's si_code", SI_USER, classic.si_code);
  act::expect_equal("classic signal's si_pid", getpid(), classic.si_pid);
  act::expect_equal("classic signal once", 0, next_pending(SIGUSR1).si_signo);
  act::expect_equal("blocked SIGCHLD", SIGCHLD, next_pending(SIGCHLD).si_signo);
  proceed = 1;
  proceed.notify_all();
  other.join();
  return act::finish();
}
