// The terminal between the shell that runs us and the target. Three cases: the target shares our process group (launch: the
// shell's Ctrl-C and Ctrl-Z reach both), it made a group of its own (an interactive shell), or there is no terminal.
#pragma once

#include <optional>

#include <sys/types.h>
#include <termios.h>

#include "image/process.pb.h"

namespace vmckpt {

class TerminalControl {
 public:
  // Remembers the terminal's modes and its foreground group, as they were before the target had it.
  TerminalControl();

  // The target has been stopped by job control: stop with it, so that the shell sees its job stopped, and go on with it.
  void stop_with_target(pid_t target);
  // The target has ended. `abruptly`: it had no chance to put the terminal's modes back.
  void take_back(bool abruptly);

 private:
  int terminal_ = -1;  // one of 0, 1, 2; -1: none
  termios modes_{};
  pid_t own_group_ = 0;
};

// Restart: makes the target's process group the terminal's foreground group again if it was and we are in the foreground.
void give_terminal_back(const pb::Process& process, pid_t pid);

// Restart: the target's screen may show something else by now. Programs that fill it draw it anew when its size has changed, and
// only then (curses compares): so it is changed for a moment. Others get a SIGWINCH.
void ask_to_draw_anew(const pb::Process& process, pid_t pid);

}  // namespace vmckpt
