// Freeze from outside: every thread of one process is stopped with PTRACE_SEIZE and PTRACE_INTERRUPT, no signal used.
// A StoppedWorld proves that all threads are stopped; its destructor puts them back exactly where they were and resumes.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <signal.h>
#include <sys/types.h>
#include <sys/user.h>

#include "core/fd.h"
#include "core/result.h"

namespace vmckpt {

class InterruptedCalls;

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
  user_regs_struct regs{};  // the state to come back to: what resume() and restart put into the thread
  std::vector<uint8_t> xstate;
  uint64_t signal_mask = 0;
  SyscallDispatch dispatch;
  bool group_stopped = false;  // the thread was in a job-control stop (SIGTSTP, SIGSTOP) when it was frozen
  int stop_signal = 0;         // the signal of that stop
  uint64_t repeated_call = 0;  // in restart_syscall: the number of the call that it goes on with, 0 when unknown
  bool disturbed = false;      // registers or mask were changed since: resume() puts them back
};

class StoppedWorld {
 public:
  StoppedWorld(StoppedWorld&&) noexcept;
  StoppedWorld& operator=(StoppedWorld&&) = delete;
  ~StoppedWorld();

  pid_t pid() const { return pid_; }
  pid_t pid_in_target() const { return threads_.front().tid_in_target; }
  int pidfd() const { return pidfd_.get(); }
  // The thread group leader comes first.
  std::vector<StoppedThread>& threads() { return threads_; }
  const std::vector<StoppedThread>& threads() const { return threads_; }

  bool is_stopped_by_job_control() const { return threads_.front().group_stopped; }

  // A duplicate of the target's descriptor (pidfd_getfd): same open file description.
  Result<Fd> duplicate_fd(int target_fd) const;

  // Lets every thread go on from its `regs`.
  void resume();

  // Forgets the target without touching it: it has been killed.
  void abandon() { threads_.clear(); }

 private:
  friend Result<StoppedWorld> freeze(pid_t, int64_t, InterruptedCalls&);
  friend Result<StoppedWorld> freeze_later(StoppedWorld, const std::function<Result<bool>()>&, int64_t, InterruptedCalls&);
  StoppedWorld() = default;
  pid_t pid_ = 0;
  Fd pidfd_;
  std::vector<StoppedThread> threads_;
};

// Stops all threads of `pid`; on failure (a debugger is attached, a thread does not stop in time, no permission) everything
// that was stopped runs on. Calls that a stop makes answer EINTR are repaired in each thread as soon as it has stopped, so
// that none comes to light however the checkpoint, or this process, may end.
Result<StoppedWorld> freeze(pid_t pid, int64_t timeout_us, InterruptedCalls& interrupted);

// A target that job control has stopped goes on standing when a freeze ends. This lets its threads run on under ptrace, until
// `is_enough` (which is asked again and again, and should take some time) or the end of `timeout_us`, and stops them again. For
// everybody else the target is stopped all the time: no SIGCONT, no word to its parent.
Result<StoppedWorld> freeze_later(StoppedWorld world, const std::function<Result<bool>()>& is_enough, int64_t timeout_us,
                                  InterruptedCalls& interrupted);

// Once more into the system call that one thread was stopped in, from the registers of a call that begins anew, and out of it again:
// the stop is asked for before the call begins, which goes as far as the kernel goes with one that is interrupted at once. The
// thread's state is that of the new stop then. A signal that comes first is delivered, and the call not made.
Result<void> repeat_call(StoppedWorld& world, StoppedThread& thread, const user_regs_struct& regs, int64_t timeout_us,
                         InterruptedCalls& interrupted);

// For a thread that stopped after its freeze had been given up, and whose stop somebody else has waited for: lets go of it as
// the freeze would have done. False when it is not traced by this process.
bool release_late(pid_t tid, int wait_status, InterruptedCalls& interrupted);

// Like waitpid(tid, status, WNOHANG), except that an end is only looked at: the supervisor's loop reaps it, and learns from it
// how the target has ended.
pid_t take_stop(pid_t tid, int* wait_status);

// Lets some time pass until a traced thread may have stopped; `round` counts the calls. Takes a pending SIGCHLD: whoever waits
// for that signal elsewhere must look at his children afterwards.
void wait_for_child_signal(int round);

}  // namespace vmckpt
