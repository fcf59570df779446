// A task that this process traces: whoever has the Tracee owns it, from the attaching to the end. All requests of ptrace that
// make a task stop or go on, and all waiting for such tasks, are made here (tests/unit/check_ptrace.py).
//
// Requests say what went wrong as the kernel does, in errno: what it means, and whether it matters, the owner knows.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <utility>

#include <signal.h>

#include "core/result.h"
#include "core/waiting.h"
#include "tracer/stopped_thread.h"

namespace vmckpt {

// What an instruction can bring upon itself.
inline constexpr int kFaultSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGSYS, SIGTRAP, SIGFPE};
bool is_fault(int signal);
// What waitid(2) told is an end, not a stop.
bool is_end(const siginfo_t& told);
// The signal that a task was about to get when it stopped; 0: another kind of stop.
int signal_being_delivered(int wait_status);

class Tracee : public StoppedThread {
 public:
  // What the destructor does.
  enum class AtEnd {
    kRunsOn,           // puts back what was disturbed and detaches: the task goes on where it was
    kDies,             // kills and reaps it
    kDiesWithThreads,  // the same with a process whose threads have attached themselves (PTRACE_O_TRACECLONE)
  };

  Tracee() = default;  // nobody
  // A task that is traced already, or has attached itself, or that seize() attaches.
  explicit Tracee(pid_t task, AtEnd at_end = AtEnd::kRunsOn);
  Tracee(Tracee&& other) noexcept;
  Tracee& operator=(Tracee&& other) noexcept;
  ~Tracee() { end(); }

  // PTRACE_SEIZE, with PTRACE_O_... One that was to run on and cannot be attached is owned by nobody.
  bool seize(int options);
  bool set_options(int options);
  bool interrupt();

  // ---- it stands -----------------------------------------------------------------------------------------------------

  bool go_on(int signal = 0);
  bool go_on_to_system_call();  // to where the next one begins, or this one ends
  bool get_registers(user_regs_struct* registers) const;
  bool set_registers(const user_regs_struct& registers);
  bool set_signal_mask(uint64_t mask);
  bool get_signal(siginfo_t* signal) const;  // that it stands before
  bool get_event_message(unsigned long* message) const;
  enum class Sender { kAnyone, kKernel };
  // Mask of the fault signals in its own queue.
  uint64_t queued_faults(Sender sender) const;

  // Detaches it. Tried again, because nothing worse could happen than that a thread stays stopped.
  bool let_go(int signal);
  // Puts registers and mask back if they were disturbed, also when a tape that failed half way has left the thread running, and
  // lets go.
  void release();
  // The first half of that.
  void put_back();

  // ---- it runs -------------------------------------------------------------------------------------------------------

  // Like waitpid(tid, status, WNOHANG), except that an end is only looked at: the supervisor's loop reaps it, and learns from it
  // how the target has ended.
  pid_t take_stop(int* wait_status);
  // Waits for it to stop under ptrace: microseconds as a rule, for ever when it is in an uninterruptible sleep.
  Result<int> wait_for_stop(const Waiting& waiting);
  // Waits for as long as it takes.
  bool wait(int* wait_status);

  // ---- the end -------------------------------------------------------------------------------------------------------

  // As `at_end` says. Nothing more is done to it then.
  void end();
  // It has ended, or been killed, or is left to somebody else: nothing is done to it.
  void forget() { is_owned_ = false; }

  // What was known of it is not true any more: it has run since.
  void forget_state();

 private:
  void kill_and_reap();
  void discard_faults();

  AtEnd at_end_ = AtEnd::kRunsOn;
  bool is_owned_ = false;
  bool runs_ = false;
};

// Threads that have attached themselves belong to the owner of their process. Like waitpid(-1, status, WNOHANG): a stop or an
// end of any of them; and on it goes. The end of those in `not_reaped` is only looked at: their owner ends them by their number.
pid_t take_any_stop(int* wait_status, std::initializer_list<pid_t> not_reaped);
bool let_go_on(pid_t tid);

// Lets some time pass until a traced thread may have stopped; `round` counts the calls. Takes a pending SIGCHLD: whoever waits
// for that signal elsewhere must look at his children afterwards.
void wait_for_child_signal(int round);

}  // namespace vmckpt
