// Makes the process that becomes the target, with its old PID. Three ways, of which the next is tried when one is not to be had:
//
//   1. in this PID namespace, when its numbers are free and we may choose them;
//   2. in a new PID namespace, made with CAP_SYS_ADMIN (root on the host, and root in a user namespace);
//   3. in a new PID namespace inside a new user namespace (an ordinary user, and root with a container's few capabilities).
//      With CAP_SETUID and CAP_SETGID all ids are mapped to themselves, so that a target which had become another user comes
//      back as that one; without them the caller's own two ids are.
//
// Rights are found out by trying. User 0 without CAP_SETFCAP cannot be mapped into a user namespace at all (Linux 5.12): inside
// `bwrap --uid 0`, which drops all capabilities, there is no way left, and the message says so.
//
//   supervisor ── vmckpt-init (PID 1 of the new namespace: reaps, outlives the supervisor)      only with a new namespace
//              ── starter ── enters the namespaces, sets the clocks' offsets, clone3(set_tid, CLONE_PARENT), ends
//              ── the new process, child of the supervisor
#pragma once

#include <functional>
#include <string>
#include <vector>

#include <sys/types.h>

#include "core/fd.h"
#include "core/result.h"
#include "image/image.pb.h"

namespace vmckpt {

struct NewProcess {
  pid_t pid = 0;             // as the supervisor sees it
  pid_t namespace_init = 0;  // 0: no namespace of its own
  bool own_user_namespace = false;
  Fd channel;                // what the process's body says (SOCK_SEQPACKET)
};

// What the new process knows about the world it was made in.
struct Birthplace {
  int channel = -1;
  bool own_user_namespace = false;
};

// Runs in the new process; never returns.
using ProcessBody = std::function<void(const Birthplace&)>;

enum class Surroundings {
  kAny,           // here if possible
  kOwnNamespace,  // a PID namespace in any case: here the numbers turned out to be taken
};

Result<NewProcess> make_process(const pb::Image& image, Surroundings surroundings, std::vector<std::string>& notes,
                                const ProcessBody& body);

// Whether processes with chosen numbers can be made in this PID namespace.
bool may_choose_numbers_here();

// Whether this caller may make processes with chosen numbers at all; the Error says why not.
Result<void> check_process_numbers();

}  // namespace vmckpt
