#include "supervisor/detach.h"

#include <cstdio>
#include <cstdlib>

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/printable.h"

namespace vmckpt {

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
  pid_t pid = ::fork();
  if (pid < 0) return errno_error("go into the background");
  if (pid == 0) {
    read_end.reset();
    ::setsid();
    return detacher;
  }
  detacher.report_.reset();
  auto said = read_whole_fd(read_end.get(), "the supervisor");
  if (!said.ok() || said->empty()) {
    std::fprintf(stderr, "vmckpt: the supervisor ended before the target ran\n");
    std::_Exit(1);
  }
  bool running = said->front() == 'R';
  std::fputs(said->c_str() + 1, running ? stdout : stderr);
  std::fflush(stdout);
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
