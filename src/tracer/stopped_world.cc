#include "tracer/stopped_world.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <set>
#include <utility>

#include <dirent.h>
#include <sched.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/proc.h"
#include "tracer/interrupted_calls.h"
#include "tracer/thread_state.h"

namespace vmckpt {
namespace {

// A thread that the kernel runs in the process and that never was in user mode (arch/x86/kernel/process.c, copy_thread, of a
// user worker): KVM has one per VM since Linux 6.15, to break up huge pages. It belongs to the object it serves.
bool is_kernel_worker(const StoppedThread& thread) { return thread.regs.rip == 0 && thread.regs.rsp == 0; }

// Reads the state of a thread that has just stopped, and repairs its interrupted call at once: should this process be killed
// from now on, the kernel detaches the thread as it is.
Result<void> take_state(StoppedThread& thread, InterruptedCalls& interrupted) {
  VMCKPT_TRY(read_thread_state(thread));
  if (is_kernel_worker(thread)) return {};
  if (interrupted.after_stop(thread)) thread.disturbed = !write_registers(thread).ok();
  return {};
}

// Lets go of a thread that has stopped too late for its freeze.
bool let_go_late(Tracee thread, int wait_status, InterruptedCalls& interrupted) {
  if (!WIFSTOPPED(wait_status)) {
    thread.forget();
    return false;
  }
  const int signal = wait_status >> 16 == 0 ? WSTOPSIG(wait_status) : 0;  // one that was being delivered
  thread.forget_state();
  if (take_state(thread, interrupted).ok() && thread.disturbed) thread.put_back();
  return thread.let_go(signal);
}

// Threads that are traced by us while the freeze is being built; detached again unless the freeze succeeds.
class FreezeInProgress {
 public:
  FreezeInProgress(pid_t pid, const Waiting& waiting, InterruptedCalls& interrupted)
      : pid_(pid), waiting_(waiting), interrupted_(interrupted) {}
  ~FreezeInProgress() {
    stopped_.clear();
    release_running();
  }

  Result<void> stop_all() {
    for (int stable = 0; stable < 2;) {
      bool news = VMCKPT_TRY(seize_new_threads());
      for (pid_t tid : running()) VMCKPT_TRY(collect(tid));
      stable = news ? 0 : stable + 1;
    }
    if (stopped_.count(pid_)) return {};
    if (stopped_.empty()) return error(fmt::format("process {} ended while it was being stopped", pid_));
    return error(fmt::format("the main thread of process {} has ended, while others run on", pid_),
                 "programs that end their main thread alone cannot be checkpointed");
  }

  // Threads that are stopped and traced by us already run on, and are part of this freeze.
  Result<void> let_run(std::vector<Tracee>& threads) {
    for (Tracee& thread : threads) running_.emplace(thread.tid, std::move(thread));
    threads.clear();
    for (auto& [tid, thread] : running_) thread.forget_state();
    for (auto& [tid, thread] : running_) {
      if (!thread.go_on() && errno != ESRCH) return errno_error(fmt::format("continue thread {}", tid));
    }
    return {};
  }

  // Signals that they get meanwhile, and ends.
  Result<void> serve_running() {
    for (pid_t tid : running()) {
      Tracee& thread = running_.at(tid);
      int status = 0;
      if (thread.take_stop(&status) != tid) continue;
      if (!WIFSTOPPED(status)) {
        has_ended(tid);
        continue;
      }
      const int signal = status >> 16 == 0 ? WSTOPSIG(status) : 0;
      if (!thread.go_on(signal) && errno != ESRCH) return errno_error(fmt::format("continue thread {}", tid));
    }
    return {};
  }

  void interrupt_running() {
    for (auto& [tid, thread] : running_) thread.interrupt();
  }

  Result<Tracee> repeat_call(Tracee& thread, const user_regs_struct& regs) {
    const pid_t tid = thread.tid, tid_in_target = thread.tid_in_target;
    if (!thread.set_registers(regs)) return errno_error(fmt::format("set registers of thread {}", tid));
    if (!thread.go_on_to_system_call()) return errno_error(fmt::format("continue thread {}", tid));
    Tracee& running = running_.emplace(tid, std::move(thread)).first->second;
    running.forget_state();
    const int status = VMCKPT_TRY(running.wait_for_stop(waiting_));
    if (WIFSTOPPED(status)) {
      constexpr int kSystemCall = SIGTRAP | 0x80;  // PTRACE_O_TRACESYSGOOD
      const bool is_signal = status >> 16 == 0 && WSTOPSIG(status) != kSystemCall;
      if (!running.interrupt()) return errno_error(fmt::format("interrupt thread {}", tid));
      if (!running.go_on(is_signal ? WSTOPSIG(status) : 0)) return errno_error(fmt::format("continue thread {}", tid));
      VMCKPT_TRY(collect(tid));
    }
    auto found = stopped_.find(tid);
    if (found == stopped_.end()) return error(fmt::format("thread {} ended during the checkpoint", tid));
    Tracee again = std::move(found->second);
    stopped_.erase(found);
    again.tid_in_target = tid_in_target;
    return again;
  }

