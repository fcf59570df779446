// A terminal cannot be peeked at: reading takes bytes out. In a raw terminal bytes pass unchanged, so they can be read and
// written again from the other side, which leaves both queues as they were. This is done only if nothing can go wrong on
// the way: both sides are in the target (nobody outside writes in between), neither is in packet mode, both can be written
// to now. The whole exchange is a few system calls of the supervisor within the pause; it is the one place where a
// checkpoint touches a queue of the running program, and a supervisor killed between the read and the write would lose
// those bytes.
//
// In cooked mode input has been edited, echoed and cut into lines; writing it again would do that twice. It is left where it
// is and noted. Sources: termios(3), drivers/tty/n_tty.c, drivers/tty/pty.c.
#include "modules/terminal_content.h"

#include <asm/termbits.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <unistd.h>

namespace vmckpt {
namespace {

constexpr size_t kMaxContentBytes = size_t{64} << 10;  // more than a terminal holds: one that fills as fast as it is read
constexpr int kWriteTimeoutMs = 1000;

bool passes_unchanged(int fd) {
  termios2 settings{};
  if (::ioctl(fd, TCGETS2, &settings) != 0) return false;
  constexpr tcflag_t kInput = ISTRIP | INLCR | IGNCR | ICRNL | IUCLC | IXON | IXOFF | PARMRK;
  constexpr tcflag_t kLocal = ICANON | ISIG | ECHO | ECHONL | IEXTEN;
  return (settings.c_iflag & kInput) == 0 && (settings.c_lflag & kLocal) == 0 && (settings.c_oflag & OPOST) == 0;
}

bool is_ready(int fd, short event, int timeout_ms = 0) {
  pollfd ask{fd, event, 0};
  return ::poll(&ask, 1, timeout_ms) == 1 && (ask.revents & event) != 0;
}

int unread_bytes(int fd) {
  int bytes = 0;
  return ::ioctl(fd, FIONREAD, &bytes) == 0 ? bytes : 0;
}

// Never blocks: poll first lets the kernel hand over everything that is still on its way.
Result<std::string> drain(int fd) {
  std::string content;
  char part[4096];
  while (content.size() < kMaxContentBytes && is_ready(fd, POLLIN) && unread_bytes(fd) > 0) {
    ssize_t got = ::read(fd, part, sizeof part);
    if (got <= 0) break;
    content.append(part, static_cast<size_t>(got));
  }
  return content;
}

Result<void> write_through(int fd, const std::string& content) {
  for (size_t written = 0; written < content.size();) {
    if (!is_ready(fd, POLLOUT, kWriteTimeoutMs)) return error("a terminal does not take back its own content");
    // Small parts, for the descriptor may be a blocking one: what poll has promised room for does not block.
    ssize_t put = ::write(fd, content.data() + written, std::min<size_t>(content.size() - written, 256));
    if (put < 0 && errno != EAGAIN && errno != EINTR) return errno_error("write a terminal's content back");
    if (put > 0) written += static_cast<size_t>(put);
  }
  return {};
}

Result<std::string> copy_by_passing_again(int reader, int writer) {
  std::string content = VMCKPT_TRY(drain(reader));
  VMCKPT_TRY(write_through(writer, content));
  return content;
}

}  // namespace

Result<void> save_terminal_content(SaveContext& context, int master, int slave, pb::Terminal* terminal) {
  bool to_slave = is_ready(slave, POLLIN), to_master = is_ready(master, POLLIN);
  if (!to_slave && !to_master) return {};
  bool possible = !terminal->packet_mode() && passes_unchanged(slave) && is_ready(master, POLLOUT) && is_ready(slave, POLLOUT);
  if (!possible) {
    context.note(fmt::format("terminal {} has {} bytes of input and {} bytes of output that the program has not read; they are "
                             "not in the image",
                             terminal->path(), unread_bytes(slave), unread_bytes(master)));
    return {};
  }
  if (to_slave) terminal->set_to_slave(VMCKPT_TRY(copy_by_passing_again(slave, master)));
  if (to_master) terminal->set_to_master(VMCKPT_TRY(copy_by_passing_again(master, slave)));
  return {};
}

Result<void> restore_terminal_content(const pb::Terminal& terminal, int master, int slave) {
  VMCKPT_TRY(write_through(master, terminal.to_slave()));
  return write_through(slave, terminal.to_master());
}

}  // namespace vmckpt
