// A thread that single-steps itself (the trap flag), as tracers inside the process do: each instruction ends in SIGTRAP, and most
// of the time one is on its way.

#include <atomic>
#include <thread>

#include "act.h"

static volatile long steps;

static void set_trap_flag(bool on) {
  if (on) asm volatile("pushf; orq $0x100, (%%rsp); popf" ::: "memory", "cc");
  else asm volatile("pushf; andq $~0x100, (%%rsp); popf" ::: "memory", "cc");
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  struct sigaction action {};
  action.sa_handler = [](int) { steps = steps + 1; };
  MUST(sigaction(SIGTRAP, &action, nullptr));
  std::atomic<bool> over{false};
  std::thread stepper([&] {
    set_trap_flag(true);
    while (!over) __builtin_ia32_pause();
    set_trap_flag(false);
  });
  act::eventually("steps", [] { return steps > 1000; });

  act::intermission();

  const long before = steps;
  act::eventually("more steps", [before] { return steps > before + 1000; });
  over = true;
  stepper.join();
  return act::finish();
}
