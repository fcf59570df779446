// Descriptors 0 to 2 of a target that is started with --detach. The caller's terminal and pipes are the caller's: a target
// that kept them would write into the caller's output, keep `$(vmckpt launch --detach ...)` waiting, and lose what it says
// when the caller goes. So:
//
//   a terminal             a pseudo terminal of the target's own, which `vmckpt attach` connects to; shown text is logged
//   a pipe, a socket       for output the log, IMAGE_DIR/NAME.log
//   a file, a device       stays: the caller chose it
//   standard input         a file stays; all else but a terminal becomes /dev/null
#pragma once

#include <string>

#include "core/fd.h"
#include "core/result.h"

namespace vmckpt {

struct DetachedStdio {
  Fd terminal_master;  // of the target's own terminal, if it has one
  std::string log;     // path of the log; empty when nothing goes there
};

// Puts them at this process's 0 to 2, for the target to inherit. This process must lead a session without a terminal, for
// the new one to become the session's. `always_terminal`: a terminal in place of all three.
Result<DetachedStdio> take_detached_stdio(const std::string& image_dir, const std::string& name, bool always_terminal);

// Where the log of a target is: beside its images, where it is found again after a reboot; with the control sockets where that
// folder cannot be written to.
Result<std::string> choose_log(const std::string& image_dir, const std::string& name);

// The log, opened for appending: what the kernel appends stays whole whoever else appends.
Result<Fd> open_log(const std::string& path);

}  // namespace vmckpt
