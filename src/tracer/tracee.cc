#include "tracer/tracee.h"

#include <algorithm>
#include <iterator>

#include <sched.h>
#include <sys/ptrace.h>
#include <sys/wait.h>

#include "core/clock.h"
#include "core/proc.h"
#include "tracer/thread_state.h"

namespace vmckpt {

bool is_end(const siginfo_t& told) {
  return told.si_code == CLD_EXITED || told.si_code == CLD_KILLED || told.si_code == CLD_DUMPED;
}

int signal_being_delivered(int wait_status) {
  constexpr int kSystemCall = SIGTRAP | 0x80;  // PTRACE_O_TRACESYSGOOD
  if (wait_status >> 16 != 0 || WSTOPSIG(wait_status) == kSystemCall) return 0;
  return WSTOPSIG(wait_status);
}

bool is_fault(int signal) {
  return std::find(std::begin(kFaultSignals), std::end(kFaultSignals), signal) != std::end(kFaultSignals);
}

Tracee::Tracee(pid_t task, AtEnd at_end) : at_end_(at_end), is_owned_(true) { tid = task; }

Tracee::Tracee(Tracee&& other) noexcept
    : StoppedThread(std::move(other)),
      at_end_(other.at_end_),
      is_owned_(std::exchange(other.is_owned_, false)),
      runs_(other.runs_) {}

Tracee& Tracee::operator=(Tracee&& other) noexcept {
  if (this == &other) return *this;
  end();
  StoppedThread::operator=(std::move(other));
  at_end_ = other.at_end_;
  is_owned_ = std::exchange(other.is_owned_, false);
  runs_ = other.runs_;
  return *this;
}

bool Tracee::seize(int options) {
  if (::ptrace(PTRACE_SEIZE, tid, 0, options) == 0) {
    runs_ = true;
    return true;
  }
  if (at_end_ == AtEnd::kRunsOn) forget();
  return false;
}

bool Tracee::set_options(int options) { return ::ptrace(PTRACE_SETOPTIONS, tid, 0, options) == 0; }

bool Tracee::interrupt() { return ::ptrace(PTRACE_INTERRUPT, tid, 0, 0) == 0; }

bool Tracee::go_on(int signal) {
  if (::ptrace(PTRACE_CONT, tid, 0, signal) != 0) return false;
  runs_ = true;
  return true;
}

bool Tracee::go_on_to_system_call() {
  if (::ptrace(PTRACE_SYSCALL, tid, 0, 0) != 0) return false;
  runs_ = true;
  return true;
}

bool Tracee::get_registers(user_regs_struct* registers) const { return ::ptrace(PTRACE_GETREGS, tid, 0, registers) == 0; }

bool Tracee::set_registers(const user_regs_struct& registers) { return ::ptrace(PTRACE_SETREGS, tid, 0, &registers) == 0; }

bool Tracee::set_signal_mask(uint64_t mask) { return ::ptrace(PTRACE_SETSIGMASK, tid, sizeof mask, &mask) == 0; }

bool Tracee::get_signal(siginfo_t* signal) const { return ::ptrace(PTRACE_GETSIGINFO, tid, 0, signal) == 0; }

bool Tracee::get_event_message(unsigned long* message) const { return ::ptrace(PTRACE_GETEVENTMSG, tid, 0, message) == 0; }

uint64_t Tracee::queued_faults(Sender sender) const {
  constexpr size_t kAtOnce = 32;
  uint64_t found = 0;
  siginfo_t queued[kAtOnce];
  for (__ptrace_peeksiginfo_args from{0, 0, kAtOnce};; from.off += kAtOnce) {
    const long got = ::ptrace(PTRACE_PEEKSIGINFO, tid, &from, queued);
    for (long i = 0; i < got; ++i) {
      if (is_fault(queued[i].si_signo) && (sender == Sender::kAnyone || queued[i].si_code > 0)) {
        found |= uint64_t{1} << (queued[i].si_signo - 1);
      }
    }
    if (got < static_cast<long>(kAtOnce)) return found;
  }
}

bool Tracee::let_go(int signal) {
  forget();
  for (int tries = 0; tries < 3; ++tries) {
    if (::ptrace(PTRACE_DETACH, tid, 0, signal) == 0) return true;
  }
  return false;
}

namespace {

constexpr int64_t kPatienceUs = 300'000;

// As waitpid(2) would tell this end.
int wait_status_of(const siginfo_t& end) {
  return end.si_code == CLD_EXITED ? W_EXITCODE(end.si_status, 0) : W_EXITCODE(0, end.si_status);
}

}  // namespace

// Where it was sent, it may have met a fault at the same moment in which it was interrupted: the stop comes first then, and the
// signal behind it would reach the program with its own registers. (Those of the program itself are blocked while it is
// disturbed.)
void Tracee::discard_faults() {
  constexpr int kTries = 4;
  for (int tries = 0; tries < kTries; ++tries) {
    uint64_t mask = 0;
    if (::ptrace(PTRACE_GETSIGMASK, tid, sizeof mask, &mask) != 0) return;
    if ((queued_faults(Sender::kKernel) & ~mask) == 0) return;
    if (!go_on()) return;  // to where the signal is taken: no instruction comes before it
    auto status = wait_for_stop(Waiting::up_to(kPatienceUs));
    if (!status.ok() || !WIFSTOPPED(*status)) return;
  }
}

void Tracee::put_back() {
  for (int tries = 0; tries < 4; ++tries) {
    if (write_thread_state(*this).ok()) return;
    if (tries == 0) continue;
    interrupt();
    auto status = wait_for_stop(Waiting::up_to(kPatienceUs));
    if (status.ok() && !WIFSTOPPED(*status)) return;  // it has been killed
    discard_faults();
  }
  (void)write_thread_state(*this);  // it may have stopped at last
}

void Tracee::release() {
  if (!is_owned_) return;
  // A stop signal that came while a tape was playing is delivered now; one that had stopped the thread before still holds.
  int signal = group_stopped ? 0 : stop_signal;
  if (disturbed) {
    put_back();
  } else if (runs_) {  // only what stands can be detached
    interrupt();
    auto status = wait_for_stop(Waiting::up_to(kPatienceUs));
    if (status.ok() && WIFSTOPPED(*status)) signal = signal_being_delivered(*status);
  }
  let_go(signal);
}

pid_t Tracee::take_stop(int* wait_status) {
  siginfo_t seen{};
  while (::waitid(P_PID, static_cast<id_t>(tid), &seen, WSTOPPED | WEXITED | WNOHANG | WNOWAIT | __WALL) != 0) {
    if (errno != EINTR) return -1;
  }
  if (seen.si_pid == 0) return 0;
  if (is_end(seen)) {
    *wait_status = wait_status_of(seen);
    return tid;
  }
  const pid_t got = ::waitpid(tid, wait_status, __WALL | WNOHANG);
  if (got == tid && WIFSTOPPED(*wait_status)) runs_ = false;
  return got;
}

Result<int> Tracee::wait_for_stop(const Waiting& waiting) {
  for (int round = 0;; ++round) {
    int status = 0;
    pid_t got = take_stop(&status);
    if (got == tid) return status;
    if (got < 0 && errno != EINTR) return errno_error(fmt::format("wait for thread {}", tid));
    if (waiting.is_over()) {
      return error(fmt::format("thread {} does not stop{}", tid, describe_wait(tid)),
                   "it is probably waiting for a device or a network file system; try again later");
    }
    constexpr int kUsualRounds = 8;  // some milliseconds
    if (round > kUsualRounds) VMCKPT_TRY(waiting.check());
    wait_for_child_signal(round);
  }
}

bool Tracee::wait(int* wait_status) {
  if (::waitpid(tid, wait_status, __WALL) != tid) return false;
  if (WIFSTOPPED(*wait_status)) runs_ = false;
  return true;
}

void Tracee::end() {
  if (!is_owned_) return;
  if (at_end_ == AtEnd::kRunsOn) release();
  else kill_and_reap();
}

void Tracee::kill_and_reap() {
  forget();
  ::kill(tid, SIGKILL);  // a zombie, at worst: nobody else reaps it
  // A process's threads are traced, and must be reaped before it can be.
  const pid_t whom = at_end_ == AtEnd::kDiesWithThreads ? -1 : tid;
  for (int status = 0;;) {
    const pid_t got = ::waitpid(whom, &status, __WALL);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) break;
    // Stops that ptrace reports may come before the end.
    if (got == tid && (WIFSIGNALED(status) || WIFEXITED(status))) break;
  }
}

