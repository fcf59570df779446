// epoll_wait with a timeout starts anew, with its whole timeout, when a freeze interrupts it (thread_state.h). Checkpoints that
// come faster than the timeout would put it off for ever. So the supervisor remembers which calls it interrupted, and at the
// next freeze gives a call that is still the same one only the time that it has left.
//
// "Still the same": the timeout is an int, of which the kernel reads the lower half of r10; a mark in the upper half is there as
// long as the thread has not come back from the call, and no longer. Other calls with timeouts (poll, futex, nanosleep) the
// kernel itself continues rightly.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include <sys/types.h>

#include "core/remote_addr.h"
#include "tracer/partial_calls.h"
#include "tracer/tracee.h"

namespace vmckpt {

inline constexpr uint64_t kSyscallInstructionBytes = 2;

// Where the recorder enters KVM_RUN and waits at its gate (recorder/kvm_ledger.h). None: the target does not use KVM.
struct KvmRunCode {
  RemoteAddr returns, wait_begin, wait_end;
};

class InterruptedCalls {
 public:
  void set_kvm_run_code(const KvmRunCode& code) { kvm_ = code; }
  void set_partial_calls(const PartialCalls& calls) { partial_ = calls; }
  // When a thread has stopped and its registers were read: calls hide_interruption(), lets a call that was cut short go on, and
  // shortens the timeout of a call that was seen before. True when registers are others now.
  bool after_stop(StoppedThread& thread);
  // After a freeze: forgets threads that have ended since.
  void keep_only(const std::vector<Tracee>& threads);

 private:
  // A call that the kernel continues as restart_syscall no longer shows its number: this remembers it.
  void remember_repeated_call(StoppedThread& thread);
  bool hide_stop_in_kvm_run(StoppedThread& thread) const;
  struct Repeated {
    uint64_t rsp, rip, number;
  };

  KvmRunCode kvm_{};
  PartialCalls partial_;
  std::map<pid_t, int64_t> deadlines_us_;  // by thread, CLOCK_MONOTONIC of the supervisor
  std::map<pid_t, Repeated> repeated_;
};

}  // namespace vmckpt
