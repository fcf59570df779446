// Rules of this file: it is compiled freestanding with general registers only, and every function lies in the section
// "vmckpt_player". No string or table constants (they would land in .rodata, which is not copied along), no switch (a jump
// table would), no call out of the section. tests/unit/test_symbols.py compares its undefined symbols with an empty list.
#include "player/player.h"

#include <linux/prctl.h>
#include <linux/sched.h>
#include <sys/syscall.h>

#define PLAYER_CODE __attribute__((section("vmckpt_player"), used))
#define PLAYER_INLINE static inline __attribute__((always_inline))

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

constexpr int64_t kMaxErrno = 4095;
constexpr int64_t kErrorIo = 5;
constexpr int64_t kErrorInterrupted = 4;
constexpr int kSignalKill = 9;

PLAYER_INLINE bool is_error(int64_t result) { return result < 0 && result >= -kMaxErrno; }

PLAYER_INLINE int64_t system_call(int64_t number, uint64_t a0 = 0, uint64_t a1 = 0, uint64_t a2 = 0, uint64_t a3 = 0,
                                  uint64_t a4 = 0, uint64_t a5 = 0) {
  int64_t result;
  register uint64_t r10 asm("r10") = a3;
  register uint64_t r8 asm("r8") = a4;
  register uint64_t r9 asm("r9") = a5;
  asm volatile("syscall"
               : "=a"(result)
               : "a"(number), "D"(a0), "S"(a1), "d"(a2), "r"(r10), "r"(r8), "r"(r9)
               : "rcx", "r11", "memory");
  return result;
}

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

// A fault that the kernel answers with a larger state for this thread (Documentation/arch/x86/xstate.rst).
PLAYER_CODE int64_t use_tiles(const TapeCall* call) {
  asm volatile(
      "ldtilecfg (%0)\n\t"
      "tilezero %%tmm0\n\t"
      "tilerelease"
      :
      : "r"(call->args[0])
      : "memory");
  return 0;
}

PLAYER_CODE int64_t submit_requests(AioRingOrder* order, uint32_t count, bool take) {
  while (count > 0) {
    const uint64_t batch = count < kAioBatch ? count : kAioBatch;
    const int64_t submitted = system_call(SYS_io_submit, order->address, batch, reinterpret_cast<uint64_t>(order->requests));
    if (submitted <= 0) return submitted == 0 ? -kErrorIo : submitted;
    const auto done = static_cast<uint64_t>(submitted);
    if (take) {
      const int64_t taken = system_call(SYS_io_getevents, order->address, done, done, reinterpret_cast<uint64_t>(order->scratch), 0);
      if (taken != submitted) return taken < 0 ? taken : -kErrorIo;
    }
    count -= static_cast<uint32_t>(done);
  }
  return 0;
}

// The kernel counts a ring's positions and slots by itself, so it is brought to where it was by requests that end at once: as many as the
// program had taken events for (modulo the ring), and as many as wait to be taken. Then these get their old content.
PLAYER_CODE int64_t make_aio_ring(const TapeCall* call) {
  constexpr uint64_t kMayMoveToFixed = 3;  // MREMAP_MAYMOVE | MREMAP_FIXED
  constexpr int64_t kErrorInvalid = 22;
  auto* order = reinterpret_cast<AioRingOrder*>(call->args[0]);
  order->context = 0;
  int64_t result = system_call(SYS_io_setup, order->wanted, reinterpret_cast<uint64_t>(&order->context));
  if (is_error(result)) return result;
  if (reinterpret_cast<volatile uint32_t*>(order->context)[1] != order->slots) return -kErrorInvalid;
  result = system_call(SYS_mremap, order->context, order->bytes, order->bytes, kMayMoveToFixed, order->address);
  if (is_error(result)) return result;
  result = submit_requests(order, order->head, true);
  if (result != 0) return result;
  result = submit_requests(order, order->pending, false);
  if (result != 0) return result;
  auto* ring = reinterpret_cast<volatile uint64_t*>(order->address + kAioRingHeaderBytes);
  auto* event = reinterpret_cast<volatile uint64_t*>(order->events);
  for (uint32_t i = 0; i < order->pending; ++i) {
    const uint64_t slot = (uint64_t{order->head} + i) % order->slots;
    for (uint32_t word = 0; word < 4; ++word) ring[slot * 4 + word] = event[i * 4 + word];
  }
  auto* header = reinterpret_cast<volatile uint32_t*>(order->address);
  const uint32_t tail = static_cast<uint32_t>((uint64_t{order->head} + order->pending) % order->slots);
  return header[2] == order->head && header[3] == tail ? 0 : -kErrorIo;
}

PLAYER_CODE int64_t subtract_tsc(const TapeCall* call) {
  uint32_t low, high;
  asm volatile("lfence\n\trdtsc" : "=a"(low), "=d"(high) : : "memory");
  const uint64_t now = static_cast<uint64_t>(high) << 32 | low;
  auto* words = reinterpret_cast<uint64_t*>(call->args[0]);
  for (uint64_t i = 0; i < call->args[1]; ++i) words[i] -= now;
  return 0;
}

struct Msr {  // kvm_msr_entry
  uint32_t index;
  uint32_t reserved;
  uint64_t data;
};
struct MsrList {  // kvm_msrs
  uint32_t count;
  uint32_t reserved;
  Msr entries[];
};
struct OneMsr {
  uint32_t count;
  uint32_t reserved;
  Msr entry;
};

// KVM stops at the first MSR that it refuses. That is no loss where the new vCPU has the value anyway: some that can be read can
// be written only with a capability or device that this VM lacks.
PLAYER_CODE int64_t set_msrs(TapeCall* call) {
  constexpr uint64_t kGetMsrs = 0xc008ae88, kSetMsrs = 0x4008ae89;
  constexpr int64_t kErrorInvalid = 22;
  auto* list = reinterpret_cast<MsrList*>(call->args[1]);
  for (uint32_t i = 0; i < list->count; ++i) {
    OneMsr one;
    one.count = 1;
    one.reserved = 0;
    one.entry.index = list->entries[i].index;
    one.entry.reserved = 0;
    one.entry.data = list->entries[i].data;
    if (system_call(SYS_ioctl, call->args[0], kSetMsrs, reinterpret_cast<uint64_t>(&one)) == 1) continue;
    one.entry.data = 0;
    const int64_t read = system_call(SYS_ioctl, call->args[0], kGetMsrs, reinterpret_cast<uint64_t>(&one));
    if (read == 1 && one.entry.data == list->entries[i].data) continue;
    const uint32_t loss = list->entries[i].reserved;
    if (loss == kMsrHidden || (loss == kMsrFresh && read != 1)) continue;
    call->args[5] = list->entries[i].index;
    return -kErrorInvalid;
  }
  return 0;
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
  if (call->number == kOpSetMsrs) return set_msrs(call);
  if (call->number == kOpMakeAioRing) return make_aio_ring(call);
  if (call->number == kOpUseTiles) return use_tiles(call);
  if (call->number == kOpMakeDescriptor) return make_descriptor(call);
  if (call->number == kOpSubtractTsc) return subtract_tsc(call);
  if (call->number == kOpAdd) {
    *reinterpret_cast<uint64_t*>(call->args[0]) += call->args[1];
    return 0;
  }
  return -38;  // ENOSYS
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
