#include "player/player.h"

#include <linux/prctl.h>
#include <linux/sched.h>

#include "player/code.h"

extern "C" {
[[noreturn]] PLAYER_CODE __attribute__((visibility("hidden"))) void vmckpt_player_run(vmckpt::Tape* tape);
}

// The stack may come from anywhere: align it, and leave no return address.
asm(R"(
    .pushsection vmckpt_player, "ax", @progbits
    .globl vmckpt_player_entry
    .hidden vmckpt_player_entry
    .type vmckpt_player_entry, @function
vmckpt_player_entry:
    xorl %ebp, %ebp
    andq $-16, %rsp
    call vmckpt_player_run
    ud2
    .size vmckpt_player_entry, . - vmckpt_player_entry
    .popsection
)");

namespace vmckpt {
namespace {

constexpr int kSignalKill = 9;

// The copy's life: die with the supervisor, let go of every descriptor (it would keep pipes and sockets open), wait.
[[noreturn]] PLAYER_CODE void wait_as_snapshot(uint64_t expected_parent) {
  system_call(SYS_prctl, PR_SET_PDEATHSIG, kSignalKill);
  if (static_cast<uint64_t>(system_call(SYS_getppid)) != expected_parent) system_call(SYS_exit_group, 0);
  system_call(SYS_close_range, 0, ~0u, 0);
  for (;;) system_call(SYS_pause);
}

// CLONE_PARENT: the copy is the supervisor's child, so the target never sees a SIGCHLD for it.
PLAYER_CODE int64_t snapshot(uint64_t expected_parent) {
  constexpr uint64_t kSignalChild = 17;
  int64_t pid = system_call(SYS_clone, CLONE_PARENT | kSignalChild);
  if (pid == 0) wait_as_snapshot(expected_parent);
  return pid;
}

// The new thread starts here too, on its own stack, and goes on to play its own tape.
PLAYER_CODE int64_t start_thread(const TapeCall* call) {
  int64_t result;
  register uint64_t tape asm("r12") = call->args[2];
  asm volatile(
      "syscall\n\t"
      "testq %%rax, %%rax\n\t"
      "jnz 1f\n\t"
      "xorl %%ebp, %%ebp\n\t"
      "movq %%r12, %%rdi\n\t"
      "call vmckpt_player_run\n\t"
      "ud2\n"
      "1:"
      : "=a"(result)
      : "a"(static_cast<int64_t>(SYS_clone3)), "D"(call->args[0]), "S"(call->args[1]), "r"(tape)
      : "rcx", "r11", "memory");
  return result;
}

PLAYER_CODE int64_t read_exactly(uint64_t fd, uint64_t address, uint64_t bytes, uint64_t offset) {
  while (bytes > 0) {
    int64_t got = system_call(SYS_pread64, fd, address, bytes, offset);
    if (got == -kErrorInterrupted) continue;
    if (got == 0) return -kErrorIo;
    if (is_error(got)) return got;
    address += static_cast<uint64_t>(got);
    offset += static_cast<uint64_t>(got);
    bytes -= static_cast<uint64_t>(got);
  }
  return 0;
}

PLAYER_CODE int64_t read_list(const TapeCall* call) {
  const auto* items = reinterpret_cast<const ReadItem*>(call->args[kReadListItems]);
  const auto* starts = reinterpret_cast<const uint32_t*>(call->args[kReadListStarts]);
  auto* next = reinterpret_cast<uint32_t*>(call->args[kReadListNext]);
  for (;;) {
    const uint32_t group = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
    if (group >= call->args[kReadListGroups]) return 0;
    for (uint32_t i = starts[group]; i < starts[group + 1]; ++i) {
      const int64_t result = read_exactly(call->args[kReadListFd], items[i].address, items[i].bytes, items[i].file_offset);
      if (is_error(result)) return result;
    }
  }
}

// A thread that could not be made has left its word at 0, and its tape says that nothing failed.
PLAYER_CODE int64_t join(const TapeCall* call) {
  constexpr uint64_t kFutexWait = 0;  // not private: that is how the kernel wakes whoever waits for a thread's end
  auto* word = reinterpret_cast<uint32_t*>(call->args[0]);
  for (;;) {
    const uint32_t running = __atomic_load_n(word, __ATOMIC_ACQUIRE);
    if (running == 0) break;
    system_call(SYS_futex, call->args[0], kFutexWait, running);
  }
  const auto* tape = reinterpret_cast<const Tape*>(call->args[1]);
  return tape->failed == 0 ? 0 : tape->call[tape->failed - 1].result;
}

PLAYER_CODE int64_t copy_bytes(const TapeCall* call) {
  void* to = reinterpret_cast<void*>(call->args[0]);
  const void* from = reinterpret_cast<const void*>(call->args[1]);
  uint64_t bytes = call->args[2];
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
  return 0;
}

PLAYER_CODE int64_t make_descriptor(const TapeCall* call) {
  int64_t made = system_call(SYS_ioctl, call->args[0], call->args[1], call->args[2]);
  if (is_error(made)) return made;
  int64_t placed = system_call(SYS_dup3, static_cast<uint64_t>(made), call->args[3], call->args[4]);
  system_call(SYS_close, static_cast<uint64_t>(made));
  return placed;
}

PLAYER_CODE int64_t play(TapeCall* call) {
  if (call->number < kOpFirst) {
    return system_call(call->number, call->args[0], call->args[1], call->args[2], call->args[3], call->args[4],
                       call->args[5]);
  }
  if (call->number == kOpSnapshot) return snapshot(call->args[0]);
  if (call->number == kOpThread) return start_thread(call);
  if (call->number == kOpReadList) return read_list(call);
  if (call->number == kOpJoin) return join(call);
  if (call->number == kOpCopyBytes) return copy_bytes(call);
  if (call->number == kOpMakeDescriptor) return make_descriptor(call);
  if (call->number == kOpAdd) {
    *reinterpret_cast<uint64_t*>(call->args[0]) += call->args[1];
    return 0;
  }
  return play_for_module(call);
}

[[noreturn]] PLAYER_CODE void go_back(uint64_t return_frame) {
  asm volatile("movq %0, %%rsp\n\tsyscall" : : "r"(return_frame), "a"(static_cast<int64_t>(SYS_rt_sigreturn)) : "memory");
  __builtin_unreachable();
}

}  // namespace
}  // namespace vmckpt

extern "C" void vmckpt_player_run(vmckpt::Tape* tape) {
  using namespace vmckpt;
  for (uint32_t i = 0; i < tape->calls; ++i) {
    TapeCall* call = &tape->call[i];
    call->result = play(call);
    if ((call->flags & kTapeMustSucceed) && is_error(call->result)) {
      tape->failed = i + 1;
      break;
    }
  }
  tape->done = 1;
  while (tape->end_signal == 0) system_call(SYS_exit, 0);
  system_call(SYS_tgkill, static_cast<uint64_t>(tape->process_id), static_cast<uint64_t>(tape->thread_id),
              static_cast<uint64_t>(tape->end_signal));
  // Still here: nobody traces this thread (any more).
  if (tape->return_frame != 0) go_back(tape->return_frame);
  for (;;) system_call(SYS_exit_group, 1);
}
