// Threads. Kernel object: task. Saved per thread: number, name, registers and extended state (through the stopped world),
// signal mask and pending signals, alternate stack, rseq area, robust list, clear_child_tid, scheduling, credentials, filters.
//
// Restored: the leader's tape makes each other thread with clone3 (its number given by set_tid, its TLS pointer by CLONE_SETTLS);
// the thread plays a tape of its own with what only itself may set, then stops; registers and mask are put in from outside.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "core/result.h"
#include "image/image.pb.h"
#include "modules/threads.pb.h"
#include "recorder/ledger.h"
#include "tracer/stopped_world.h"
#include "tracer/tape_draft.h"

namespace vmckpt {

inline const pb::ThreadState& state_of(const pb::Thread& thread) { return thread.GetExtension(pb::thread_state); }

// The state to put into the restored thread.
StoppedThread restored_state(const pb::Thread& thread, pid_t tid);

}  // namespace vmckpt
