#include "core/clock.h"

#include "catch.h"

using namespace vmckpt;

TEST_CASE("a time survives as nanoseconds, also one before the epoch") {
  constexpr int64_t kToday = 1'700'000'000 * kNsPerSecond + 5;
  for (int64_t ns : {int64_t{0}, kNsPerSecond - 1, kNsPerSecond, kToday, int64_t{-1}, -kNsPerSecond, -kNsPerSecond - 1}) {
    const timespec time = to_timespec(ns);
    CHECK(to_ns(time) == ns);
    CHECK(time.tv_nsec >= 0);
    CHECK(time.tv_nsec < kNsPerSecond);
  }
  CHECK(to_timespec(-1).tv_sec == -1);
}
