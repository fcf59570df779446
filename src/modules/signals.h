// Signal state. Kernel objects: the process's table of actions, the queues of pending signals (one for the process, one for
// each thread), alternate stacks (per thread).
//
// Created and changed by: rt_sigaction, kill, sigqueue, tgkill, timers; sigaltstack.
// Saved: actions (a tape asks rt_sigaction for each signal), queues (PTRACE_PEEKSIGINFO copies without taking; with the threads,
// before any tape could take one), stacks. Restored: actions in the leader's tape, pending signals queued by the process to
// itself (only a process itself may send a signal with a kernel's or timer's si_code: rt_sigqueueinfo(2)), while every signal is
// blocked; the masks come last, with the registers.
#pragma once

#include <vector>

#include "core/result.h"
#include "image/image.pb.h"
#include "modules/signals.pb.h"
#include "tracer/stopped_world.h"
#include "tracer/tape_draft.h"

namespace vmckpt {

// Process-directed signals (`shared`) or those of one thread.
Result<void> save_pending_signals(pid_t tid, bool shared, google::protobuf::RepeatedPtrField<pb::Signal>* pending);

void plan_pending_signals(const pb::Thread& thread, int32_t pid, TapeDraft& tape);

}  // namespace vmckpt
