// Affinity, nice value, scheduling policy, reset-on-fork and I/O priority, of two threads that differ in all of them.

#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>

#include <atomic>
#include <thread>

#include "act.h"

// struct sched_attr, the part that every kernel has.
struct Attributes {
  uint32_t size, policy;
  uint64_t flags;
  int32_t nice;
  uint32_t priority;
  uint64_t runtime, deadline, period;
};

struct Scheduling {
  int policy = 0, priority = 0, nice_value = 0;
  uint64_t slice_ns = 0;  // of fair scheduling, since Linux 6.12; 0 before
  long io_priority = 0;
  std::string affinity;
};

static Scheduling current() {
  Scheduling s;
  sched_param parameter{};
  s.policy = MUST(sched_getscheduler(0));
  MUST(sched_getparam(0, &parameter));
  s.priority = parameter.sched_priority;
  s.nice_value = getpriority(PRIO_PROCESS, 0);
  s.io_priority = syscall(SYS_ioprio_get, 1, 0);
  Attributes attributes{};
  MUST(syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0));
  s.slice_ns = attributes.runtime;
  s.affinity = act::status_field("/proc/thread-self/status", "Cpus_allowed_list");
  return s;
}

static void expect_same(const std::string& who, const Scheduling& expected) {
  Scheduling got = current();
  act::expect_equal(who + ": policy", expected.policy, got.policy);
  act::expect_equal(who + ": priority", expected.priority, got.priority);
  act::expect_equal(who + ": nice", expected.nice_value, got.nice_value);
  act::expect_equal(who + ": slice", expected.slice_ns, got.slice_ns);
  act::expect_equal(who + ": I/O priority", expected.io_priority, got.io_priority);
  act::expect_equal(who + ": affinity", expected.affinity, got.affinity);
}

static void pin_to_one_cpu() {
  cpu_set_t allowed, one;
  MUST(sched_getaffinity(0, sizeof allowed, &allowed));
  CPU_ZERO(&one);
  for (unsigned cpu = CPU_SETSIZE; cpu-- > 0;) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    CPU_SET(cpu, &one);
    break;
  }
  MUST(sched_setaffinity(0, sizeof one, &one));
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  std::atomic<int> ready{0}, proceed{0};
  std::thread other([&] {
    sched_param parameter{};
    parameter.sched_priority = 3;
    // Real time where permitted (root), batch otherwise.
    if (sched_setscheduler(0, SCHED_RR | SCHED_RESET_ON_FORK, &parameter) != 0) {
      parameter.sched_priority = 0;
      MUST(sched_setscheduler(0, SCHED_BATCH | SCHED_RESET_ON_FORK, &parameter));
    }
    MUST(syscall(SYS_ioprio_set, 1, 0, (2 << 13) | 6));  // best effort, level 6
    pin_to_one_cpu();
    Scheduling before = current();
    ready = 1;
    proceed.wait(0);
    expect_same("other thread", before);
  });
  while (ready == 0) act::sleep_ms(1);
  Attributes attributes{sizeof attributes, SCHED_OTHER, 0, 7, 0, 7'000'000, 0, 0};
  MUST(syscall(SYS_sched_setattr, 0, &attributes, 0));
  Scheduling before = current();

  act::intermission();

  proceed = 1;
  proceed.notify_all();
  other.join();
  expect_same("main thread", before);
  return act::finish();
}
