// POSIX timers keep their ids (with a gap where one was deleted), their clocks, periods and ways to notify: a signal, a
// signal to one thread, a thread, nothing. A timer signal that is pending at the checkpoint arrives once; a timer
// whose signal is blocked counts overruns.

#include <pthread.h>

#include <atomic>
#include <thread>

#include "act.h"

constexpr int64_t kMs = 1'000'000;

static timer_t make(clockid_t clock, sigevent event, int64_t first_ns, int64_t period_ns, int flags = 0) {
  timer_t timer{};
  MUST(timer_create(clock, &event, &timer));
  itimerspec setting{act::to_timespec(period_ns), act::to_timespec(first_ns)};
  MUST(timer_settime(timer, flags, &setting, nullptr));
  return timer;
}

static sigevent by_signal(int number, int value) {
  sigevent event{};
  event.sigev_notify = SIGEV_SIGNAL;
  event.sigev_signo = number;
  event.sigev_value.sival_int = value;
  return event;
}

static bool wait_for(int number, siginfo_t* info, int64_t timeout_ms) {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, number);
  timespec timeout = act::to_timespec(timeout_ms * kMs);
  *info = {};
  return sigtimedwait(&set, info, &timeout) == number;
}

static int64_t left_ns(timer_t timer) {
  itimerspec setting{};
  MUST(timer_gettime(timer, &setting));
  return setting.it_value.tv_sec * 1'000'000'000LL + setting.it_value.tv_nsec;
}

static std::string ids_in_proc() {
  std::string ids;
  for (const std::string& line : act::lines_of(act::file_text("/proc/self/timers"))) {
    if (line.rfind("ID: ", 0) == 0) ids += line.substr(4) + " ";
  }
  return ids;
}

static std::atomic<int> notified_by_thread{0};

int main(int argc, char** argv) {
  act::begin(argc, argv);
  sigset_t all;
  sigfillset(&all);
  MUST_ZERO(pthread_sigmask(SIG_SETMASK, &all, nullptr));

  int64_t begin_ns = act::now_ns();
  timer_t once = make(CLOCK_MONOTONIC, by_signal(SIGRTMIN + 1, 11), 300 * kMs, 0);
  timer_t deleted = make(CLOCK_MONOTONIC, by_signal(SIGRTMIN + 1, 12), 0, 0);
  timer_t absolute =
      make(CLOCK_REALTIME, by_signal(SIGRTMIN + 2, 13), act::now_ns(CLOCK_REALTIME) + 320 * kMs, 0, TIMER_ABSTIME);
  timer_t periodic = make(CLOCK_MONOTONIC, by_signal(SIGRTMIN + 3, 14), 10 * kMs, 10 * kMs);
  timer_t far = make(CLOCK_BOOTTIME, by_signal(SIGRTMIN + 4, 15), 3600'000 * kMs, 0);
  timer_t fired = make(CLOCK_MONOTONIC, by_signal(SIGRTMIN + 5, 16), 1, 0);
  sigevent nothing{};
  nothing.sigev_notify = SIGEV_NONE;
  timer_t silent = make(CLOCK_MONOTONIC, nothing, 3600'000 * kMs, 5 * kMs);
  timer_t cpu = make(CLOCK_PROCESS_CPUTIME_ID, by_signal(SIGRTMIN + 6, 17), 3600'000 * kMs, 0);
  sigevent in_thread{};
  in_thread.sigev_notify = SIGEV_THREAD;
  in_thread.sigev_notify_function = [](sigval value) { notified_by_thread = value.sival_int; };
  in_thread.sigev_value.sival_int = 18;
  make(CLOCK_MONOTONIC, in_thread, 330 * kMs, 0);
  MUST(timer_delete(deleted));

  std::atomic<pid_t> tid{0};
  std::thread target([&] {
    tid = gettid();
    siginfo_t info;
    act::expect("timer signal to one thread", wait_for(SIGRTMIN + 7, &info, 10'000));
    act::expect_equal("its value", 19, info.si_value.sival_int);
  });
  while (tid == 0) act::sleep_ms(1);
  sigevent to_thread = by_signal(SIGRTMIN + 7, 19);
  to_thread.sigev_notify = SIGEV_THREAD_ID;
  to_thread._sigev_un._tid = tid;
  make(CLOCK_MONOTONIC, to_thread, 310 * kMs, 0);
  std::string ids = ids_in_proc();
  act::sleep_ms(25);

  act::intermission();

  act::expect_equal("ids", ids, ids_in_proc());
  siginfo_t info;
  act::expect("pending timer signal", wait_for(SIGRTMIN + 5, &info, 0));
  act::expect_equal("its value", 16, info.si_value.sival_int);
  act::expect_equal("its code", SI_TIMER, info.si_code);
  act::expect("it comes once", !wait_for(SIGRTMIN + 5, &info, 0));
  act::expect_equal("fired timer is disarmed", 0, left_ns(fired));

  act::expect("periodic timer", wait_for(SIGRTMIN + 3, &info, 5000));
  act::expect_equal("its value", 14, info.si_value.sival_int);
  int overrun = info.si_overrun;
  int64_t due = (act::now_ns() - begin_ns) / (10 * kMs);
  act::expect("overruns are no more than the time allows", overrun >= 0 && overrun <= due);
  act::expect_equal("timer_getoverrun agrees", overrun, timer_getoverrun(periodic));
  for (int tick = 0; tick < 3; tick++) act::expect("it goes on", wait_for(SIGRTMIN + 3, &info, 5000));

  act::expect("one-shot timer", wait_for(SIGRTMIN + 1, &info, 5000));
  act::expect("not early", act::now_ns() - begin_ns >= 300 * kMs);
  act::expect_equal("its value", 11, info.si_value.sival_int);
  act::expect("absolute timer", wait_for(SIGRTMIN + 2, &info, 5000));
  target.join();
  act::eventually("notification by a thread", [] { return notified_by_thread == 18; });
  for (timer_t timer : {far, silent, cpu}) {
    int64_t left = left_ns(timer);
    act::expect("an hour is not over, but has begun", left > 3400'000 * kMs && left <= 3600'000 * kMs);
  }
  itimerspec again{{}, act::to_timespec(5 * kMs)};
  act::expect_equal("an old id can be set", 0, timer_settime(once, 0, &again, nullptr));
  act::expect("and fires", wait_for(SIGRTMIN + 1, &info, 5000));
  act::expect_equal("an old id can be deleted", 0, timer_delete(absolute));
  act::expect_errno("the deleted one is still unknown", EINVAL,
                    syscall(SYS_timer_delete, static_cast<int>(reinterpret_cast<intptr_t>(deleted))));
  return act::finish();
}
