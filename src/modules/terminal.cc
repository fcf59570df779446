// Terminals: pseudo terminals (a master and any number of slave files), serial lines, and /dev/tty.
//
// Made by opening /dev/ptmx and the slave; changed by tcsetattr, TIOCSWINSZ, TIOCSPTLCK, TIOCPKT and others. Saved per
// terminal: termios, window size, lock, packet mode, exclusive mode, line discipline, owner and mode of the slave's file,
// and in raw mode the bytes on their way (see below).
//
//   inside   the master is in this process: a fresh pseudo terminal, with the old number if it is free (numbers in
//            between are taken for a moment, since the kernel gives out the lowest)
//   outside  the terminal the target was run from (it is the controlling terminal, or at 0 to 2): restart's own
//            terminal takes its place, opened again so that access mode and flags are the target's, and gets the saved
//            termios; its size stays what it is. When restart has no terminal, a fresh one whose master
//            DescriptorRestore hands out
//   other    a pseudo terminal whose master belongs to somebody else: a fresh one that is hung up; noted
//   device   a serial line: opened again by its path, with the saved termios
//
// Restored: master, slaves, then settings, then lock and exclusive mode, which would forbid opening; the controlling
// terminal before /dev/tty, which only then can be opened. tcsetattr on restart's terminal from a background process
// group would stop the process with SIGTTOU: that is blocked meanwhile.
//
// Content. A terminal cannot be peeked at: reading takes bytes out. In a raw terminal bytes pass unchanged, so they can
// be read and written again from the other side, which leaves both queues as they were. This is done only if nothing
// can go wrong on the way: both sides are in the target (nobody outside writes in between), neither is in packet mode,
// both can be written to now. The whole exchange is a few system calls of the supervisor within the pause; it is the
// one place where a checkpoint touches a queue of the running program, and a supervisor killed between the read and the
// write would lose those bytes.
//
// In cooked mode input has been edited, echoed and cut into lines; writing it again would do that twice. It is left
// where it is and noted.
//
// Sources: pty(7), ioctl_tty(2), termios(3), drivers/tty/n_tty.c and pty.c; TIOCGPTPEER: Linux 4.13.
#include <algorithm>
#include <csignal>

#include <asm/termbits.h>
#include <linux/tty.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "core/proc.h"
#include "modules/descriptor_module.h"
#include "modules/terminal.pb.h"