  std::vector<Tracee> take() {
    std::vector<Tracee> threads;
    threads.reserve(stopped_.size());
    threads.push_back(std::move(stopped_.at(pid_)));
    for (auto& [tid, thread] : stopped_) {
      if (tid != pid_) threads.push_back(std::move(thread));
    }
    stopped_.clear();
    return threads;
  }

 private:
  // A copy: what is done to one may take it out.
  std::vector<pid_t> running() const {
    std::vector<pid_t> tids;
    for (const auto& [tid, thread] : running_) tids.push_back(tid);
    return tids;
  }

  void has_ended(pid_t tid) {
    running_.at(tid).forget();
    running_.erase(tid);
  }

  Result<bool> seize_new_threads() {
    bool news = false;
    for (pid_t tid : VMCKPT_TRY(list_threads(pid_))) {
      if (running_.count(tid) || stopped_.count(tid) || workers_.count(tid)) continue;
      if (!VMCKPT_TRY(seize(tid))) continue;
      news = true;
      if (running_.at(tid).interrupt()) continue;
      const int err = errno;
      if (err == ESRCH && life_of_thread(pid_, tid) != ThreadLife::kRuns) continue;
      errno = err;
      return errno_error(fmt::format("interrupt thread {}", tid));
    }
    return news;
  }

  // False when the thread has ended; the kernel may also answer EPERM then, and already while it is inside exit(2). There it
  // still writes into the target's memory (its robust list, its clear_child_tid), so its end is waited for.
  Result<bool> seize(pid_t tid) {
    Tracee thread(tid);
    if (thread.seize(PTRACE_O_TRACESYSGOOD)) {
      running_.emplace(tid, std::move(thread));
      return true;
    }
    const int err = errno;
    if (err == ESRCH) return false;
    if (err == EPERM) {
      ThreadLife life;
      while ((life = life_of_thread(pid_, tid)) == ThreadLife::kEnding && !waiting_.is_over()) ::sched_yield();
      if (life == ThreadLife::kEnded) return false;
    }
    return why_seize_failed(tid, err);
  }

  Error why_seize_failed(pid_t tid, int err) {
    if (pid_t tracer = tracer_of(tid); tracer != 0) {
      return error(fmt::format("process {} is traced by a debugger, process {} ({})", pid_, tracer, command_of(tracer)),
                   "detach it first");
    }
    errno = err;
    return errno_error(fmt::format("attach to thread {} of process {}", tid, pid_),
                       "see `vmckpt doctor`: another user's process, a set-uid program, or Yama's ptrace_scope forbid it");
  }

  // Waits until `tid` is in the stop that PTRACE_INTERRUPT asked for and takes its state.
  Result<void> collect(pid_t tid) {
    Tracee& running = running_.at(tid);
    for (;;) {
      int status = VMCKPT_TRY(running.wait_for_stop(waiting_));
      if (WIFEXITED(status) || WIFSIGNALED(status)) {
        has_ended(tid);
        return {};
      }
      if (status >> 16 == PTRACE_EVENT_STOP) {
        Tracee thread = std::move(running);
        running_.erase(tid);
        int signal = WSTOPSIG(status);
        thread.group_stopped = signal != SIGTRAP;
        thread.stop_signal = thread.group_stopped ? signal : 0;
        auto taken = take_state(thread, interrupted_);
        if (taken.ok() && !is_kernel_worker(thread)) {
          stopped_.emplace(tid, std::move(thread));
          return {};
        }
        if (taken.ok()) workers_.insert(tid);
        let_go_late(std::move(thread), status, interrupted_);
        return taken;
      }
      // A signal got there first: deliver it; the interrupt is still pending and stops the thread before its handler runs.
      int signal = status >> 16 == 0 ? WSTOPSIG(status) : 0;
      if (!running.go_on(signal) && errno != ESRCH) {
        Error failure = errno_error(fmt::format("continue thread {}", tid));
        running.let_go(signal);
        running_.erase(tid);
        return failure;
      }
    }
  }

