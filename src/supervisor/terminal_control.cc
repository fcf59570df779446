#include "supervisor/terminal_control.h"

#include <signal.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "modules/process.h"

namespace vmckpt {
namespace {

int controlling_terminal() {
  for (int fd : {0, 2, 1}) {
    if (::isatty(fd) && ::tcgetpgrp(fd) >= 0) return fd;
  }
  return -1;
}

// From a background group these calls would stop us with SIGTTOU; the supervisor has it blocked, which is enough.
void set_foreground(int terminal, pid_t group) { (void)::tcsetpgrp(terminal, group); }

}  // namespace

TerminalControl::TerminalControl() : terminal_(controlling_terminal()), own_group_(::getpgrp()) {
  if (terminal_ >= 0) (void)::tcgetattr(terminal_, &modes_);
}

void TerminalControl::stop_with_target(pid_t target) {
  if (terminal_ < 0) return;
  const pid_t target_group = ::getpgid(target);
  const bool had_terminal = ::tcgetpgrp(terminal_) == target_group;
  termios target_modes{};
  (void)::tcgetattr(terminal_, &target_modes);
  if (target_group != own_group_ && had_terminal) set_foreground(terminal_, own_group_);
  (void)::tcsetattr(terminal_, TCSADRAIN, &modes_);
  ::raise(SIGSTOP);
  // The shell has continued us (fg); with our own group it has continued the target too.
  (void)::tcsetattr(terminal_, TCSADRAIN, &target_modes);
  if (target_group == own_group_ || target_group <= 0) return;
  if (had_terminal) set_foreground(terminal_, target_group);
  ::kill(-target_group, SIGCONT);
}

void TerminalControl::take_back(bool abruptly) {
  if (terminal_ < 0) return;
  if (::tcgetpgrp(terminal_) != own_group_) {
    // Only from a group of the target's that has died with it; never from another job of the shell's.
    if (::kill(-::tcgetpgrp(terminal_), 0) == 0) return;
    set_foreground(terminal_, own_group_);
  }
  if (abruptly) (void)::tcsetattr(terminal_, TCSADRAIN, &modes_);
}

void give_terminal_back(const pb::Process& process, pid_t pid) {
  const int terminal = controlling_terminal();
  if (terminal < 0 || !state_of(process).foreground() || process.process_group() != process.pid()) return;
  if (::tcgetpgrp(terminal) == ::getpgrp()) set_foreground(terminal, ::getpgid(pid));
}

namespace {

// The terminal in which `process` runs a full-screen program now, and its size; -1 when it does not.
int full_screen_terminal(const pb::Process& process, winsize* size) {
  const int terminal = state_of(process).foreground() ? controlling_terminal() : -1;
  termios modes{};
  if (terminal < 0 || ::tcgetattr(terminal, &modes) != 0 || (modes.c_lflag & ICANON)) return -1;
  return ::ioctl(terminal, TIOCGWINSZ, size) == 0 && size->ws_row > 1 ? terminal : -1;
}

}  // namespace

void ask_to_draw_anew(const pb::Process& process, pid_t pid) {
  if (!state_of(process).has_terminal()) return;
  winsize size{};
  const int terminal = full_screen_terminal(process, &size);
  winsize smaller = size;
  --smaller.ws_row;
  if (terminal < 0 || ::ioctl(terminal, TIOCSWINSZ, &smaller) != 0) {
    ::kill(pid, SIGWINCH);
    return;
  }
  constexpr useconds_t kTimeToLookUs = 100'000;
  ::usleep(kTimeToLookUs);
  winsize now{};
  // Not if its window has been resized meanwhile.
  if (::ioctl(terminal, TIOCGWINSZ, &now) == 0 && now.ws_row == smaller.ws_row && now.ws_col == size.ws_col) {
    (void)::ioctl(terminal, TIOCSWINSZ, &size);
  }
}

}  // namespace vmckpt