namespace vmckpt {
namespace {

constexpr unsigned kTtyMajor = 4, kTtyAuxMajor = 5;
constexpr unsigned kFirstPtsMajor = 136, kLastPtsMajor = 143;
constexpr unsigned kPtsPerMajor = 256;
constexpr unsigned kMaxTakenNumbers = 4096;  // beyond that the old number of a pseudo terminal is not waited for

bool is_ptmx(uint64_t device) { return major(device) == kTtyAuxMajor && minor(device) == 2; }
bool is_dev_tty(uint64_t device) { return major(device) == kTtyAuxMajor && minor(device) == 0; }
bool is_pts(uint64_t device) { return major(device) >= kFirstPtsMajor && major(device) <= kLastPtsMajor; }
unsigned pts_index(uint64_t device) { return minor(device) + (major(device) - kFirstPtsMajor) * kPtsPerMajor; }

bool is_terminal_major(uint64_t device) {
  constexpr unsigned kSerialMajors[] = {kTtyMajor,        kTtyAuxMajor,     188 /* ttyUSB */,
                                        166 /* ttyACM */, 204 /* ttyAMA */, 229 /* hvc */};
  return is_pts(device) ||
         std::find(std::begin(kSerialMajors), std::end(kSerialMajors), major(device)) != std::end(kSerialMajors);
}

bool recognise(const TargetFile& file) {
  return S_ISCHR(file.status.st_mode) && is_terminal_major(file.status.st_rdev);
}

// The target's controlling terminal as a device number, 0 without one, and whether the target leads the session.
struct Session {
  uint64_t terminal = 0;
  bool leader = false;
};

Session read_session(pid_t pid) {
  auto stat = read_stat(pid);
  if (!stat.ok() || stat->size() < 5) return {};
  auto tty = static_cast<uint32_t>(parse_number((*stat)[4]));  // tty_nr: minor in bits 31-20 and 7-0, major in 15-8
  unsigned tty_minor = (tty & 0xff) | ((tty >> 12) & 0xfff00);
  return {makedev((tty >> 8) & 0xfff, tty_minor), parse_number((*stat)[3]) == pid};
}

pb::Terminal* find_or_add(SaveContext& context, const std::string& path, unsigned index, bool* added) {
  for (pb::Terminal& terminal : *context.objects.MutableRepeatedExtension(pb::terminals)) {
    if (terminal.path() == path) return &terminal;
  }
  pb::Terminal* terminal = context.objects.AddExtension(pb::terminals);
  terminal->set_id(static_cast<uint32_t>(context.objects.ExtensionSize(pb::terminals)));
  terminal->set_path(path);
  terminal->set_index(index);
  *added = true;
  return terminal;
}

std::string pts_path(unsigned index) { return fmt::format("/dev/pts/{}", index); }

// What any file of the terminal can tell. The kernel answers a master about its slave.
Result<void> save_settings(const TargetFile& file, int fd, pb::Terminal* terminal) {
  termios2 settings{};
  winsize size{};
  if (::ioctl(fd, TCGETS2, &settings) != 0) {
    if (errno == EIO) return {};  // hung up: nothing to keep
    return errno_error("read the settings of terminal " + file.describe());
  }
  terminal->set_termios(&settings, sizeof settings);
  if (::ioctl(fd, TIOCGWINSZ, &size) == 0) {
    terminal->set_rows(size.ws_row);
    terminal->set_columns(size.ws_col);
    terminal->set_width_pixels(size.ws_xpixel);
    terminal->set_height_pixels(size.ws_ypixel);
  }
  int discipline = 0, exclusive = 0;
  if (::ioctl(fd, TIOCGETD, &discipline) == 0) terminal->set_line_discipline(static_cast<uint32_t>(discipline));
  if (::ioctl(fd, TIOCGEXCL, &exclusive) == 0 && exclusive != 0) terminal->set_exclusive(true);
  return {};
}

// Who may open the slave by its name: grantpt(3) gives it to the caller, who may be somebody else by now.
void save_owner(const SaveContext& context, pb::Terminal* terminal) {
  struct stat slave;
  std::string path = "root" + terminal->path();
  if (::fstatat(context.proc, path.c_str(), &slave, 0) != 0 || !S_ISCHR(slave.st_mode) || !is_pts(slave.st_rdev) ||
      pts_index(slave.st_rdev) != terminal->index()) {
    return;
  }
  terminal->set_owner_known(true);
  terminal->set_owner(slave.st_uid);
  terminal->set_group(slave.st_gid);
  terminal->set_mode(slave.st_mode & 07777);
}

Result<void> save_master(const SaveContext& context, const TargetFile& file, int fd, pb::Terminal* terminal) {
  int locked = 0, packet_mode = 0;
  if (::ioctl(fd, TIOCGPTLCK, &locked) != 0 || ::ioctl(fd, TIOCGPKT, &packet_mode) != 0) {
    return errno_error("read lock and packet mode of " + file.describe());
  }
  terminal->set_kind(pb::Terminal::INSIDE);
  save_owner(context, terminal);
  terminal->set_locked(locked != 0);
  terminal->set_packet_mode(packet_mode != 0);
  pollfd ask{fd, 0, 0};
  ::poll(&ask, 1, 0);
  terminal->set_slave_hung_up((ask.revents & POLLHUP) != 0);
  return {};
}

// Which terminal and side the file is.
Result<pb::Terminal*> find_terminal(SaveContext& context, const TargetFile& file, int fd, pb::TerminalSide* side,
                                    bool* added) {
  uint64_t device = file.status.st_rdev;
  if (is_ptmx(device)) {
    unsigned index = 0;
    if (::ioctl(fd, TIOCGPTN, &index) != 0) return errno_error("ask for the number of " + file.describe());
    side->set_side(pb::TerminalSide::MASTER);
    return find_or_add(context, pts_path(index), index, added);
  }
  side->set_side(is_dev_tty(device) ? pb::TerminalSide::CONTROLLING : pb::TerminalSide::SLAVE);
  if (is_dev_tty(device)) device = read_session(context.pid()).terminal;
  if (is_pts(device)) return find_or_add(context, pts_path(pts_index(device)), pts_index(device), added);
  return find_or_add(context, file.link, 0, added);
}

Result<void> save(SaveContext& context, const TargetFile& file, int fd, pb::OpenFile* saved) {
  bool added = false;
  pb::TerminalSide* side = saved->MutableExtension(pb::terminal);
  pb::Terminal* terminal = VMCKPT_TRY(find_terminal(context, file, fd, side, &added));
  side->set_terminal_id(terminal->id());
  if (added) {
    VMCKPT_TRY(save_settings(file, fd, terminal));
    *terminal->mutable_origin() = inode_of(fd);
    terminal->set_device_number(file.status.st_rdev);
  }
  if (side->side() == pb::TerminalSide::MASTER) {
    VMCKPT_TRY(save_master(context, file, fd, terminal));
  }
  return {};
}

bool is_at_stdio(const SaveContext& context, const pb::Terminal& terminal) {
  return std::any_of(context.files.begin(), context.files.end(), [&](const TargetFile& file) {
    return file.stdio() >= 0 && file.saved->HasExtension(pb::terminal) &&
           file.saved->GetExtension(pb::terminal).terminal_id() == terminal.id();
  });
}

uint64_t device_of(const SaveContext& context, const pb::Terminal& terminal) {
  for (const TargetFile& file : context.files) {
    if (!file.saved->HasExtension(pb::terminal) || file.saved->GetExtension(pb::terminal).terminal_id() != terminal.id())
      continue;
    if (file.saved->GetExtension(pb::terminal).side() == pb::TerminalSide::SLAVE) return file.status.st_rdev;
  }
  return terminal.path() == pts_path(terminal.index())
             ? makedev(kFirstPtsMajor + terminal.index() / kPtsPerMajor, terminal.index() % kPtsPerMajor)
             : 0;
}

constexpr size_t kMaxContentBytes = 65536;  // more than a terminal holds: one that fills as fast as it is read
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

Result<void> save_content(SaveContext& context, int master, int slave, pb::Terminal* terminal) {
  bool to_slave = is_ready(slave, POLLIN), to_master = is_ready(master, POLLIN);
  if (!to_slave && !to_master) return {};
  bool possible =
      !terminal->packet_mode() && passes_unchanged(slave) && is_ready(master, POLLOUT) && is_ready(slave, POLLOUT);
  if (!possible) {
    context.note(
        fmt::format("terminal {} has {} bytes of input and {} bytes of output that the program has not read; they are "
                    "not in the image",
                    terminal->path(), unread_bytes(slave), unread_bytes(master)));
    return {};
  }
  if (to_slave) terminal->set_to_slave(VMCKPT_TRY(copy_by_passing_again(slave, master)));
  if (to_master) terminal->set_to_master(VMCKPT_TRY(copy_by_passing_again(master, slave)));
  return {};
}

// Input typed ahead at an outside terminal stays there.
Result<void> save_contents(SaveContext& context) {
  struct Sides {
    int master = -1, slave = -1;
  };
  std::vector<Sides> all(static_cast<size_t>(context.objects.ExtensionSize(pb::terminals)));
  for (const TargetFile& file : context.files) {
    if (!file.saved->HasExtension(pb::terminal)) continue;
    const pb::TerminalSide& side = file.saved->GetExtension(pb::terminal);
    int& fd = side.side() == pb::TerminalSide::MASTER ? all[side.terminal_id() - 1].master
                                                      : all[side.terminal_id() - 1].slave;
    // Bytes must be both read and written through it.
    if ((file.flags & O_ACCMODE) == O_RDWR && fd < 0) fd = file.duplicate.get();
  }
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i].master < 0) continue;
    pb::Terminal* terminal = context.objects.MutableExtension(pb::terminals, static_cast<int>(i));
    int unread = 0;
    if (all[i].slave >= 0) {
      VMCKPT_TRY(save_content(context, all[i].master, all[i].slave, terminal));
    } else if (::ioctl(all[i].master, FIONREAD, &unread) == 0 && unread > 0) {
      context.note(
          fmt::format("terminal {} has {} bytes of output that the program has not read; they are not in the image",
                      terminal->path(), unread));
    }
  }
  return {};
}

