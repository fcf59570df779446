#include "tracer/interrupted_calls.h"

#include <algorithm>

#include <sys/syscall.h>

#include "core/clock.h"
#include "core/proc.h"
#include "tracer/thread_state.h"

namespace vmckpt {
namespace {

// From its release to the next stop: once asleep in the call, once in the stop itself.
constexpr int64_t kSwitchesOfOneSleep = 2;

int64_t switches_of(pid_t tid) {
  auto status = read_status(tid);
  return status.ok() ? status_number(*status, "voluntary_ctxt_switches") : -1;
}

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

void InterruptedCalls::after_freeze(StoppedWorld& world) {
  std::map<pid_t, Call> seen;
  const int64_t now_us = monotonic_us();
  for (StoppedThread& thread : world.threads()) {
    remember_repeated_call(thread);
    if (!hide_interruption(thread) || !is_epoll_wait(thread.regs)) continue;
    const auto timeout_ms = static_cast<int32_t>(thread.regs.r10);
    if (timeout_ms <= 0) continue;
    Call call{thread.regs.rsp, thread.regs.rip, thread.regs.rdi, thread.regs.rsi, now_us + int64_t{timeout_ms} * 1000, -1};
    auto before = calls_.find(thread.tid);
    if (before != calls_.end() && before->second.rsp == call.rsp && before->second.rip == call.rip &&
        before->second.epoll == call.epoll && before->second.events == call.events &&
        switches_of(thread.tid) == before->second.switches_at_resume + kSwitchesOfOneSleep) {
      call.deadline_us = before->second.deadline_us;
      int64_t left_ms = (call.deadline_us - now_us + 999) / 1000;
      thread.regs.r10 = static_cast<uint64_t>(std::max<int64_t>(0, left_ms));
    }
    seen[thread.tid] = call;
  }
  calls_ = std::move(seen);
}

void InterruptedCalls::before_resume(const StoppedWorld& world) {
  for (const StoppedThread& thread : world.threads()) {
    auto call = calls_.find(thread.tid);
    if (call != calls_.end()) call->second.switches_at_resume = switches_of(thread.tid);
  }
}

}  // namespace vmckpt
