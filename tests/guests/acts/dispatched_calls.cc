// PR_SET_SYSCALL_USER_DISPATCH, as emulators use it: system calls from outside a region, or while a byte says so, become SIGSYS.
// The rules of each thread stay its own.

#include <sys/prctl.h>
#include <sys/ucontext.h>

#include <atomic>
#include <thread>

#include "act.h"

#ifndef PR_SET_SYSCALL_USER_DISPATCH
#define PR_SET_SYSCALL_USER_DISPATCH 59
#define PR_SYS_DISPATCH_OFF 0
#define PR_SYS_DISPATCH_ON 1
#endif

constexpr char kAllow = 0, kBlock = 1;  // SYSCALL_DISPATCH_FILTER_*
constexpr long kAnswer = 4711;

static volatile char selector = kAllow;
static volatile int dispatched;

// Instead of the kernel.
static void answer(int, siginfo_t*, void* context) {
  selector = kAllow;
  dispatched = dispatched + 1;
  static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RAX] = kAnswer;
}

static long call_from_here(long number) {
  long result;
  asm volatile("syscall" : "=a"(result) : "a"(number) : "rcx", "r11", "memory");
  return result;
}

static std::pair<uintptr_t, uintptr_t> code_of_libc() {
  uintptr_t start = 0, end = 0;
  for (const std::string& line : act::lines_of(act::file_text("/proc/self/maps"))) {
    if (line.find("r-xp") == std::string::npos || line.find("libc.so") == std::string::npos) continue;
    std::sscanf(line.c_str(), "%lx-%lx", &start, &end);
  }
  return {start, end};
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  struct sigaction action {};
  action.sa_sigaction = answer;
  action.sa_flags = SA_SIGINFO;
  MUST(sigaction(SIGSYS, &action, nullptr));

  std::atomic<bool> armed{false}, proceed{false};
  std::thread other([&] {
    if (prctl(PR_SET_SYSCALL_USER_DISPATCH, PR_SYS_DISPATCH_ON, 0, 0, &selector) != 0) act::skip("syscall user dispatch");
    selector = kBlock;
    armed = true;
    while (!proceed) __builtin_ia32_pause();
    const long result = call_from_here(SYS_getpid);
    prctl(PR_SET_SYSCALL_USER_DISPATCH, PR_SYS_DISPATCH_OFF, 0, 0, 0);
    act::expect_equal("answer to the thread that a byte has blocked", kAnswer, result);
  });
  while (!armed) act::sleep_ms(1);
  const auto [start, end] = code_of_libc();
  MUST(prctl(PR_SET_SYSCALL_USER_DISPATCH, PR_SYS_DISPATCH_ON, start, end - start, nullptr));

  act::intermission();

  proceed = true;
  other.join();
  const long result = call_from_here(SYS_getpid);
  prctl(PR_SET_SYSCALL_USER_DISPATCH, PR_SYS_DISPATCH_OFF, 0, 0, 0);
  act::expect_equal("answer to the thread whose libc alone may call", kAnswer, result);
  act::expect_equal("dispatched calls", 2, static_cast<int>(dispatched));
  return act::finish();
}
