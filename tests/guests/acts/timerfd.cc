// timerfd: armed relative and absolute, periodic, on three clocks, expired but unread, disarmed. None fires early, none
// is forgotten, periods are kept.

#include <poll.h>
#include <sys/timerfd.h>

#include "act.h"

constexpr int64_t kMs = 1'000'000;

static int make(clockid_t clock, int64_t first_ns, int64_t period_ns, int flags = 0) {
  int fd = MUST(timerfd_create(clock, TFD_NONBLOCK | TFD_CLOEXEC));
  itimerspec setting{act::to_timespec(period_ns), act::to_timespec(first_ns)};
  MUST(timerfd_settime(fd, flags, &setting, nullptr));
  return fd;
}

static uint64_t expirations(int fd) {
  uint64_t count = 0;
  return read(fd, &count, sizeof count) == sizeof count ? count : 0;
}

static void expect_fires(const std::string& what, int fd, clockid_t clock, int64_t due_ns) {
  pollfd ready{fd, POLLIN, 0};
  act::expect_equal(what + ": fires", 1, poll(&ready, 1, 5000));
  int64_t now = act::now_ns(clock);
  if (now < due_ns) act::expect_equal(what + ": fires early", due_ns, now);
  act::expect_equal(what + ": fires once", 1u, expirations(fd));
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  int64_t monotonic = act::now_ns(), boot = act::now_ns(CLOCK_BOOTTIME), real = act::now_ns(CLOCK_REALTIME);
  int relative = make(CLOCK_MONOTONIC, 300 * kMs, 0);
  int absolute = make(CLOCK_MONOTONIC, monotonic + 350 * kMs, 0, TFD_TIMER_ABSTIME);
  int absolute_boot = make(CLOCK_BOOTTIME, boot + 320 * kMs, 0, TFD_TIMER_ABSTIME);
  int absolute_real = make(CLOCK_REALTIME, real + 340 * kMs, 0, TFD_TIMER_ABSTIME);
  int far = make(CLOCK_MONOTONIC, 3600'000 * kMs, 0);
  int periodic = make(CLOCK_MONOTONIC, 20 * kMs, 20 * kMs);
  int unread = make(CLOCK_MONOTONIC, 1, 0);
  int disarmed = make(CLOCK_MONOTONIC, 0, 0);
  act::sleep_ms(5);

  act::intermission();

  act::expect_equal("expired but unread", 1u, expirations(unread));
  act::expect_equal("disarmed", 0u, expirations(disarmed));
  expect_fires("relative", relative, CLOCK_MONOTONIC, monotonic + 300 * kMs);
  expect_fires("absolute", absolute, CLOCK_MONOTONIC, monotonic + 350 * kMs);
  expect_fires("absolute, boot time", absolute_boot, CLOCK_BOOTTIME, boot + 320 * kMs);
  expect_fires("absolute, real time", absolute_real, CLOCK_REALTIME, real + 340 * kMs);
  itimerspec left{};
  MUST(timerfd_gettime(far, &left));
  act::expect("an hour is not over, but has begun", left.it_value.tv_sec > 3400 && left.it_value.tv_sec < 3600);

  MUST(timerfd_gettime(periodic, &left));
  act::expect_equal("period", 20 * kMs, left.it_interval.tv_nsec);
  uint64_t ticks = expirations(periodic);
  int64_t due = (act::now_ns() - monotonic) / (20 * kMs);
  if (ticks == 0 || static_cast<int64_t>(ticks) > due) act::expect_equal("ticks", due, static_cast<int64_t>(ticks));
  int64_t begin_ns = act::now_ns();
  pollfd ready{periodic, POLLIN, 0};
  for (int tick = 0; tick < 5; tick++) {
    act::expect_equal("next tick", 1, poll(&ready, 1, 5000));
    expirations(periodic);
  }
  act::expect("five ticks take four periods at least", act::now_ns() - begin_ns >= 75 * kMs);
  return act::finish();
}
