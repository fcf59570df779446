// Freeze from outside: every thread of one process is stopped with PTRACE_SEIZE and PTRACE_INTERRUPT, no signal used.
// A StoppedWorld proves that all threads are stopped; its destructor puts them back exactly where they were and resumes.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <sys/types.h>

#include "core/fd.h"
#include "core/waiting.h"
#include "core/result.h"
#include "tracer/tracee.h"

namespace vmckpt {

class InterruptedCalls;

class StoppedWorld {
 public:
  StoppedWorld(StoppedWorld&&) noexcept;
  StoppedWorld& operator=(StoppedWorld&&) = delete;
  ~StoppedWorld();

  pid_t pid() const { return pid_; }
  pid_t pid_in_target() const { return threads_.front().tid_in_target; }
  int pidfd() const { return pidfd_.get(); }
  // The thread group leader comes first.
  std::vector<Tracee>& threads() { return threads_; }
  const std::vector<Tracee>& threads() const { return threads_; }

  bool is_stopped_by_job_control() const { return threads_.front().group_stopped; }

  // A duplicate of the target's descriptor (pidfd_getfd): same open file description.
  Result<Fd> duplicate_fd(int target_fd) const;

  // Lets every thread go on from its `regs`.
  void resume();

  // Forgets the target without touching it: it has been killed.
  void abandon();

 private:
  friend Result<StoppedWorld> freeze(pid_t, const Waiting&, InterruptedCalls&);
  friend Result<StoppedWorld> freeze_later(StoppedWorld, const std::function<Result<bool>()>&, const Waiting&, InterruptedCalls&);
  StoppedWorld() = default;
  pid_t pid_ = 0;
  Fd pidfd_;
  std::vector<Tracee> threads_;
};

// Stops all threads of `pid`; on failure (a debugger is attached, a thread does not stop in time, no permission) everything
// that was stopped runs on. Calls that a stop makes answer EINTR are repaired in each thread as soon as it has stopped, so
// that none comes to light however the checkpoint, or this process, may end.
Result<StoppedWorld> freeze(pid_t pid, const Waiting& waiting, InterruptedCalls& interrupted);

// A target that job control has stopped goes on standing when a freeze ends. This lets its threads run on under ptrace, until
// `is_enough` (which is asked again and again, and should take some time) or the end of `waiting`, and stops them again. For
// everybody else the target is stopped all the time: no SIGCONT, no word to its parent.
Result<StoppedWorld> freeze_later(StoppedWorld world, const std::function<Result<bool>()>& is_enough, const Waiting& waiting,
                                  InterruptedCalls& interrupted);

// Once more into the system call that one thread was stopped in, from the registers of a call that begins anew, and out of it
// again: the stop is asked for before the call begins, which goes as far as the kernel goes with one that is interrupted at once.
// The thread's state is that of the new stop then. A signal that comes first is delivered, and the call not made.
Result<void> repeat_call(StoppedWorld& world, Tracee& thread, const user_regs_struct& regs, const Waiting& waiting,
                         InterruptedCalls& interrupted);

// For a thread that stopped after its freeze had been given up, and whose stop somebody else has waited for: lets go of it as
// the freeze would have done. False when it is not traced by this process.
bool release_late(pid_t tid, int wait_status, InterruptedCalls& interrupted);

}  // namespace vmckpt
