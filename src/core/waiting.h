// What a wait heeds beside what it waits for: its deadline, and others, who are looked after meanwhile and may end it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>

#include "core/clock.h"
#include "core/result.h"

namespace vmckpt {

// Whoever is looked after while somebody else waits. `look` serves what has come and returns at once; its Error ends the wait.
class Meanwhile {
 public:
  explicit Meanwhile(std::function<Result<void>()> look) : look_(std::move(look)) {}

  Result<void> check() {
    constexpr int64_t kBetweenUs = 5'000;
    const int64_t now_us = monotonic_us();
    if (now_us < next_us_) return {};
    next_us_ = now_us + kBetweenUs;
    return look_();
  }

 private:
  std::function<Result<void>()> look_;
  int64_t next_us_ = 0;
};

class Waiting {
 public:
  explicit Waiting(int64_t deadline_us, Meanwhile* meanwhile = nullptr) : deadline_us_(deadline_us), meanwhile_(meanwhile) {}
  static Waiting up_to(int64_t timeout_us) { return Waiting(monotonic_us() + timeout_us); }
  // Ends earlier, and heeds the same.
  Waiting no_longer_than(int64_t timeout_us) const {
    return Waiting(std::min(deadline_us_, monotonic_us() + timeout_us), meanwhile_);
  }
  Waiting no_shorter_than(int64_t timeout_us) const {
    return Waiting(std::max(deadline_us_, monotonic_us() + timeout_us), meanwhile_);
  }

  int64_t deadline_us() const { return deadline_us_; }  // CLOCK_MONOTONIC
  bool is_over() const { return monotonic_us() > deadline_us_; }
  // For waits that have lasted longer than they usually do. An Error: nobody wants the end of this wait any more.
  Result<void> check() const { return meanwhile_ == nullptr ? Result<void>() : meanwhile_->check(); }

 private:
  int64_t deadline_us_;
  Meanwhile* meanwhile_;
};

}  // namespace vmckpt
