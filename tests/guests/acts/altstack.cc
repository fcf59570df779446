// Alternate signal stacks: one thread has its stack registered and uses it after restart, another is checkpointed
// inside a handler that runs on it and must find its way back (the interrupted registers lie on that stack).

#include <pthread.h>

#include <atomic>
#include <thread>

#include "act.h"

constexpr size_t kStackBytes = 64 * 1024;

static std::atomic<int> in_handler{0};
static std::atomic<int> leave_handler{0};
static std::atomic<int> short_runs{0};
static thread_local char* own_stack = nullptr;

static bool on_own_stack() {
  char here;
  return &here >= own_stack && &here < own_stack + kStackBytes;
}

static void on_long(int) {
  act::expect("long handler starts on the alternate stack", on_own_stack());
  stack_t stack{};
  MUST(sigaltstack(nullptr, &stack));
  act::expect_equal("SS_ONSTACK before", SS_ONSTACK, stack.ss_flags);
  in_handler = 1;
  leave_handler.wait(0);
  MUST(sigaltstack(nullptr, &stack));
  act::expect_equal("SS_ONSTACK after", SS_ONSTACK, stack.ss_flags);
  act::expect("long handler ends on the alternate stack", on_own_stack());
}

static void on_short(int) {
  act::expect("short handler runs on the alternate stack", on_own_stack());
  short_runs++;
}

static void register_stack() {
  own_stack = static_cast<char*>(
      MUST(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
  stack_t stack{};
  stack.ss_sp = own_stack;
  stack.ss_size = kStackBytes;
  MUST(sigaltstack(&stack, nullptr));
}

static void expect_registered(const char* who) {
  stack_t stack{};
  MUST(sigaltstack(nullptr, &stack));
  act::expect_equal(std::string(who) + ": stack address", own_stack, static_cast<char*>(stack.ss_sp));
  act::expect_equal(std::string(who) + ": stack size", kStackBytes, stack.ss_size);
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  struct sigaction action {};
  action.sa_flags = SA_ONSTACK;
  action.sa_handler = on_long;
  MUST(sigaction(SIGUSR1, &action, nullptr));
  action.sa_handler = on_short;
  MUST(sigaction(SIGUSR2, &action, nullptr));

  register_stack();
  std::thread interrupted([] {
    register_stack();
    volatile uint64_t before = 0x1234;
    raise(SIGUSR1);
    act::expect_equal("local variable after the handler", 0x1234u, static_cast<uint64_t>(before));
    expect_registered("interrupted thread");
    raise(SIGUSR2);
  });
  while (in_handler == 0) act::sleep_ms(1);

  act::intermission();

  leave_handler = 1;
  leave_handler.notify_all();
  interrupted.join();
  expect_registered("main thread");
  raise(SIGUSR2);
  act::expect_equal("short handler ran in both threads", 2, short_runs.load());
  return act::finish();
}
