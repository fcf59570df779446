// Clocks, and nanoseconds instead of timespec.
#pragma once

#include <cstdint>

#include <time.h>

namespace vmckpt {

inline constexpr int64_t kNsPerSecond = 1'000'000'000;

constexpr int64_t to_ns(const timespec& time) { return int64_t{time.tv_sec} * kNsPerSecond + time.tv_nsec; }

// tv_nsec is never negative: what lies before the epoch has an earlier second.
constexpr timespec to_timespec(int64_t ns) {
  const int64_t rest_ns = ns % kNsPerSecond;
  return rest_ns >= 0 ? timespec{ns / kNsPerSecond, rest_ns} : timespec{ns / kNsPerSecond - 1, rest_ns + kNsPerSecond};
}

inline int64_t clock_ns(clockid_t clock) {
  timespec now{};
  ::clock_gettime(clock, &now);
  return to_ns(now);
}

inline int64_t monotonic_us() { return clock_ns(CLOCK_MONOTONIC) / 1000; }

}  // namespace vmckpt
