// Makes the process that becomes the target, with its old PID: in this PID namespace when its numbers are free and we may
// choose them, otherwise in a new one (and, without privileges, in a user namespace in which we may).
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
  Fd channel;                // what the process's body says (SOCK_SEQPACKET)
};

// What the new process knows about the world it was made in.
struct Birthplace {
  int channel = -1;
  bool own_user_namespace = false;
};

// Runs in the new process; never returns.
using ProcessBody = std::function<void(const Birthplace&)>;

Result<NewProcess> make_process(const pb::Image& image, std::vector<std::string>& notes, const ProcessBody& body);

// Whether this caller may make processes with chosen numbers at all; the Error says why not.
Result<void> check_process_numbers(const pb::Image& image);

}  // namespace vmckpt
