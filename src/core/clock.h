// Time as the phases of a checkpoint or restart measure it.
#pragma once

#include <cstdint>

#include <time.h>

namespace vmckpt {

inline int64_t clock_ns(clockid_t clock) {
  timespec now{};
  ::clock_gettime(clock, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

inline int64_t monotonic_us() { return clock_ns(CLOCK_MONOTONIC) / 1000; }

}  // namespace vmckpt
