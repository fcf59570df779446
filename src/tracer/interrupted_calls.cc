#include "tracer/interrupted_calls.h"

#include <algorithm>
#include <set>

#include <sys/syscall.h>

#include "core/clock.h"
#include "tracer/thread_state.h"

namespace vmckpt {
namespace {

constexpr uint64_t kKvmRun = 0xae80;     // what frames of signal handlers are known by (vcpu_gate.cc)
constexpr uint64_t kMark = 0x766d'6370;  // in the upper half of r10: this call was begun anew by us

bool is_epoll_wait(const user_regs_struct& regs) {
  return regs.orig_rax == SYS_epoll_wait || regs.orig_rax == SYS_epoll_pwait;
}

}  // namespace

void InterruptedCalls::remember_repeated_call(StoppedThread& thread) {
  constexpr int64_t kRestartBlock = -516;  // -ERESTART_RESTARTBLOCK
  const user_regs_struct& regs = thread.regs;
  auto known = repeated_.find(thread.tid);
  if (static_cast<int64_t>(regs.rax) != kRestartBlock) {
    if (known != repeated_.end()) repeated_.erase(known);
  } else if (regs.orig_rax != SYS_restart_syscall) {
    repeated_[thread.tid] = {regs.rsp, regs.rip, regs.orig_rax};
  } else if (known != repeated_.end() && known->second.rsp == regs.rsp && known->second.rip == regs.rip) {
    thread.repeated_call = known->second.number;
  }
}

// With a handler the kernel makes EINTR of it; without one it goes back by an instruction, to where KVM_RUN returns, with the
// number of the call for an answer. What a thread has that waits at the gate in user mode is the same as inside the call.
bool InterruptedCalls::hide_stop_in_kvm_run(StoppedThread& thread) const {
  constexpr int64_t kRestartNoHand = 514;  // include/linux/errno.h
  user_regs_struct& regs = thread.regs;
  const RemoteAddr rip(regs.rip);
  const bool waits = rip >= kvm_.wait_begin && rip < kvm_.wait_end;
  const bool came_out = rip == kvm_.returns && regs.orig_rax == SYS_ioctl && static_cast<int64_t>(regs.rax) == -EINTR;
  if (!kvm_.returns || !(waits || came_out)) return false;
  regs.orig_rax = SYS_ioctl;
  regs.rax = static_cast<uint64_t>(-kRestartNoHand);
  regs.rip = (kvm_.returns + kSyscallInstructionBytes).value();
  regs.rsi = kKvmRun;
  thread.disturbed = true;
  return true;
}

bool InterruptedCalls::after_stop(StoppedThread& thread) {
  if (hide_stop_in_kvm_run(thread)) return true;
  if (partial_.go_on_with(thread)) return true;
  remember_repeated_call(thread);
  const bool hidden = hide_interruption(thread);
  int64_t timeout_ms = static_cast<int32_t>(thread.regs.r10);
  if (!hidden || !is_epoll_wait(thread.regs) || timeout_ms <= 0) {
    deadlines_us_.erase(thread.tid);
    return hidden;
  }
  const int64_t now_us = monotonic_us();
  int64_t deadline_us = now_us + timeout_ms * 1000;
  auto before = deadlines_us_.find(thread.tid);
  if (thread.regs.r10 >> 32 == kMark && before != deadlines_us_.end()) {
    deadline_us = before->second;
    timeout_ms = std::max<int64_t>(0, (deadline_us - now_us + 999) / 1000);
  }
  thread.regs.r10 = kMark << 32 | static_cast<uint64_t>(timeout_ms);
  deadlines_us_[thread.tid] = deadline_us;
  return true;
}

void InterruptedCalls::keep_only(const std::vector<Tracee>& threads) {
  std::set<pid_t> alive;
  for (const StoppedThread& thread : threads) alive.insert(thread.tid);
  std::erase_if(deadlines_us_, [&](const auto& entry) { return !alive.count(entry.first); });
  std::erase_if(repeated_, [&](const auto& entry) { return !alive.count(entry.first); });
}

}  // namespace vmckpt
