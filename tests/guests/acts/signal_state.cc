// Dispositions of all signals (handler, flags, mask, restorer) and the signal mask of each thread; handlers run after
// restart; a thread in sigsuspend(2) has its old mask back when it returns.

#include <pthread.h>
#include <sys/ucontext.h>

#include <atomic>
#include <thread>

#include "act.h"

// The kernel's own structure: glibc's sigaction() hides the restorer.
struct KernelSigaction {
  uint64_t handler, flags, restorer, mask;
};

static KernelSigaction disposition_of(int signal_number) {
  KernelSigaction action{};
  MUST(syscall(SYS_rt_sigaction, signal_number, nullptr, &action, 8));
  return action;
}

static volatile sig_atomic_t plain_runs = 0;
static std::atomic<int> info_value{0};

static void on_plain(int) { plain_runs = plain_runs + 1; }
static void on_info(int, siginfo_t* info, void*) { info_value = info->si_value.sival_int; }

static uint64_t own_mask() {
  uint64_t mask = 0;
  MUST(syscall(SYS_rt_sigprocmask, SIG_SETMASK, nullptr, &mask, 8));
  return mask;
}

static void block(std::initializer_list<int> signals) {
  sigset_t set;
  sigemptyset(&set);
  for (int signal_number : signals) sigaddset(&set, signal_number);
  MUST_ZERO(pthread_sigmask(SIG_BLOCK, &set, nullptr));
}

static void set_dispositions() {
  struct sigaction action {};
  action.sa_handler = on_plain;
  action.sa_flags = SA_RESTART | SA_NODEFER;
  sigaddset(&action.sa_mask, SIGTERM);
  sigaddset(&action.sa_mask, SIGRTMIN + 5);
  MUST(sigaction(SIGUSR1, &action, nullptr));

  action = {};
  action.sa_sigaction = on_info;
  action.sa_flags = SA_SIGINFO;
  sigfillset(&action.sa_mask);
  MUST(sigaction(SIGRTMIN + 1, &action, nullptr));

  action = {};
  action.sa_handler = on_plain;
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  MUST(sigaction(SIGUSR2, &action, nullptr));

  for (int ignored : {SIGHUP, SIGPIPE, SIGTTOU, SIGRTMAX}) MUST(signal(ignored, SIG_IGN) == SIG_ERR ? -1 : 0);
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  set_dispositions();
  block({SIGWINCH, SIGRTMIN + 7});
  uint64_t main_mask = own_mask();
  std::atomic<int> ready{0}, proceed{0};
  std::thread masked([&] {
    block({SIGUSR1, SIGRTMIN + 1, SIGTERM});
    uint64_t mask = own_mask();
    ready++;
    proceed.wait(0);
    act::expect_equal("mask of a thread", mask, own_mask());
  });
  std::atomic<bool> suspend_over{false};
  std::thread suspended([&] {
    block({SIGUSR1, SIGTERM, SIGRTMIN + 2});
    uint64_t mask = own_mask();
    sigset_t all_but_usr1;
    sigfillset(&all_but_usr1);
    sigdelset(&all_but_usr1, SIGUSR1);
    ready++;
    int result = sigsuspend(&all_but_usr1);
    act::expect_errno("sigsuspend", EINTR, result);
    act::expect_equal("mask after sigsuspend", mask, own_mask());
    suspend_over = true;
  });
  while (ready < 2) act::sleep_ms(1);
  act::sleep_ms(10);
  // Only now: glibc installs a handler of its own with the first thread.
  std::vector<KernelSigaction> before;
  for (int number = 1; number <= 64; number++) before.push_back(disposition_of(number));

  act::intermission();

  for (int number = 1; number <= 64; number++) {
    KernelSigaction expected = before[static_cast<size_t>(number) - 1], got = disposition_of(number);
    std::string name = "signal " + std::to_string(number);
    act::expect_equal(name + ": handler", expected.handler, got.handler);
    act::expect_equal(name + ": flags", expected.flags, got.flags);
    act::expect_equal(name + ": restorer", expected.restorer, got.restorer);
    act::expect_equal(name + ": mask", expected.mask, got.mask);
  }
  act::expect_equal("mask of the main thread", main_mask, own_mask());
  act::expect_equal("no handler has run", 0, static_cast<int>(plain_runs));
  act::expect("sigsuspend has not returned early", !suspend_over);
  proceed = 1;
  proceed.notify_all();
  masked.join();

  MUST_ZERO(pthread_kill(suspended.native_handle(), SIGUSR1));
  suspended.join();
  act::expect_equal("the handler ran during sigsuspend", 1, static_cast<int>(plain_runs));
  raise(SIGUSR1);
  raise(SIGUSR2);
  raise(SIGHUP);
  act::expect_equal("plain handlers run", 3, static_cast<int>(plain_runs));
  act::expect_equal("SA_RESETHAND reset its handler", 0u, disposition_of(SIGUSR2).handler);
  sigval value{};
  value.sival_int = 4711;
  MUST(sigqueue(getpid(), SIGRTMIN + 1, value));
  act::eventually("SA_SIGINFO handler got its value", [] { return info_value == 4711; });
  return act::finish();
}
