// The supervisor's life beside a running target: reaps it and its orphans, serves the control socket, follows job control.
#pragma once

#include <memory>

#include "core/fd.h"
#include "core/result.h"
#include "supervisor/control_socket.h"
#include "supervisor/target.h"
#include "supervisor/terminal_control.h"

namespace vmckpt {

// Before the target is started: blocks the signals that the service handles and becomes the subreaper of all that the target
// will leave behind. Returns the mask that was in force, which the target must get.
sigset_t prepare_service();

class Service {
 public:
  // Until serve() is called the target is still being made.
  Service(Target& target, ControlListener& listener, TerminalControl& terminal, bool detached);
  ~Service();

  // While it is being made: answers clients and returns at once; a checkpoint that is asked for waits. An Error: somebody wants
  // the target ended.
  Result<void> look_after_clients();
  // Until the target and all that it left behind have ended. Returns the target's wait status.
  // `terminal_master`: what RestartResult has.
  int serve(Fd terminal_master = {});

 private:
  class Loop;
  std::unique_ptr<Loop> loop_;
};

// The exit status that tells a wait status: its own, or 128 + signal.
int exit_status_of(int wait_status);

}  // namespace vmckpt
