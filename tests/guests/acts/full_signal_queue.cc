// A program whose queue of signals is full: it has more of them pending than RLIMIT_SIGPENDING allows by now, and no signal that
// comes has a siginfo any more.

#include <sys/resource.h>

#include "act.h"

constexpr int kSignals = 10;

int main(int argc, char** argv) {
  act::begin(argc, argv);
  sigset_t blocked;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGRTMIN);
  MUST(sigprocmask(SIG_BLOCK, &blocked, nullptr));
  for (int i = 0; i < kSignals; i++) MUST(sigqueue(getpid(), SIGRTMIN, {.sival_int = i}));
  rlimit none{0, 0};
  MUST(setrlimit(RLIMIT_SIGPENDING, &none));

  act::intermission();

  siginfo_t info;
  timespec now{};
  for (int i = 0; i < kSignals; i++) {
    if (sigtimedwait(&blocked, &info, &now) != SIGRTMIN) act::fail("signals", std::to_string(kSignals), std::to_string(i));
    else act::expect_equal("value of a signal", i, info.si_int);
  }
  rlimit limit{};
  MUST(getrlimit(RLIMIT_SIGPENDING, &limit));
  act::expect_equal("limit", 0u, limit.rlim_max);
  return act::finish();
}
