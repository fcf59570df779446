// The three interval timers: real time (periodic), user time, user and system time. The last two only run while the
// program computes.

#include <sys/time.h>

#include <atomic>

#include "act.h"

static std::atomic<int> real_ticks{0}, virtual_ticks{0}, profiling_ticks{0};

static void set_timer(int which, int64_t first_ms, int64_t period_ms) {
  itimerval setting{};
  setting.it_value = {first_ms / 1000, first_ms % 1000 * 1000};
  setting.it_interval = {period_ms / 1000, period_ms % 1000 * 1000};
  MUST(setitimer(which, &setting, nullptr));
}

static void on_signal(int number, void (*handler)(int)) {
  struct sigaction action {};
  action.sa_handler = handler;
  action.sa_flags = SA_RESTART;
  MUST(sigaction(number, &action, nullptr));
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  on_signal(SIGALRM, [](int) { real_ticks++; });
  on_signal(SIGVTALRM, [](int) { virtual_ticks++; });
  on_signal(SIGPROF, [](int) { profiling_ticks++; });
  set_timer(ITIMER_REAL, 30, 30);
  set_timer(ITIMER_VIRTUAL, 40, 10);
  set_timer(ITIMER_PROF, 40, 20);
  int64_t begin_ns = act::now_ns();

  act::intermission();

  int seen = real_ticks;
  act::eventually("the real timer goes on", [&] { return real_ticks >= seen + 3; });
  act::expect("no more ticks than the time allows", real_ticks <= (act::now_ns() - begin_ns) / 30'000'000 + 1);
  itimerval setting{};
  MUST(getitimer(ITIMER_REAL, &setting));
  act::expect_equal("period of the real timer", 30'000, setting.it_interval.tv_usec);
  MUST(getitimer(ITIMER_VIRTUAL, &setting));
  act::expect_equal("period of the virtual timer", 10'000, setting.it_interval.tv_usec);
  // The kernel rounds up by a tick whenever it is set, and once more with each restart.
  act::expect("time left in the virtual timer", setting.it_value.tv_usec > 0 && setting.it_value.tv_usec <= 60'000);
  MUST(getitimer(ITIMER_PROF, &setting));
  act::expect_equal("period of the profiling timer", 20'000, setting.it_interval.tv_usec);

  int64_t end_ns = act::now_ns() + 10'000'000'000;
  volatile uint64_t work = 0;
  while ((virtual_ticks < 2 || profiling_ticks < 2) && act::now_ns() < end_ns) {
    for (int i = 0; i < 100'000; i++) work = work + 1;
  }
  act::expect("the virtual timer ticks while computing", virtual_ticks >= 2);
  act::expect("the profiling timer ticks while computing", profiling_ticks >= 2);
  return act::finish();
}