// Only now is it known whether a terminal's master is inside.
Result<void> save_links(SaveContext& context) {
  if (context.objects.ExtensionSize(pb::terminals) == 0) return {};
  Session session = read_session(context.pid());
  for (pb::Terminal& terminal : *context.objects.MutableRepeatedExtension(pb::terminals)) {
    uint64_t device = device_of(context, terminal);
    bool is_controlling = session.terminal != 0 && (device == session.terminal || device == 0);
    if (terminal.kind() == pb::Terminal::INSIDE) {
      terminal.set_controlling(is_controlling && session.leader);
    } else if (is_controlling || is_at_stdio(context, terminal)) {
      terminal.set_kind(pb::Terminal::OUTSIDE);
    } else if (is_pts(device)) {
      terminal.set_kind(pb::Terminal::OTHER);
      context.note(
          fmt::format("terminal {} belongs to another process; after a restart it is hung up", terminal.path()));
    } else {
      terminal.set_kind(pb::Terminal::DEVICE);
    }
  }
  return save_contents(context);
}

void check(CheckContext& context) {
  for (const pb::Terminal& terminal : context.image.objects().GetRepeatedExtension(pb::terminals)) {
    if (terminal.kind() != pb::Terminal::DEVICE) continue;
    struct stat now;
    auto located = context.access.locate(terminal.path(), 0, terminal.origin());
    if (!located.ok() && located.error().err != ENOENT) {
      context.problem(located.error());
    } else if (!located.ok() || ::fstat(located->get(), &now) != 0 || now.st_rdev != terminal.device_number()) {
      context.problem(error(fmt::format("terminal line \"{}\" is missing", terminal.path()), "connect the device"));
    } else if (!context.access.permits(located->get(), R_OK | W_OK, terminal.origin())) {
      context.problem(errno_error(fmt::format("terminal line \"{}\" may not be opened", terminal.path()),
                                  "restart as a user of group dialout"));
    }
  }
}

