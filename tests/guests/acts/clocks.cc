// The monotonic and the boot-time clock never go back, in any thread, and continue from where they were: the gap that
// the program sees is no longer than the one that passed in the world.

#include <atomic>
#include <thread>

#include "act.h"

int main(int argc, char** argv) {
  act::begin(argc, argv);
  std::atomic<bool> over{false};
  std::atomic<int> went_back{0};
  auto watch = [&](clockid_t clock) {
    for (int64_t last = act::now_ns(clock); !over; act::sleep_ms(1)) {
      for (int i = 0; i < 1000; i++) {
        int64_t now = act::now_ns(clock);
        if (now < last) went_back++;
        last = now;
      }
    }
  };
  std::thread monotonic(watch, CLOCK_MONOTONIC), boot(watch, CLOCK_BOOTTIME), raw(watch, CLOCK_MONOTONIC_RAW);
  int64_t real_before = act::now_ns(CLOCK_REALTIME);
  int64_t monotonic_before = act::now_ns(), boot_before = act::now_ns(CLOCK_BOOTTIME);

  act::intermission();

  int64_t real_ns = act::now_ns(CLOCK_REALTIME) - real_before;
  int64_t monotonic_ns = act::now_ns() - monotonic_before, boot_ns = act::now_ns(CLOCK_BOOTTIME) - boot_before;
  over = true;
  monotonic.join();
  boot.join();
  raw.join();
  act::expect_equal("readings that went back", 0, went_back.load());
  constexpr int64_t kSlackNs = 500'000'000;  // for a wall clock that is being adjusted
  act::expect("monotonic clock has gone on", monotonic_ns >= 0 && monotonic_ns <= real_ns + kSlackNs);
  act::expect("boot-time clock has gone on", boot_ns >= 0 && boot_ns <= real_ns + kSlackNs);
  act::expect("both have gone on alike", llabs(monotonic_ns - boot_ns) < 1'000'000'000);
  return act::finish();
}
