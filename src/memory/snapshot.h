// The forked snapshot: a copy-on-write copy of the target, made by the target itself at the supervisor's order, child of the
// supervisor (CLONE_PARENT). Costs the pause the copying of page tables only.
#pragma once

#include <sys/types.h>

#include "core/result.h"
#include "memory/address_space.h"
#include "tracer/remote_tape.h"
#include "tracer/tape_draft.h"

namespace vmckpt {

// Owns the copy; kills and reaps it. Belongs to the thread that traces.
class SnapshotChild {
 public:
  pid_t pid() const { return copy_.tid; }
  // For play_tapes(), so that the copy has an owner from its first moment on.
  TakeCopy taker() {
    return [this](Tracee copy) { copy_ = std::move(copy); };
  }
  Tracee& copy() { return copy_; }

 private:
  Tracee copy_;
};

struct SnapshotQuestion {
  std::vector<size_t> lifted;  // advice that must have gone, or the copy would lack memory
  size_t call;
};

// Adds to the leader's tape: lift advice that keeps memory out of a fork, fork, put the advice back.
// `parent_in_target` is the target's parent as the target sees it (0 from inside a PID namespace).
SnapshotQuestion ask_snapshot(const AddressSpaceSave& space, pid_t parent_in_target, TapeDraft& tape);

// After the tape was played: whether the kernel made the copy; otherwise its reason in errno (limits of processes and memory).
bool was_forked(const SnapshotQuestion& question, const TapeDraft& tape);
// Then: lets the copy, which has just been made, run to its waiting place.
Result<void> settle_snapshot(const SnapshotQuestion& question, const TapeDraft& tape, SnapshotChild& snapshot);

// A range that fork left out would be lost silently: this looks. May come after the target has gone on.
Result<void> check_snapshot(const SnapshotChild& snapshot, const AddressSpaceSave& space);

}  // namespace vmckpt
