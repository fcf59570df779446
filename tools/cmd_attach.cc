// vmckpt attach: this terminal becomes that of a detached target, until Ctrl-] or the target's end.
#include <csignal>
#include <cstdio>

#include <poll.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <termios.h>
#include <unistd.h>

#include "command_line.h"
#include "commands.h"
#include "core/printable.h"
#include "supervisor/control_socket.h"
#include "supervisor/ended_targets.h"

namespace vmckpt {

namespace po = boost::program_options;

namespace {

constexpr Verb kVerb = {"attach", "[NAME|PID]",
                        "Connects to the terminal of a detached target. Ctrl-] disconnects; the target keeps running."};
constexpr char kLeave = 0x1d;  // Ctrl-], as telnet and virsh have it

// Raw while this lives: what is typed is the target's, Ctrl-C too.
class RawTerminal {
 public:
  RawTerminal() {
    if (::tcgetattr(0, &before_) != 0) return;
    termios raw = before_;
    ::cfmakeraw(&raw);
    is_raw_ = ::tcsetattr(0, TCSADRAIN, &raw) == 0;
  }
  ~RawTerminal() {
    // Whatever the target's program has switched on goes: other character set, hidden cursor, other screen, colours.
    if (!is_raw_) return;
    std::fputs("\033[?1049l\033[?25h\033[0m\033(B\r\n", stdout);
    std::fflush(stdout);
    (void)::tcsetattr(0, TCSADRAIN, &before_);
  }
  RawTerminal(const RawTerminal&) = delete;
  RawTerminal& operator=(const RawTerminal&) = delete;

 private:
  termios before_{};
  bool is_raw_ = false;
};

void set_size(pb::TerminalSize* size) {
  winsize window{};
  if (::ioctl(0, TIOCGWINSZ, &window) != 0) return;
  size->set_rows(window.ws_row);
  size->set_columns(window.ws_col);
}

// What was typed up to Ctrl-], which is not the target's.
Result<bool> pass_on_typed(int connection) {
  char typed[4096];
  const ssize_t got = ::read(0, typed, sizeof typed);
  if (got < 0 && errno == EINTR) return true;
  if (got <= 0) return false;
  std::string text(typed, static_cast<size_t>(got));
  const size_t leave = text.find(kLeave);
  pb::ControlRequest request;
  request.set_typed(text.substr(0, leave));
  if (!request.typed().empty()) VMCKPT_TRY(send_request(connection, request));
  return leave == std::string::npos;
}

// True: the connection has ended; false: the user has left.
Result<bool> be_terminal(int connection) {
  sigset_t winch;
  sigemptyset(&winch);
  sigaddset(&winch, SIGWINCH);
  (void)::pthread_sigmask(SIG_BLOCK, &winch, nullptr);
  Fd resized(::signalfd(-1, &winch, SFD_CLOEXEC | SFD_NONBLOCK));
  RawTerminal raw;
  for (;;) {
    pollfd polls[] = {{0, POLLIN, 0}, {connection, POLLIN, 0}, {resized.get(), POLLIN, 0}};
    if (::poll(polls, 3, -1) < 0) continue;
    if (polls[2].revents) {
      signalfd_siginfo info;
      (void)!::read(resized.get(), &info, sizeof info);
      pb::ControlRequest request;
      set_size(request.mutable_resize());
      VMCKPT_TRY(send_request(connection, request));
    }
    if (polls[1].revents) {
      auto reply = receive_reply(connection);
      if (!reply.ok()) return true;
      if (reply->has_error()) return error(printable(reply->error()));
      VMCKPT_TRY(write_exactly(1, reply->shown().data(), reply->shown().size(), "standard output"));
    }
    if (polls[0].revents && !VMCKPT_TRY(pass_on_typed(connection))) return false;
  }
}

Result<void> attach(const std::string& name) {
  if (!::isatty(0) || !::isatty(1))
    return error("standard input and output must be a terminal", "read the target's log with `vmckpt logs`");
  Fd connection = VMCKPT_TRY(find_target(name));
  pb::ControlRequest request;
  request.mutable_attach();
  set_size(request.mutable_attach()->mutable_size());
  VMCKPT_TRY(send_request(connection.get(), request));
  // The first answer: may it be?
  pb::ControlReply first = VMCKPT_TRY(receive_reply(connection.get()));
  if (first.has_error()) return error(printable(first.error()));
  VMCKPT_TRY(write_exactly(1, first.shown().data(), first.shown().size(), "standard output"));
  const bool ended = VMCKPT_TRY(be_terminal(connection.get()));
  std::fprintf(stderr, ended ? "vmckpt: the connection to the target has ended\n" : "vmckpt: left; the target runs on\n");
  return {};
}

}  // namespace

int cmd_attach(int argc, char** argv) {
  po::variables_map values;
  if (auto status = parse_command_line(argc, argv, kVerb, po::options_description("options"), {"TARGET?"}, values))
    return *status;
  auto done = attach(values.count("TARGET") ? values["TARGET"].as<std::string>() : "");
  return done.ok() ? kExitOk : fail(kVerb, done.error());
}

}  // namespace vmckpt
