// Tapes for a stopped target: built here, placed into the recorder's arena, played by the stopped threads at the same time,
// read back. A supervisor killed at any moment leaves threads that find their own way back (tape.h).
#pragma once

#include <cstdint>
#include <vector>

#include "core/result.h"
#include "tracer/tape_draft.h"
#include "recorder/ledger.h"
#include "tracer/stopped_world.h"

namespace vmckpt {

struct ThreadTape {
  StoppedThread* thread;
  TapeDraft* tape;
};

// Plays every tape in its thread; threads play at the same time. Only `snapshot_child`, when given, may be made by a tape
// (kOpSnapshot): the new process is left running, traced with PTRACE_O_EXITKILL.
Result<void> play_tapes(StoppedWorld& world, const Ledger& ledger, const std::vector<ThreadTape>& tapes,
                        pid_t* snapshot_child = nullptr);

}  // namespace vmckpt
