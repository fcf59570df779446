// Registers, extended state and signal mask of a thread that is stopped under ptrace, and what an interrupted system call
// means for them.
#pragma once

#include <cstdint>
#include <vector>

#include "core/remote_addr.h"
#include "core/result.h"
#include "tracer/stopped_thread.h"

namespace vmckpt {

Result<void> read_thread_state(StoppedThread& thread);
Result<void> write_thread_state(const StoppedThread& thread);
// Until write_thread_state() the thread's own system calls go to the kernel.
Result<void> suspend_dispatch(const StoppedThread& thread);
Result<void> write_registers(const StoppedThread& thread);  // the general ones alone
void write_debug_register(pid_t tid, int number, uint64_t value);

// Whether extended state (NT_X86_XSTATE) has AMX tile data. The kernel makes room for it in a thread at the first use only; until
// then ptrace cannot put it in.
bool uses_tiles(const std::vector<uint8_t>& xstate);

// A thread inside a restartable system call stands there with orig_rax = its number and rax = -ERESTART*; the kernel restarts
// the call when the thread goes on. A thread that is put into another process (or comes back through rt_sigreturn) must be
// set to execute the call again: these registers do that.
// `repeated_call`: StoppedThread's; a thread in restart_syscall has nothing to go on with elsewhere, so the call it stands for is
// made again, or where that is not known answers EINTR.
user_regs_struct registers_that_repeat_the_call(const user_regs_struct& regs, uint64_t repeated_call = 0);

// Some calls (epoll_wait, sigtimedwait, semop, sockets with a timeout) answer EINTR to any stop, though no handler ran
// (signal(7), "Interruption of system calls ... by stop signals"). This makes the kernel treat them like the others: again
// when no handler runs, EINTR when one does. Returns whether something was changed.
bool hide_interruption(StoppedThread& thread);

// A frame for rt_sigreturn that brings a thread back to `thread`'s state. `address` is where the frame will lie (64-byte
// aligned); returns the bytes, and sets *stack_pointer to what rsp must be at the rt_sigreturn system call.
std::vector<uint8_t> make_return_frame(const StoppedThread& thread, RemoteAddr address, RemoteAddr* stack_pointer);

}  // namespace vmckpt
