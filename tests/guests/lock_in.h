// SPDX-License-Identifier: Apache-2.0
//
// Locks a program in as Firecracker and its like do: a system call that is not on the list ends the process at once.

#pragma once

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include <cstdint>
#include <vector>

namespace lock_in {

inline sock_filter load(size_t offset) {
  return BPF_STMT(BPF_LD | BPF_W | BPF_ABS, static_cast<uint32_t>(offset));
}

// `ioctls` narrows ioctl(2) down to these requests; empty: all. SYS_ioctl need not be among `calls`.
inline std::vector<sock_filter> allow_list(const std::vector<long>& calls, const std::vector<uint32_t>& ioctls) {
  constexpr sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
  constexpr sock_filter kill = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
  std::vector<sock_filter> program = {load(offsetof(seccomp_data, nr))};
  auto allow_if_equal = [&](uint32_t value) {
    program.push_back(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, 1));
    program.push_back(allow);
  };
  for (long call : calls) allow_if_equal(static_cast<uint32_t>(call));
  if (ioctls.empty()) {
    allow_if_equal(SYS_ioctl);
  } else {
    program.push_back(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 1, 0));
    program.push_back(kill);
    program.push_back(load(offsetof(seccomp_data, args[1])));
    for (uint32_t request : ioctls) allow_if_equal(request);
  }
  program.push_back(kill);
  return program;
}

// What `vmckpt checkpoint` has a program's threads do. Without them a checkpoint is refused, and the program runs on.
inline const std::vector<long> kCallsOfACheckpoint = {
    SYS_rt_sigaction, SYS_rt_sigreturn, SYS_tgkill, SYS_sigaltstack, SYS_prctl, SYS_arch_prctl, SYS_brk, SYS_clock_gettime,
    SYS_getitimer, SYS_timer_gettime, SYS_timer_getoverrun, SYS_madvise,
    SYS_clone, SYS_getppid, SYS_close_range, SYS_pause,  // the snapshot
};

inline int install(const std::vector<sock_filter>& program) {
  const sock_fprog filter = {static_cast<unsigned short>(program.size()), const_cast<sock_filter*>(program.data())};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return -1;
  return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter);
}

}  // namespace lock_in
