// Starting a target: is the program one that can be checkpointed, and the start itself with recorder and filter in place.
#pragma once

#include <signal.h>

#include <string>
#include <vector>

#include "core/result.h"

namespace vmckpt {

struct LaunchOptions {
  std::vector<std::string> command;
  bool filter = true;         // deny io_uring and Linux AIO
  bool allow_devices = false; // do not deny vhost, VFIO and their kind
};

// Path of libvmckpt.so beside this program or in the library folder that belongs to it.
Result<std::string> find_recorder();

// Static, set-uid, 32-bit and missing programs, and hosts that forbid ptrace, each in one sentence.
Result<void> check_program(const std::string& command);

// Forks and executes; returns when the exec has succeeded. `mask`: the signal mask the program gets.
Result<pid_t> start_program(const LaunchOptions& options, const sigset_t& mask);

}  // namespace vmckpt
