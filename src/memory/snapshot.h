// The forked snapshot: a copy-on-write copy of the target, made by the target itself at the supervisor's order, child of the
// supervisor (CLONE_PARENT). Costs the pause the copying of page tables only. Its life:
//
//     ask -------- play_tapes -------- settle --------- check -------- ~Snapshot
//     | asked        forked: taker()   | waits          | whole        gone: killed and reaped
//     |                                +-- the kernel makes no copy: why_none()
//     +-- give_up: not to be asked for: why_none()
#pragma once

#include <string>
#include <vector>

#include <sys/types.h>

#include "core/result.h"
#include "memory/address_space.h"
#include "tracer/remote_tape.h"
#include "tracer/tape_draft.h"

namespace vmckpt {

// Owns the copy from its first moment on. Belongs to the thread that traces.
class Snapshot {
 public:
  Snapshot() = default;
  Snapshot(const Snapshot&) = delete;
  Snapshot& operator=(const Snapshot&) = delete;

  // Adds to the leader's tape: lift advice that keeps memory out of a fork, fork, put the advice back.
  void ask(const StoppedWorld& world, const AddressSpaceSave& space, TapeDraft& leader);
  // The tape that asked for it will not be played.
  void give_up(std::string why);
  // For play_tapes(): takes the copy as soon as it is there.
  TakeCopy taker();
  // After the tape was played: lets the copy, which has just been made, run to its waiting place. Where limits of processes or
  // memory did not let the kernel make one, there is none, and why_none().
  Result<void> settle(const TapeDraft& leader);
  // A range that fork left out would be lost silently: this looks. May come after the target has gone on.
  Result<void> check(const AddressSpaceSave& space) const;

  // It waits in its place, a copy of the memory as it was.
  bool exists() const { return state_ == State::kSettled; }
  // 0 before it was forked.
  pid_t pid() const { return copy_.tid; }
  // Why there is none although there should be; empty otherwise.
  const std::string& why_none() const { return why_none_; }

 private:
  enum class State { kNone, kAsked, kForked, kSettled };

  State state_ = State::kNone;
  std::vector<size_t> lifted_;  // calls: advice that must have gone, or the copy would lack memory
  size_t fork_ = 0;             // the call
  Tracee copy_;
  std::string why_none_;
};

}  // namespace vmckpt
