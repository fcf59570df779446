#include "supervisor/detach.h"

#include <cstdio>
#include <cstdlib>

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/printable.h"
#include "supervisor/patience.h"

namespace vmckpt {
namespace {

// Until the supervisor says how it went, or is gone. The signal that somebody has sent meanwhile, 0: none.
int pass_signals_on(pid_t supervisor, int report, const Fd& signals) {
  int passed_on = 0;
  pollfd both[2] = {{report, POLLIN, 0}, {signals.get(), POLLIN, 0}};
  while (both[0].revents == 0) {
    if (::poll(both, 2, -1) < 0 && errno != EINTR) break;
    signalfd_siginfo signal{};
    if ((both[1].revents & POLLIN) == 0 || ::read(signals.get(), &signal, sizeof signal) != sizeof signal) continue;
    passed_on = static_cast<int>(signal.ssi_signo);
    ::kill(supervisor, passed_on);
  }
  return passed_on;
}

}  // namespace

Result<Detacher> Detacher::detach(bool wanted) {
  Detacher detacher;
  if (!wanted) return detacher;
  // A standard descriptor that is closed would be taken by the first file that is opened.
  for (int fd = 0; fd < 3; ++fd) {
    if (::fcntl(fd, F_GETFD) >= 0) continue;
    const int null = ::open("/dev/null", O_RDWR);  // the lowest number that is free: fd
    if (null > fd) ::close(null);
  }
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return errno_error("make a pipe");
  Fd read_end(ends[0]);
  detacher.report_ = Fd(ends[1]);
  const sigset_t signals_of_end = end_signals();
  const Fd signals(::signalfd(-1, &signals_of_end, SFD_CLOEXEC));
  if (!signals) return errno_error("make a signalfd");
  sigset_t before;
  ::pthread_sigmask(SIG_BLOCK, &signals_of_end, &before);
  pid_t pid = ::fork();
  if (pid < 0) return errno_error("go into the background");
  if (pid == 0) {
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    read_end.reset();
    ::setsid();
    return detacher;
  }
  detacher.report_.reset();
  const int passed_on = pass_signals_on(pid, read_end.get(), signals);
  auto said = read_whole_fd(read_end.get(), "the supervisor");
  const bool silent = !said.ok() || said->empty(), running = !silent && said->front() == 'R';
  if (!silent) std::fputs(said->c_str() + 1, running ? stdout : stderr);
  else if (passed_on == 0) std::fprintf(stderr, "vmckpt: the supervisor ended before the target ran\n");
  std::fflush(stdout);
  if (!running && passed_on != 0) end_by(passed_on);
  std::_Exit(running ? 0 : 1);
}

void Detacher::report_running(const std::string& text) {
  if (!report_) {
    return;
  }
  std::string message = "R" + text;
  (void)!::write(report_.get(), message.data(), message.size());
  report_.reset();
  // The target has its own standard descriptors; the supervisor must not keep the caller's pipes open.
  int null = ::open("/dev/null", O_RDWR);
  for (int fd = 0; fd < 3; ++fd) ::dup2(null, fd);
  if (null > 2) ::close(null);
}

void Detacher::report_failure(const std::string& message) {
  if (!report_) {
    std::fprintf(stderr, "%s\n", printable_message(message).c_str());
    return;
  }
  std::string text = "F" + printable_message(message) + "\n";
  (void)!::write(report_.get(), text.data(), text.size());
}

}  // namespace vmckpt
