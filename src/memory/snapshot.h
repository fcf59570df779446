// The forked snapshot: a copy-on-write copy of the target, made by the target itself at the supervisor's order, child of the
// supervisor (CLONE_PARENT). Costs the pause the copying of page tables only.
#pragma once

#include <sys/types.h>

#include "core/result.h"
#include "memory/address_space.h"
#include "tracer/stopped_world.h"
#include "tracer/tape_draft.h"

namespace vmckpt {

// Owns the copy; kills and reaps it. Belongs to the thread that traces.
class SnapshotChild {
 public:
  SnapshotChild() = default;
  SnapshotChild(SnapshotChild&& other) noexcept : pid_(other.pid_) { other.pid_ = 0; }
  SnapshotChild& operator=(SnapshotChild&& other) noexcept;
  ~SnapshotChild() { end(); }

  pid_t pid() const { return pid_; }
  // Where play_tapes() puts the number, so that the copy has an owner from its first moment on.
  pid_t* to_be_set() { return &pid_; }
  void end();

 private:
  pid_t pid_ = 0;
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
Result<void> settle_snapshot(const SnapshotQuestion& question, const TapeDraft& tape, const SnapshotChild& snapshot);

// A range that fork left out would be lost silently: this looks. May come after the target has gone on.
Result<void> check_snapshot(const SnapshotChild& snapshot, const AddressSpaceSave& space);

}  // namespace vmckpt