// SIGTTOU stays blocked while settings of restart's own terminal are changed.
class BlockSigttou {
 public:
  BlockSigttou() {
    sigset_t ttou;
    sigemptyset(&ttou);
    sigaddset(&ttou, SIGTTOU);
    ::sigprocmask(SIG_BLOCK, &ttou, &before_);
  }
  ~BlockSigttou() { ::sigprocmask(SIG_SETMASK, &before_, nullptr); }
  BlockSigttou(const BlockSigttou&) = delete;
  BlockSigttou& operator=(const BlockSigttou&) = delete;

 private:
  sigset_t before_;
};

Result<void> apply_termios(const pb::Terminal& terminal, int fd) {
  termios2 now{}, wanted{};
  if (terminal.termios().size() != sizeof wanted) return {};
  std::memcpy(&wanted, terminal.termios().data(), sizeof wanted);
  if (::ioctl(fd, TCGETS2, &now) == 0 && std::memcmp(&now, &wanted, sizeof now) == 0) return {};
  BlockSigttou block;
  if (::ioctl(fd, TCSETS2, &wanted) != 0) return errno_error("set up terminal " + terminal.path());
  return {};
}

Result<void> apply_size(const pb::Terminal& terminal, int fd) {
  winsize size{};
  size.ws_row = static_cast<unsigned short>(terminal.rows());
  size.ws_col = static_cast<unsigned short>(terminal.columns());
  size.ws_xpixel = static_cast<unsigned short>(terminal.width_pixels());
  size.ws_ypixel = static_cast<unsigned short>(terminal.height_pixels());
  if (::ioctl(fd, TIOCSWINSZ, &size) != 0) return errno_error("set the window size of terminal " + terminal.path());
  return {};
}

