// Measures the phases of a sequence: each mark() closes the phase that ends there.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/clock.h"

namespace vmckpt {

class PhaseClock {
 public:
  PhaseClock() : last_us_(monotonic_us()) {}
  void mark(const char* phase) {
    int64_t now_us = monotonic_us();
    phases.emplace_back(phase, now_us - last_us_);
    last_us_ = now_us;
  }
  std::vector<std::pair<std::string, int64_t>> phases;

 private:
  int64_t last_us_;
};

}  // namespace vmckpt
