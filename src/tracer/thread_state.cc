#include "tracer/thread_state.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include <cpuid.h>
#include <elf.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>

namespace vmckpt {
namespace {

// include/linux/errno.h: kernel-internal results of interrupted system calls.
constexpr int64_t kRestartSys = 512, kRestartNoIntr = 513, kRestartNoHand = 514, kRestartBlock = 516;
// PTRACE_SET_ and _GET_SYSCALL_USER_DISPATCH_CONFIG, newer than Debian 12's headers.
constexpr auto kSetDispatch = static_cast<__ptrace_request>(0x4210), kGetDispatch = static_cast<__ptrace_request>(0x4211);
constexpr size_t kMaxXstateBytes = 16 * 1024;  // AVX-512 needs 2.7 KiB, AMX another 8 KiB

bool in_system_call(const user_regs_struct& regs) { return static_cast<int64_t>(regs.orig_rax) >= 0; }

bool answers_interrupted_to_a_stop(uint64_t number) {
  switch (number) {
    case SYS_epoll_wait:
    case SYS_epoll_pwait:
    case SYS_epoll_pwait2:
    case SYS_rt_sigtimedwait:
    case SYS_semop:
    case SYS_semtimedop:
    case SYS_read:
    case SYS_recvfrom:
    case SYS_recvmsg:
    case SYS_recvmmsg:
    case SYS_sendto:
    case SYS_sendmsg:
    case SYS_accept:
    case SYS_accept4:
    case SYS_futex:
    case SYS_io_getevents:
      return true;
    default:
      return false;
  }
}

// The extended state as ptrace and signal frames have it: the standard format of XSAVE (Intel SDM volume 1, 13.4).
constexpr size_t kSoftwareOffset = 464;    // struct _fpx_sw_bytes in the legacy area; ptrace puts XCR0 first there
constexpr size_t kInUseOffset = 512;       // XSTATE_BV
constexpr size_t kLeastXstateBytes = 576;  // legacy area and header

uint64_t word_at(const std::vector<uint8_t>& bytes, size_t offset) {
  uint64_t word = 0;
  if (offset + sizeof word <= bytes.size()) std::memcpy(&word, bytes.data() + offset, sizeof word);
  return word;
}

// Where the components in `features` end, in the order of their numbers.
std::vector<size_t> component_ends(uint64_t features) {
  constexpr unsigned kLeaf = 0xd, kFirstExtended = 2;
  std::vector<size_t> ends;
  for (unsigned component = kFirstExtended; component < 63; ++component) {
    unsigned bytes = 0, offset = 0, c = 0, d = 0;
    if (!(features >> component & 1) || __get_cpuid_count(kLeaf, component, &bytes, &offset, &c, &d) == 0) continue;
    if (offset >= kLeastXstateBytes) ends.push_back(size_t{offset} + bytes);
  }
  return ends;
}

size_t bytes_in_use(const std::vector<uint8_t>& xstate) {
  size_t end = kLeastXstateBytes;
  for (size_t next : component_ends(word_at(xstate, kInUseOffset))) end = std::max(end, next);
  return end;
}

// Marks the extended state of a signal frame as such. Since Linux 6.8 the kernel looks for the second magic number at the end of
// the state that the thread has at that moment, before at the end that the frame names, which may not lie behind the former
// (arch/x86/kernel/fpu/signal.c, check_xstate_in_sigframe; if it finds none, it restores x87 and SSE alone and says nothing).
// ptrace shows all that the processor has, but a thread's state has no room for AMX before its first use, and nobody tells
// whether that has been. So the frame names what is in use, and the number stands at every end that the thread's state may have:
// what lies behind the parts in use is not read.
void mark_as_frame(std::vector<uint8_t>& xstate) {
  xstate.resize(std::max(xstate.size(), kLeastXstateBytes));
  const uint64_t features = word_at(xstate, kSoftwareOffset);
  const size_t used = bytes_in_use(xstate);
  _fpx_sw_bytes software{};
  software.magic1 = FP_XSTATE_MAGIC1;
  software.xstate_bv = features;
  software.xstate_size = static_cast<uint32_t>(used);
  software.extended_size = static_cast<uint32_t>(used + FP_XSTATE_MAGIC2_SIZE);
  std::memcpy(xstate.data() + kSoftwareOffset, &software, sizeof software);
  std::vector<size_t> ends = component_ends(features);
  ends.push_back(xstate.size());
  ends.push_back(used);
  const uint32_t magic2 = FP_XSTATE_MAGIC2;
  for (size_t end : ends) {
    if (end < used) continue;
    xstate.resize(std::max(xstate.size(), end + sizeof magic2));
    std::memcpy(xstate.data() + end, &magic2, sizeof magic2);
  }
}

// The kernel takes extended state in the one size that this host's processor has; the image may come from another.
bool fit_to_host(pid_t tid, std::vector<uint8_t>& xstate) {
  std::vector<uint8_t> here(kMaxXstateBytes);
  iovec extended{here.data(), here.size()};
  if (::ptrace(PTRACE_GETREGSET, tid, NT_X86_XSTATE, &extended) != 0) return false;
  if (extended.iov_len == xstate.size() || extended.iov_len < bytes_in_use(xstate)) return false;
  xstate.resize(extended.iov_len);
  return true;
}

Result<void> write_extended_state(const StoppedThread& thread) {
  std::vector<uint8_t> xstate = thread.xstate;
  for (bool again = true;; again = false) {
    iovec extended{xstate.data(), xstate.size()};
    if (::ptrace(PTRACE_SETREGSET, thread.tid, NT_X86_XSTATE, &extended) == 0) return {};
    const int err = errno;
    if (again && err == EFAULT && fit_to_host(thread.tid, xstate)) continue;
    errno = err;
    return errno_error(fmt::format("set extended registers of thread {}", thread.tid));
  }
}

Result<void> set_dispatch(pid_t tid, SyscallDispatch dispatch) {
  if (::ptrace(kSetDispatch, tid, sizeof dispatch, &dispatch) == 0) return {};
  return errno_error(fmt::format("set syscall user dispatch of thread {}", tid), "this needs Linux 6.4 or newer");
}

}  // namespace

bool uses_tiles(const std::vector<uint8_t>& xstate) {
  constexpr unsigned kTileData = 18;  // Intel SDM volume 1, 13.1
  return word_at(xstate, kInUseOffset) >> kTileData & 1;
}

Result<void> read_thread_state(StoppedThread& thread) {
  iovec general{&thread.regs, sizeof thread.regs};
  if (::ptrace(PTRACE_GETREGSET, thread.tid, NT_PRSTATUS, &general) != 0) {
    return errno_error(fmt::format("read registers of thread {}", thread.tid));
  }
  thread.xstate.resize(kMaxXstateBytes);
  iovec extended{thread.xstate.data(), thread.xstate.size()};
  if (::ptrace(PTRACE_GETREGSET, thread.tid, NT_X86_XSTATE, &extended) != 0) {
    return errno_error(fmt::format("read extended registers of thread {}", thread.tid));
  }
  thread.xstate.resize(extended.iov_len);
  if (::ptrace(PTRACE_GETSIGMASK, thread.tid, sizeof thread.signal_mask, &thread.signal_mask) != 0) {
    return errno_error(fmt::format("read signal mask of thread {}", thread.tid));
  }
  // Before Linux 6.4 nobody tells: the thread's tape then meets SIGSYS (remote_tape.cc).
  if (::ptrace(kGetDispatch, thread.tid, sizeof thread.dispatch, &thread.dispatch) != 0) {
    thread.dispatch = {};
  }
  return {};
}

Result<void> write_thread_state(const StoppedThread& thread) {
  VMCKPT_TRY(write_extended_state(thread));
  uint64_t mask = thread.signal_mask;
  if (::ptrace(PTRACE_SETSIGMASK, thread.tid, sizeof mask, &mask) != 0) {
    return errno_error(fmt::format("set signal mask of thread {}", thread.tid));
  }
  if (thread.dispatch.mode != 0) VMCKPT_TRY(set_dispatch(thread.tid, thread.dispatch));
  return write_registers(thread);
}

Result<void> suspend_dispatch(const StoppedThread& thread) {
  return thread.dispatch.mode == 0 ? Result<void>() : set_dispatch(thread.tid, {});
}

Result<void> write_registers(const StoppedThread& thread) {
  iovec general{const_cast<user_regs_struct*>(&thread.regs), sizeof thread.regs};
  if (::ptrace(PTRACE_SETREGSET, thread.tid, NT_PRSTATUS, &general) != 0) {
    return errno_error(fmt::format("set registers of thread {}", thread.tid));
  }
  return {};
}

void write_debug_register(pid_t tid, int number, uint64_t value) {
  ::ptrace(PTRACE_POKEUSER, tid, offsetof(struct user, u_debugreg) + static_cast<size_t>(number) * sizeof(long), value);
}

user_regs_struct registers_that_repeat_the_call(const user_regs_struct& regs, uint64_t repeated_call) {
  constexpr uint64_t kSyscallInstructionBytes = 2;
  user_regs_struct result = regs;
  if (!in_system_call(regs)) return result;
  int64_t value = -static_cast<int64_t>(regs.rax);
  if (value == kRestartSys || value == kRestartNoIntr || value == kRestartNoHand || value == kRestartBlock) {
    // For -ERESTART_RESTARTBLOCK the kernel would go on with the time that was left; that is not to be had from outside, so
    // the call starts again with its whole (relative) timeout.
    const bool continues_another = regs.orig_rax == SYS_restart_syscall;
    if (continues_another && repeated_call == 0) {
      result.rax = static_cast<uint64_t>(-EINTR);
    } else {
      result.rax = continues_another ? repeated_call : regs.orig_rax;
      result.rip -= kSyscallInstructionBytes;
    }
  }
  result.orig_rax = ~uint64_t{0};
  return result;
}

bool hide_interruption(StoppedThread& thread) {
  user_regs_struct& regs = thread.regs;
  if (!in_system_call(regs) || static_cast<int64_t>(regs.rax) != -EINTR) return false;
  if (!answers_interrupted_to_a_stop(regs.orig_rax)) return false;
  regs.rax = static_cast<uint64_t>(-kRestartNoHand);
  thread.disturbed = true;
  return true;
}

std::vector<uint8_t> make_return_frame(const StoppedThread& thread, RemoteAddr address, RemoteAddr* stack_pointer) {
  // struct rt_sigframe (arch/x86/include/asm/sigframe.h): return address, ucontext, siginfo; the extended state follows at a
  // 64-byte boundary. At rt_sigreturn rsp points behind the return address.
  constexpr uint64_t kUcFpXstate = 1, kUcSigcontextSs = 2, kUcStrictRestoreSs = 4;
  constexpr size_t kContextOffset = 8;
  constexpr size_t kXstateOffset = 1024;  // ucontext (kernel's view: 304 bytes) ends well before
  const user_regs_struct regs = registers_that_repeat_the_call(thread.regs, thread.repeated_call);

  struct KernelUcontext {
    uint64_t flags;
    uint64_t link;
    stack_t stack;
    sigcontext registers;
    uint64_t signal_mask;
  } context{};
  context.flags = kUcFpXstate | kUcSigcontextSs | kUcStrictRestoreSs;
  context.stack.ss_flags = 0x7f;  // invalid: rt_sigreturn leaves the alternate stack as it is
  sigcontext& c = context.registers;
  c.r8 = regs.r8, c.r9 = regs.r9, c.r10 = regs.r10, c.r11 = regs.r11;
  c.r12 = regs.r12, c.r13 = regs.r13, c.r14 = regs.r14, c.r15 = regs.r15;
  c.rdi = regs.rdi, c.rsi = regs.rsi, c.rbp = regs.rbp, c.rbx = regs.rbx;
  c.rdx = regs.rdx, c.rax = regs.rax, c.rcx = regs.rcx, c.rsp = regs.rsp;
  c.rip = regs.rip, c.eflags = regs.eflags;
  c.cs = static_cast<uint16_t>(regs.cs);
  c.__pad0 = static_cast<uint16_t>(regs.ss);  // glibc's name for the kernel's `ss`
  context.signal_mask = thread.signal_mask;

  std::vector<uint8_t> xstate = thread.xstate;
  mark_as_frame(xstate);

  c.fpstate = reinterpret_cast<_fpstate*>((address + kXstateOffset).value());
  std::vector<uint8_t> frame(kXstateOffset + xstate.size());
  std::memcpy(frame.data() + kContextOffset, &context, sizeof context);
  std::memcpy(frame.data() + kXstateOffset, xstate.data(), xstate.size());
  *stack_pointer = address + kContextOffset;
  return frame;
}

}  // namespace vmckpt
