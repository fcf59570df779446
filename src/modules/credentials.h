// Who the process is: user and group ids, supplementary groups, capabilities, no_new_privs. Per thread in the kernel.
//
// Saved: from /proc/PID/task/TID/status. Restored: by each thread's own tape, near its end, since what comes before needs the
// rights that restart has. Never more than the caller of restart has: what it may not set (other ids) fails the preflight, what
// it can only do without (groups, capabilities) is noted. Nothing is asked of the user id 0: root in a container has a few
// capabilities only, root in a user namespace may have no right to set groups, and an ordinary user may have been given some.
// Only what differs is set, since even the setting of equal ids can be forbidden (setgroups in a user namespace).
//
// In a user namespace of its own the process has the capabilities that the image says, and there they reach nothing outside.
#pragma once

#include <string>
#include <vector>

#include "core/proc.h"
#include "core/result.h"
#include "image/image.pb.h"
#include "memory/file_access.h"
#include "modules/credentials.pb.h"
#include "tracer/tape_draft.h"

namespace vmckpt {

// Whether the calling thread has it in effect, in the user namespace that it is in. For what needs it in another one: try.
bool has_capability(int capability);
// CAP_SETGID, in a user namespace that does not forbid it (user_namespaces(7), "setgroups").
bool may_set_groups();
// "CAP_CHOWN, CAP_KILL"
std::string capability_names(uint64_t capabilities);

inline const pb::Credentials& credentials_of(const pb::Thread& thread) { return thread.GetExtension(pb::credentials); }
// The caller's own, where the image does not say whose the thread's are: that is refused by check_credentials().
FileAccess file_access_of(const pb::Credentials& credentials, FilePolicy policy);

void save_credentials(const StatusFields& status, pb::Credentials* saved);
// In the supervisor: what cannot be had is an error, what will be missing a note.
Result<void> check_credentials(const pb::Thread& thread, std::vector<std::string>& notes);
// In the new process, which knows what it has got: the capabilities that the thread must do without.
void note_lost_capabilities(const pb::Thread& thread, bool in_own_user_namespace, std::vector<std::string>& notes);
// In the new process, from what the calling thread is to what the image's was.
Result<void> plan_credentials(const pb::Thread& thread, TapeDraft& tape);

}  // namespace vmckpt
