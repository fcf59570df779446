// Which process of the target a checkpoint is of: until trees can be saved, its only one.
#pragma once

#include <sys/types.h>

#include "core/result.h"
#include "supervisor/target.h"

namespace vmckpt {

// The target's only process. `others`: there are more.
Result<pid_t> only_process(const Target& target, bool& others);

// The same when `pid` stands still, and with it the only one that could start others.
Result<void> still_only_process(const Target& target, pid_t pid, bool& others);

// Whether it is worth while to wait until the others have ended.
bool others_may_end_soon(const Target& target);

// A process that has become another user can be looked into by root with CAP_SYS_PTRACE only, which containers leave out.
Result<void> check_may_look_into(pid_t pid);

}  // namespace vmckpt