  // Threads that were asked to stop but have not: they can only be detached once they stop, so wait for them a little longer.
  // Whoever sleeps uninterruptibly is let go of when it wakes (release_late). Asked again: the first time may have failed.
  void release_running() {
    interrupt_running();
    const Waiting a_little_longer = Waiting::up_to(200'000);
    for (auto& [tid, thread] : running_) {
      if (auto status = thread.wait_for_stop(a_little_longer); status.ok()) let_go_late(std::move(thread), *status, interrupted_);
      else thread.forget();
    }
  }

  pid_t pid_;
  Waiting waiting_;
  InterruptedCalls& interrupted_;
  std::map<pid_t, Tracee> running_;  // attached, not yet seen to stop
  std::set<pid_t> workers_;
  std::map<pid_t, Tracee> stopped_;  // in the stop we asked for
};

Result<void> number_threads_as_the_target_does(pid_t pid, std::vector<Tracee>& threads) {
  StatusFields leader = VMCKPT_TRY(read_status(pid));
  const bool same_namespace = split_words(status_field(leader, "NSpid")).size() == 1;
  for (StoppedThread& thread : threads) {
    thread.tid_in_target = thread.tid;
    if (same_namespace) continue;
    StatusFields status = VMCKPT_TRY(read_status(pid, thread.tid));
    thread.tid_in_target = static_cast<pid_t>(status_innermost(status, "NSpid"));
  }
  return {};
}

}  // namespace

Result<StoppedWorld> freeze(pid_t pid, const Waiting& waiting, InterruptedCalls& interrupted) {
  StoppedWorld world;
  world.pid_ = pid;
  world.pidfd_ = Fd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  if (!world.pidfd_) return errno_error(fmt::format("open process {}", pid));
  FreezeInProgress progress(pid, waiting, interrupted);
  VMCKPT_TRY(progress.stop_all());
  world.threads_ = progress.take();
  interrupted.keep_only(world.threads_);
  VMCKPT_TRY(number_threads_as_the_target_does(pid, world.threads_));
  return world;
}

Result<StoppedWorld> freeze_later(StoppedWorld world, const std::function<Result<bool>()>& is_enough, const Waiting& waiting,
                                  InterruptedCalls& interrupted) {
  FreezeInProgress progress(world.pid_, waiting, interrupted);
  VMCKPT_TRY(progress.let_run(world.threads_));
  while (!waiting.is_over() && !VMCKPT_TRY(is_enough())) VMCKPT_TRY(progress.serve_running());
  progress.interrupt_running();
  VMCKPT_TRY(progress.stop_all());
  world.threads_ = progress.take();
  interrupted.keep_only(world.threads_);
  VMCKPT_TRY(number_threads_as_the_target_does(world.pid_, world.threads_));
  return world;
}

Result<void> repeat_call(StoppedWorld& world, Tracee& thread, const user_regs_struct& regs, const Waiting& waiting,
                         InterruptedCalls& interrupted) {
  FreezeInProgress progress(world.pid(), waiting, interrupted);
  thread.disturbed = true;
  thread = VMCKPT_TRY(progress.repeat_call(thread, regs));
  return {};
}

StoppedWorld::StoppedWorld(StoppedWorld&& other) noexcept
    : pid_(other.pid_), pidfd_(std::move(other.pidfd_)), threads_(std::move(other.threads_)) {
  other.threads_.clear();
}

StoppedWorld::~StoppedWorld() { resume(); }

Result<Fd> StoppedWorld::duplicate_fd(int target_fd) const {
  int fd = static_cast<int>(::syscall(SYS_pidfd_getfd, pidfd_.get(), target_fd, 0));
  if (fd < 0) return errno_error(fmt::format("duplicate descriptor {} of process {}", target_fd, pid_));
  return Fd(fd);
}

bool release_late(pid_t tid, int wait_status, InterruptedCalls& interrupted) {
  return let_go_late(Tracee(tid), wait_status, interrupted);
}

void StoppedWorld::resume() {
  // The leader last: when it goes on, the program as a whole does.
  for (auto thread = threads_.rbegin(); thread != threads_.rend(); ++thread) thread->release();
  threads_.clear();
}

void StoppedWorld::abandon() {
  for (Tracee& thread : threads_) thread.forget();
  threads_.clear();
}

}  // namespace vmckpt
