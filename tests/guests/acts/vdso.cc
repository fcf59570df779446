// The vdso lies where the auxiliary vector says, and its clocks agree with the system call's: a reading through the
// vdso lies between two through the kernel, also where a time namespace shifts them (the vvar page must be the right
// one).

#include <sched.h>
#include <sys/auxv.h>
#include <sys/time.h>

#include "act.h"

static int64_t kernel_ns(clockid_t clock) {
  timespec now;
  MUST(syscall(SYS_clock_gettime, clock, &now));
  return now.tv_sec * 1'000'000'000LL + now.tv_nsec;
}

struct NamedClock {
  const char* name;
  clockid_t clock;
  int64_t granularity_ns;
};
constexpr NamedClock kClocks[] = {
    {"CLOCK_REALTIME", CLOCK_REALTIME, 0},
    {"CLOCK_MONOTONIC", CLOCK_MONOTONIC, 0},
    {"CLOCK_BOOTTIME", CLOCK_BOOTTIME, 0},
    {"CLOCK_MONOTONIC_RAW", CLOCK_MONOTONIC_RAW, 0},
    {"CLOCK_TAI", CLOCK_TAI, 0},
    {"CLOCK_REALTIME_COARSE", CLOCK_REALTIME_COARSE, 20'000'000},
    {"CLOCK_MONOTONIC_COARSE", CLOCK_MONOTONIC_COARSE, 20'000'000},
};

int main(int argc, char** argv) {
  act::begin(argc, argv);
  auto* vdso = reinterpret_cast<void*>(getauxval(AT_SYSINFO_EHDR));
  std::vector<uint64_t> code(512);
  memcpy(code.data(), vdso, 4096);
  for (const NamedClock& c : kClocks) act::now_ns(c.clock);

  act::intermission();

  act::expect_equal("AT_SYSINFO_EHDR", vdso, reinterpret_cast<void*>(getauxval(AT_SYSINFO_EHDR)));
  act::expect_equal("mapping there", std::string("[vdso]"), act::map_line_at(vdso).name);
  act::expect("the code has not changed", memcmp(code.data(), vdso, 4096) == 0);
  for (const NamedClock& c : kClocks) {
    for (int round = 0; round < 100; round++) {
      int64_t before = kernel_ns(c.clock), here = act::now_ns(c.clock), after = kernel_ns(c.clock);
      if (before - c.granularity_ns <= here && here <= after + c.granularity_ns) continue;
      act::fail(c.name, std::to_string(before) + " ... " + std::to_string(after), std::to_string(here));
      break;
    }
  }
  timeval of_day;
  gettimeofday(&of_day, nullptr);
  act::expect("gettimeofday and time agree", llabs(of_day.tv_sec - time(nullptr)) <= 1);
  unsigned cpu = 0;
  MUST(getcpu(&cpu, nullptr));
  act::expect("getcpu is sane", cpu < static_cast<unsigned>(sysconf(_SC_NPROCESSORS_CONF)));
  return act::finish();
}
