// Tapes for a stopped target: built here, placed into the recorder's arena, played by the stopped threads at the same time,
// read back. A supervisor killed at any moment leaves threads that find their own way back (tape.h).
#pragma once

#include <functional>
#include <vector>

#include "core/result.h"
#include "tracer/tape_draft.h"
#include "recorder/ledger.h"
#include "tracer/stopped_world.h"

namespace vmckpt {

struct ThreadTape {
  Tracee* thread;
  TapeDraft* tape;
};

// Takes a copy of the target that its leader's tape has made (kOpSnapshot), from the copy's first moment on: it is traced, and
// about to stop before its first instruction.
using TakeCopy = std::function<void(Tracee)>;

// Plays every tape in its thread; threads play at the same time. A tape may fork only where somebody takes the copy. Who is
// looked after `meanwhile` cannot end it: what a tape has begun it brings to its end.
Result<void> play_tapes(StoppedWorld& world, const Ledger& ledger, const std::vector<ThreadTape>& tapes,
                        const TakeCopy& take_copy = {}, Meanwhile* meanwhile = nullptr);

}  // namespace vmckpt
