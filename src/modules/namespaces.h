// Namespaces (namespaces(7)): what a process sees of the host. Restart makes none but those that it needs itself, so that a
// target which has entered others since its start (unshare, setns) cannot be restarted: it is refused by name.
//
// Those that it was started in are no part of it. A target that has been restarted lives in namespaces that vmckpt made
// (PID, user, mount, time): what it was found in right after the restart is what it may be in later.
// Source: /proc/PID/ns (Linux 3.8; time and time_for_children 5.6).
//
// A root directory of its own (chroot(2)) is refused likewise. Its open files could be found again, but the program and the
// recorder know sockets and watched folders by names that mean something else outside of it. Where the supervisor lives in the
// same chroot, there is none to be seen.
#pragma once

#include <map>
#include <string>

#include <sys/types.h>

#include "core/result.h"

namespace vmckpt {

// The kernel's names by kind: "net" -> "net:[4026531840]". A kind that may not be seen is left out.
using Namespaces = std::map<std::string, std::string>;

Namespaces namespaces_of(pid_t pid);
// Checkpoint: every thread of `pid` is where it was started. `started_in` empty: where this process is.
Result<void> check_namespaces(pid_t pid, const Namespaces& started_in);
// Checkpoint: no thread of `pid` has another root directory than this process.
Result<void> check_root_directory(pid_t pid);

}  // namespace vmckpt
