#include "supervisor/patience.h"

#include <cstdlib>

#include <signal.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/fd.h"
#include "core/proc.h"

namespace vmckpt {
namespace {

constexpr int kEndSignals[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT};
constexpr int64_t kLookUs = 500'000;

int64_t limit_us() {
  constexpr double kDefaultSeconds = 60;
  const char* set = std::getenv("VMCKPT_RESTART_PATIENCE_S");
  const double seconds = set != nullptr ? std::atof(set) : 0;
  return static_cast<int64_t>((seconds > 0 ? seconds : kDefaultSeconds) * 1e6);
}

}  // namespace

// One that is blocked becomes pending though it is ignored.
sigset_t end_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  for (int signal : kEndSignals) {
    struct sigaction action {};
    if (::sigaction(signal, nullptr, &action) != 0 || action.sa_handler != SIG_IGN) sigaddset(&signals, signal);
  }
  return signals;
}

int pending_end_signal() {
  const sigset_t ends = end_signals();
  sigset_t pending;
  ::sigpending(&pending);
  for (int signal : kEndSignals) {
    if (::sigismember(&pending, signal) == 1 && ::sigismember(&ends, signal) == 1) return signal;
  }
  return 0;
}

void end_by(int signal) {
  ::signal(signal, SIG_DFL);
  sigset_t one;
  sigemptyset(&one);
  sigaddset(&one, signal);
  ::pthread_sigmask(SIG_UNBLOCK, &one, nullptr);
  ::raise(signal);  // one that somebody ignores for us is no end
  ::_exit(128 + signal);
}

Patience::Patience(pid_t process, Meanwhile& meanwhile)
    : process_(process), meanwhile_(meanwhile), limit_us_(limit_us()), looked_us_(monotonic_us()), moved_us_(looked_us_) {}

// Page faults, processor time and bytes read, of all its threads.
std::string Patience::signs_of_life() const {
  std::string signs;
  auto stat = read_stat(process_);
  for (size_t field : {7, 9, 11, 12}) {  // minflt, majflt, utime, stime
    if (stat.ok() && field < stat->size()) signs += (*stat)[field] + " ";
  }
  if (auto io = read_whole_file(fmt::format("/proc/{}/io", process_)); io.ok()) signs += *io;
  return signs;
}

Result<void> expect_no_end_signal() {
  const int signal = pending_end_signal();
  if (signal == 0) return {};
  return error(fmt::format("ended by signal {} ({}) before the target ran; nothing is left of it", signal, sigabbrev_np(signal)));
}

Result<void> Patience::check() {
  VMCKPT_TRY(expect_no_end_signal());
  VMCKPT_TRY(meanwhile_.check());
  const int64_t now_us = monotonic_us();
  if (now_us - looked_us_ < std::min(kLookUs, limit_us_)) return {};
  looked_us_ = now_us;
  std::string signs = signs_of_life();
  if (signs != signs_) {
    signs_ = std::move(signs);
    moved_us_ = now_us;
  }
  if (now_us - moved_us_ < limit_us_) return {};
  return error(fmt::format("the new process {} has not moved for {:.0f} s{}", process_, static_cast<double>(limit_us_) / 1e6,
                           describe_wait(process_)),
               "look at what it waits for (a file on a server that does not answer, a lease or lock of another process), and try "
               "again; VMCKPT_RESTART_PATIENCE_S is the number of seconds");
}

Result<void> Patience::wait() {
  sigset_t wanted;
  sigemptyset(&wanted);
  sigaddset(&wanted, SIGCHLD);  // the end signals are left pending, for check() and whoever wants to know later
  constexpr timespec kALittle{0, 20'000'000};
  (void)::sigtimedwait(&wanted, nullptr, &kALittle);
  return check();
}

}  // namespace vmckpt
