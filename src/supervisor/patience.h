// What a wait for the new process heeds: whoever wants the restart ended (Ctrl-C, TERM), and a process that does not move any
// more (a file on a server that is gone, a lease that nobody gives up). It may take as long as it needs while anything moves.
#pragma once

#include <string>

#include <signal.h>
#include <sys/types.h>

#include "core/result.h"
#include "core/waiting.h"

namespace vmckpt {

// SIGINT, SIGTERM, SIGHUP and SIGQUIT, without those that somebody ignores for us (nohup).
sigset_t end_signals();
// One of them, blocked and pending; 0 when there is none.
int pending_end_signal();
// An Error that says so when one is pending.
Result<void> expect_no_end_signal();
// Ends the calling process by such a signal, as if it had never been blocked.
[[noreturn]] void end_by(int signal);

class Patience {
 public:
  // Others are looked after `meanwhile`, and may end it.
  Patience(pid_t process, Meanwhile& meanwhile);
  // Waits a little, or until a child of ours has changed its state. An Error when there is no use in waiting on.
  Result<void> wait();
  // The same without waiting.
  Result<void> check();

 private:
  std::string signs_of_life() const;

  pid_t process_;
  Meanwhile& meanwhile_;
  int64_t limit_us_;
  int64_t looked_us_ = 0, moved_us_ = 0;
  std::string signs_;
};

}  // namespace vmckpt
