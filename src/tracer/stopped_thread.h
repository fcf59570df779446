// What is known of a thread that is stopped under ptrace.
#pragma once

#include <cstdint>
#include <vector>

#include <sys/types.h>
#include <sys/user.h>

namespace vmckpt {

// PR_SET_SYSCALL_USER_DISPATCH: system calls become SIGSYS. As ptrace shows it (struct ptrace_sud_config, Linux 6.4).
struct SyscallDispatch {
  uint64_t mode = 0;  // 0: off
  uint64_t selector = 0;
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

struct StoppedThread {
  pid_t tid = 0;            // as this process sees it
  pid_t tid_in_target = 0;  // as the target's own PID namespace numbers it
  user_regs_struct regs{};  // the state to come back to: what Tracee::release() and restart put into the thread
  std::vector<uint8_t> xstate;
  uint64_t signal_mask = 0;
  SyscallDispatch dispatch;
  bool group_stopped = false;  // the thread was in a job-control stop (SIGTSTP, SIGSTOP) when it was frozen
  int stop_signal = 0;         // the signal of that stop
  uint64_t repeated_call = 0;  // in restart_syscall: the number of the call that it goes on with, 0 when unknown
  bool disturbed = false;      // registers or mask were changed since: release() puts them back
};

}  // namespace vmckpt
