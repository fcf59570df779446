// What prctl(2), personality(2) and arch_prctl(2) set and can read back.

#include <asm/prctl.h>
#include <sys/personality.h>
#include <sys/prctl.h>

#include <atomic>
#include <thread>

#include "act.h"

// Newer than some libc's headers.
constexpr int kPrSetMemoryMerge = 67, kPrGetMemoryMerge = 68;

struct Attribute {
  const char* name;
  int get;
  bool through_pointer;
};

constexpr Attribute kAttributes[] = {
    {"dumpable", PR_GET_DUMPABLE, false},
    {"timer slack", PR_GET_TIMERSLACK, false},
    {"no new privileges", PR_GET_NO_NEW_PRIVS, false},
    {"keep capabilities", PR_GET_KEEPCAPS, false},
    {"transparent huge pages disabled", PR_GET_THP_DISABLE, false},
    {"same page merging", kPrGetMemoryMerge, false},
    {"machine check kill policy", PR_MCE_KILL_GET, false},
    {"parent death signal", PR_GET_PDEATHSIG, true},
    {"child subreaper", PR_GET_CHILD_SUBREAPER, true},
    {"time stamp counter", PR_GET_TSC, true},
};

static long value_of(const Attribute& attribute) {
  int value = 0;
  if (attribute.through_pointer) {
    MUST(prctl(attribute.get, &value, 0, 0, 0));
    return value;
  }
  return prctl(attribute.get, 0, 0, 0, 0);
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  MUST(prctl(PR_SET_NAME, "renamed-main", 0, 0, 0));
  MUST(prctl(PR_SET_TIMERSLACK, 123456, 0, 0, 0));
  MUST(prctl(PR_SET_PDEATHSIG, SIGUSR2, 0, 0, 0));
  MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
  MUST(prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0));
  MUST(prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0));
  // Except where advised (Linux 6.18); the answer to PR_GET_THP_DISABLE tells which it is.
  if (prctl(PR_SET_THP_DISABLE, 1, 2, 0, 0) != 0) MUST(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
  prctl(kPrSetMemoryMerge, 1, 0, 0, 0);
  MUST(prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0));
  MUST(personality(ADDR_NO_RANDOMIZE | UNAME26));

  std::atomic<int> ready{0}, proceed{0};
  std::thread other([&] {
    MUST(prctl(PR_SET_TIMERSLACK, 77777, 0, 0, 0));
    // Where the processor can: CPUID ends in SIGSEGV, in this thread alone.
    const bool faults = syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0) == 0;
    ready = 1;
    proceed.wait(0);
    act::expect_equal("CPUID is allowed in another thread", !faults, syscall(SYS_arch_prctl, ARCH_GET_CPUID, 0) == 1);
    act::expect_equal("timer slack of another thread", 77777, prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0));
  });
  while (ready == 0) act::sleep_ms(1);
  std::vector<long> before;
  for (const Attribute& attribute : kAttributes) before.push_back(value_of(attribute));

  act::intermission();

  for (size_t i = 0; i < std::size(kAttributes); i++) {
    act::expect_equal(kAttributes[i].name, before[i], value_of(kAttributes[i]));
  }
  char name[16] = "";
  MUST(prctl(PR_GET_NAME, name, 0, 0, 0));
  act::expect_equal("name", std::string("renamed-main"), std::string(name));
  act::expect_equal("CPUID is allowed", 1, syscall(SYS_arch_prctl, ARCH_GET_CPUID, 0));
  act::expect_equal("personality", ADDR_NO_RANDOMIZE | UNAME26, personality(0xffffffff));
  proceed = 1;
  proceed.notify_all();
  other.join();
  return act::finish();
}