Result<unsigned> index_of(int master) {
  unsigned index = 0;
  if (::ioctl(master, TIOCGPTN, &index) != 0) return errno_error("ask for the number of a pseudo terminal");
  return index;
}

// A master whose slave is `wanted` if that number is free. The kernel gives out the lowest free number.
Result<Fd> open_master(unsigned wanted) {
  std::vector<Fd> lower;
  for (;;) {
    Fd master = VMCKPT_TRY(open_file("/dev/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK));
    unsigned index = VMCKPT_TRY(index_of(master.get()));
    if (index == wanted) return master;
    if (index > wanted || lower.size() >= kMaxTakenNumbers)
      return lower.empty() ? std::move(master) : std::move(lower[0]);
    lower.push_back(std::move(master));
  }
}

Result<Fd> open_slave(int master, int flags) {
  // Without O_CLOEXEC: the kernel would keep it in the open file and show it in fdinfo for all its numbers.
  int fd = ::ioctl(master, TIOCGPTPEER, flags | O_NOCTTY);
  if (fd < 0) return errno_error("open the slave of a pseudo terminal");
  return Fd(fd);
}

struct Pair {
  Fd master;
  Fd slave;  // may be missing; the master answers for it
  int settings_fd() const { return slave ? slave.get() : master.get(); }
};

enum class Slave { kOpened, kUntouched };

// Closing the last slave file hangs the master up, so a slave that nobody inside has open must not be opened at all.
Result<Pair> make_pair_of(const pb::Terminal& terminal, Slave slave) {
  Pair pair;
  pair.master = VMCKPT_TRY(open_master(terminal.index()));
  int unlock = 0;
  if (::ioctl(pair.master.get(), TIOCSPTLCK, &unlock) != 0) return errno_error("unlock a pseudo terminal");
  if (slave == Slave::kOpened) pair.slave = VMCKPT_TRY(open_slave(pair.master.get(), O_RDWR | O_NONBLOCK));
  VMCKPT_TRY(apply_termios(terminal, pair.settings_fd()));
  VMCKPT_TRY(apply_size(terminal, pair.settings_fd()));
  return pair;
}

std::vector<const pb::OpenFile*> sides_of(const RestoreContext& context, const pb::Terminal& terminal,
                                          pb::TerminalSide::Side side) {
  std::vector<const pb::OpenFile*> sides;
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (file.HasExtension(pb::terminal) && file.GetExtension(pb::terminal).terminal_id() == terminal.id() &&
        file.GetExtension(pb::terminal).side() == side) {
      sides.push_back(&file);
    }
  }
  return sides;
}

int open_flags(const pb::OpenFile& file) {
  constexpr uint32_t kLargeFile = 0100000;  // O_LARGEFILE, which libc defines as 0 where it is implied
  return static_cast<int>(file.status_flags() & (O_ACCMODE | O_NONBLOCK | kLargeFile));
}

// Files opened as /dev/tty, and `otherwise` where the process has no such controlling terminal.
Result<void> restore_dev_tty(RestoreContext& context, const pb::Terminal& terminal, int otherwise) {
  for (const pb::OpenFile* file : sides_of(context, terminal, pb::TerminalSide::CONTROLLING)) {
    auto fd = open_file("/dev/tty", open_flags(*file) | O_NOCTTY);
    if (!fd.ok()) fd = reopen(otherwise, open_flags(*file));
    if (!fd.ok()) fd = Fd(::fcntl(otherwise, F_DUPFD_CLOEXEC, context.restore.first_service_fd));
    if (!*fd) return errno_error("open the controlling terminal for " + describe(*file));
    VMCKPT_TRY(context.put(*file, std::move(*fd)));
  }
  return {};
}

Result<void> restore_slaves(RestoreContext& context, const pb::Terminal& terminal, int master) {
  for (const pb::OpenFile* file : sides_of(context, terminal, pb::TerminalSide::SLAVE)) {
    VMCKPT_TRY(context.put(*file, VMCKPT_TRY(open_slave(master, open_flags(*file)))));
  }
  return {};
}

Result<void> restore_modes(const pb::Terminal& terminal, const Pair& pair) {
  int on = 1, discipline = static_cast<int>(terminal.line_discipline());
  if (discipline != N_TTY && ::ioctl(pair.settings_fd(), TIOCSETD, &discipline) != 0) {
    return errno_error(fmt::format("set line discipline {} of terminal {}", discipline, terminal.path()));
  }
  if (terminal.packet_mode() && ::ioctl(pair.master.get(), TIOCPKT, &on) != 0) {
    return errno_error("set packet mode of terminal " + terminal.path());
  }
  if (terminal.exclusive() && pair.slave && ::ioctl(pair.slave.get(), TIOCEXCL) != 0) {
    return errno_error("set exclusive mode of terminal " + terminal.path());
  }
  if (terminal.locked() && ::ioctl(pair.master.get(), TIOCSPTLCK, &on) != 0) {
    return errno_error("lock terminal " + terminal.path());
  }
  return {};
}

Result<void> restore_content(const pb::Terminal& terminal, int master, int slave) {
  VMCKPT_TRY(write_through(master, terminal.to_slave()));
  return write_through(slave, terminal.to_master());
}

// The slave's file may not be opened for this: closing it would hang the master up.
void restore_owner(RestoreContext& context, const pb::Terminal& terminal, unsigned index) {
  struct stat now;
  std::string path = pts_path(index);
  if (!terminal.owner_known() || ::stat(path.c_str(), &now) != 0 || !S_ISCHR(now.st_mode) || !is_pts(now.st_rdev) ||
      pts_index(now.st_rdev) != index) {
    return;
  }
  bool other = now.st_uid != terminal.owner() || now.st_gid != terminal.group();
  if (other && ::chown(path.c_str(), terminal.owner(), terminal.group()) != 0) {
    context.note(fmt::format("pseudo terminal {} belonged to user {} and group {} and belongs to {} and {} now: {}", path,
                             terminal.owner(), terminal.group(), now.st_uid, now.st_gid, std::strerror(errno)));
  }
  if ((now.st_mode & 07777) != terminal.mode()) ::chmod(path.c_str(), terminal.mode());
}

Result<void> restore_inside(RestoreContext& context, const pb::Terminal& terminal) {
  auto masters = sides_of(context, terminal, pb::TerminalSide::MASTER);
  if (masters.size() != 1)
    return error(fmt::format("terminal {} has {} masters in the image", terminal.path(), masters.size()));
  bool slave_inside = terminal.controlling() || !sides_of(context, terminal, pb::TerminalSide::SLAVE).empty() ||
                      !sides_of(context, terminal, pb::TerminalSide::CONTROLLING).empty();
  bool open = slave_inside || terminal.slave_hung_up();  // opened and closed again: hung up
  Pair pair = VMCKPT_TRY(make_pair_of(terminal, open ? Slave::kOpened : Slave::kUntouched));
  unsigned index = VMCKPT_TRY(index_of(pair.master.get()));
  if (index != terminal.index()) {
    context.note(
        fmt::format("pseudo terminal {} is {} now: the old number is in use", terminal.path(), pts_path(index)));
  }
  restore_owner(context, terminal, index);
  VMCKPT_TRY(restore_slaves(context, terminal, pair.master.get()));
  if (terminal.controlling() && ::getsid(0) == ::getpid() && ::ioctl(pair.slave.get(), TIOCSCTTY, 0) != 0) {
    return errno_error(fmt::format("make {} the controlling terminal", pts_path(index)));
  }
  VMCKPT_TRY(restore_dev_tty(context, terminal, pair.slave.get()));
  if (pair.slave) VMCKPT_TRY(restore_content(terminal, pair.master.get(), pair.slave.get()));
  VMCKPT_TRY(restore_modes(terminal, pair));
  return context.put(*masters[0], std::move(pair.master));
}

// Restart's own terminal: the one at `number` if that is one, else the first there is. -1: none.
int find_own_terminal(const RestoreContext& context, int number) {
  const auto& stdio = context.restore.stdio;
  if (number >= 0 && number <= 2 && ::isatty(stdio[static_cast<size_t>(number)]))
    return stdio[static_cast<size_t>(number)];
  for (int fd : stdio) {
    if (::isatty(fd)) return fd;
  }
  return -1;
}

Result<Fd> attach_slave(RestoreContext& context, const pb::OpenFile& file, int own) {
  if (auto fd = reopen(own, open_flags(file)); fd.ok()) return fd;
  context.shared_with_restart.insert(file.id());
  Fd fd(::fcntl(own, F_DUPFD_CLOEXEC, context.restore.first_service_fd));
  if (!fd) return errno_error("attach to restart's terminal for " + describe(file));
  return fd;
}

Result<void> restore_without_terminal(RestoreContext& context, const pb::Terminal& terminal) {
  Pair pair = VMCKPT_TRY(make_pair_of(terminal, Slave::kOpened));
  VMCKPT_TRY(restore_slaves(context, terminal, pair.master.get()));
  VMCKPT_TRY(restore_dev_tty(context, terminal, pair.slave.get()));
  context.note(fmt::format(
      "the program had terminal {} and restart has none: it gets a terminal of its own; see vmckpt attach",
      terminal.path()));
  context.restore.terminal_master = VMCKPT_TRY(context.lift(std::move(pair.master)));
  return {};
}

Result<void> restore_outside(RestoreContext& context, const pb::Terminal& terminal) {
  auto slaves = sides_of(context, terminal, pb::TerminalSide::SLAVE);
  int number = slaves.empty() ? 0 : context.descriptors.lowest(*slaves[0]);
  int own = find_own_terminal(context, number);
  if (own < 0) return restore_without_terminal(context, terminal);
  for (const pb::OpenFile* file : slaves) {
    VMCKPT_TRY(context.put(*file, VMCKPT_TRY(attach_slave(context, *file, own))));
  }
  VMCKPT_TRY(restore_dev_tty(context, terminal, own));
  return apply_termios(terminal, own);
}

Result<void> restore_other(RestoreContext& context, const pb::Terminal& terminal) {
  Pair pair = VMCKPT_TRY(make_pair_of(terminal, Slave::kOpened));
  VMCKPT_TRY(restore_slaves(context, terminal, pair.master.get()));
  return restore_dev_tty(context, terminal, pair.slave.get());
}

Result<void> restore_device(RestoreContext& context, const pb::Terminal& terminal) {
  for (const pb::OpenFile* file : sides_of(context, terminal, pb::TerminalSide::SLAVE)) {
    // O_NONBLOCK: opening a serial line may wait for a carrier.
    const FileAccess& access = context.restore.access;
    Fd fd = VMCKPT_TRY(access.open(terminal.path(), open_flags(*file) | O_NONBLOCK | O_NOCTTY, terminal.origin()));
    VMCKPT_TRY(apply_termios(terminal, fd.get()));
    VMCKPT_TRY(context.put(*file, std::move(fd)));
  }
  return {};
}

Result<void> restore(RestoreContext& context) {
  for (const pb::Terminal& terminal : context.image.objects().GetRepeatedExtension(pb::terminals)) {
    switch (terminal.kind()) {
      case pb::Terminal::INSIDE: VMCKPT_TRY(restore_inside(context, terminal)); break;
      case pb::Terminal::OUTSIDE: VMCKPT_TRY(restore_outside(context, terminal)); break;
      case pb::Terminal::OTHER: VMCKPT_TRY(restore_other(context, terminal)); break;
      case pb::Terminal::DEVICE: VMCKPT_TRY(restore_device(context, terminal)); break;
      default: return error(fmt::format("terminal {} is of a kind that this vmckpt does not know", terminal.path()));
    }
  }
  return {};
}

}  // namespace

const DescriptorModule kTerminalModule{"terminal", recognise, save, save_links, check, restore};

}  // namespace vmckpt
