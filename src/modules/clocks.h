// Clocks. The monotonic and boot-time clocks of the target go on from their values at the checkpoint: restart makes the new
// process in a time namespace (Linux 5.6, time_namespaces(7)) whose offsets bridge the gap, a reboot included. CLOCK_REALTIME is
// the host's and jumps by the gap, as after a suspend.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/result.h"
#include "image/image.pb.h"
#include "tracer/tape_draft.h"

namespace vmckpt {


// Moves the saved clocks forward.
void advance_clocks(int64_t by_ns, pb::Host* host);

// In a process that is about to make the new one: children it makes from now on see the saved clocks go on. When the kernel does
// not let us, the note says what the target will see.
void enter_saved_time(const pb::Host& host, std::vector<std::string>& notes);

}  // namespace vmckpt
