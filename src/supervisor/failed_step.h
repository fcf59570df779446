// Why a tape of a restart ended early, in words: what the step was for, what the kernel said, and what can be done.
#pragma once

#include <sys/types.h>

#include "core/remote_addr.h"
#include "core/result.h"
#include "player/tape.h"

namespace vmckpt {

// The tape at `address` in process `pid`: nothing when it was played to its end.
Result<void> check_tape(pid_t pid, pid_t tid_in_target, RemoteAddr address);

// What to do about a call that failed so; empty when nothing is known.
const char* advice_for(const TapeCall& call, int err);

}  // namespace vmckpt
