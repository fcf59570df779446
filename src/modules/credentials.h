// Who the process is: user and group ids, supplementary groups, capabilities, no_new_privs. Per thread in the kernel.
//
// Saved: from /proc/PID/task/TID/status. Restored: by each thread's own tape, near its end, since what comes before needs the
// rights that restart has. Never more than the caller of restart has: an ordinary user restarts only what ran as himself, and
// in his own user namespace the process has no capability unless the image says so (and there they reach nothing outside).
#pragma once

#include "core/proc.h"
#include "core/result.h"
#include "image/image.pb.h"
#include "tracer/tape_draft.h"

namespace vmckpt {

void save_credentials(const StatusFields& status, pb::Credentials* saved);
Result<void> check_credentials(const pb::Thread& thread);
// `in_own_user_namespace`: groups cannot be set there (setgroups is denied), ids stand as they are.
void plan_credentials(const pb::Thread& thread, bool in_own_user_namespace, TapeDraft& tape);

}  // namespace vmckpt
