// alarm(2): the seconds left go on counting, and the signal arrives once, at its time.

#include <atomic>

#include "act.h"

static std::atomic<int> alarms{0};

int main(int argc, char** argv) {
  act::begin(argc, argv);
  struct sigaction action {};
  action.sa_handler = [](int) { alarms++; };
  action.sa_flags = SA_RESTART;
  MUST(sigaction(SIGALRM, &action, nullptr));
  int64_t begin_ns = act::now_ns();
  alarm(1);

  act::intermission();

  act::eventually("the alarm", [] { return alarms == 1; });
  act::expect("not early", act::now_ns() - begin_ns >= 995'000'000);
  act::expect_equal("nothing is left", 0u, alarm(100));
  unsigned left = alarm(0);
  act::expect("a new alarm counts", left == 100 || left == 99);
  act::expect_equal("once", 1, alarms.load());
  return act::finish();
}