void Tracee::forget_state() {
  const pid_t same = tid;
  static_cast<StoppedThread&>(*this) = {};
  tid = same;
}

pid_t take_any_stop(int* wait_status, std::initializer_list<pid_t> not_reaped) {
  siginfo_t seen{};
  if (::waitid(P_ALL, 0, &seen, WSTOPPED | WEXITED | WNOHANG | WNOWAIT | __WALL) != 0) return -1;
  if (seen.si_pid == 0) return 0;
  if (is_end(seen) && std::find(not_reaped.begin(), not_reaped.end(), seen.si_pid) != not_reaped.end()) {
    *wait_status = wait_status_of(seen);
    return seen.si_pid;
  }
  return ::waitpid(seen.si_pid, wait_status, WNOHANG | __WALL);
}

bool let_go_on(pid_t tid) { return ::ptrace(PTRACE_CONT, tid, 0, 0) == 0; }

void wait_for_child_signal(int round) {
  if (round < 2) {
    ::sched_yield();
    return;
  }
  // Spinning longer would take the processor from the very thread that is waited for. The supervisor has SIGCHLD blocked; where
  // it is not (unit tests), this is a short sleep.
  sigset_t child;
  sigemptyset(&child);
  sigaddset(&child, SIGCHLD);
  constexpr timespec kAtMost{0, 1'000'000};
  ::sigtimedwait(&child, nullptr, &kAtMost);
}

}  // namespace vmckpt
