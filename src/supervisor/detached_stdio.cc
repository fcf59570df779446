#include "supervisor/detached_stdio.h"

#include <array>
#include <cstdlib>

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>

#include "supervisor/control_socket.h"

namespace vmckpt {
namespace {

struct Terminal {
  Fd master;
  Fd slave;
};

// With the modes and the size of the caller's terminal, where there is one at `like`.
Result<Terminal> make_terminal(int like) {
  Terminal terminal;
  terminal.master = Fd(::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK));
  if (!terminal.master || ::unlockpt(terminal.master.get()) != 0) {
    return errno_error("make a terminal for the target", "redirect its input and output to files");
  }
  // Without O_NOCTTY: it becomes the session's terminal, so that Ctrl-C reaches the target. Without O_CLOEXEC: the kernel would
  // keep it in the open file and show it in fdinfo for all its numbers.
  terminal.slave = Fd(::ioctl(terminal.master.get(), TIOCGPTPEER, O_RDWR));
  if (!terminal.slave) return errno_error("open the target's terminal", "redirect its input and output to files");
  (void)::fcntl(terminal.slave.get(), F_SETFD, FD_CLOEXEC);
  termios modes{};
  if (like >= 0 && ::tcgetattr(like, &modes) == 0) (void)::tcsetattr(terminal.slave.get(), TCSANOW, &modes);
  winsize size{24, 80, 0, 0};
  if (like >= 0) (void)::ioctl(like, TIOCGWINSZ, &size);
  (void)::ioctl(terminal.master.get(), TIOCSWINSZ, &size);
  return terminal;
}

Result<void> put_at(int from, int number) {
  if (::dup2(from, number) != number) return errno_error(fmt::format("give the target its descriptor {}", number));
  return {};
}

}  // namespace

Result<std::string> choose_log(const std::string& image_dir, const std::string& name) {
  const std::string beside_images = image_dir + "/" + name + ".log";
  // In a folder that others may change the name could be led elsewhere.
  struct stat folder {};
  const bool own = ::lstat(image_dir.c_str(), &folder) == 0 && S_ISDIR(folder.st_mode) && (folder.st_mode & 022) == 0 &&
                   (folder.st_uid == ::geteuid() || folder.st_uid == 0);
  auto log = own ? open_log(beside_images) : error(image_dir + " is not a directory of yours that only you may write to");
  if (log.ok()) return beside_images;
  auto directory = runtime_directory();
  if (!directory.ok()) return log.error();
  const std::string with_sockets = *directory + "/" + name + ".log";
  VMCKPT_TRY(open_log(with_sockets));
  return with_sockets;
}

Result<Fd> open_log(const std::string& path) {
  auto fd = open_file(path, O_WRONLY | O_APPEND | O_CREAT | O_NOFOLLOW | O_NONBLOCK, 0600);
  if (!fd.ok()) return error(fmt::format("open the target's log: {}", fd.error().message()), "redirect its output to a file");
  // Somebody else's file, or one that others may write to or have another name for, is not a place for what the target says.
  struct stat info {};
  const bool own = ::fstat(fd->get(), &info) == 0 && S_ISREG(info.st_mode) && info.st_uid == ::geteuid() && info.st_nlink == 1 &&
                   (info.st_mode & 022) == 0;
  if (!own)
    return error(path + " is not a file of yours that only you may write to", "remove it, or redirect the output to a file");
  return fd;
}

Result<DetachedStdio> take_detached_stdio(const std::string& image_dir, const std::string& name, bool always_terminal) {
  DetachedStdio stdio;
  std::array<bool, 3> on_terminal{}, to_log{};
  int like = -1;
  for (int fd = 0; fd < 3; ++fd) {
    struct stat info {};
    const bool open = ::fstat(fd, &info) == 0;
    const auto number = static_cast<size_t>(fd);
    if (open && ::isatty(fd) && like < 0) like = fd;
    on_terminal[number] = always_terminal || (open && ::isatty(fd));
    to_log[number] = fd != 0 && !on_terminal[number] && (!open || S_ISFIFO(info.st_mode) || S_ISSOCK(info.st_mode));
    if (fd == 0 && !on_terminal[0] && !(open && S_ISREG(info.st_mode))) {
      Fd null = VMCKPT_TRY(open_file("/dev/null", O_RDWR));
      VMCKPT_TRY(put_at(null.get(), 0));
    }
  }
  Terminal terminal;
  if (on_terminal[0] || on_terminal[1] || on_terminal[2]) terminal = VMCKPT_TRY(make_terminal(like));
  if (terminal.master || to_log[1] || to_log[2]) stdio.log = VMCKPT_TRY(choose_log(image_dir, name));
  Fd log;
  if (to_log[1] || to_log[2]) {
    log = VMCKPT_TRY(open_log(stdio.log));
    (void)::fcntl(log.get(), F_SETFL, O_APPEND);  // O_NONBLOCK was for what might not have been a file
  }
  for (int fd = 0; fd < 3; ++fd) {
    if (on_terminal[static_cast<size_t>(fd)]) VMCKPT_TRY(put_at(terminal.slave.get(), fd));
    if (to_log[static_cast<size_t>(fd)]) VMCKPT_TRY(put_at(log.get(), fd));
  }
  stdio.terminal_master = std::move(terminal.master);
  return stdio;
}

}  // namespace vmckpt
