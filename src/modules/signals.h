// Signal state. Kernel objects: the process's table of actions, the queues of pending signals (one for the process, one for
// each thread), alternate stacks (per thread).
//
// Created and changed by: rt_sigaction, kill, sigqueue, tgkill, timers; sigaltstack.
// Saved: actions (a tape asks rt_sigaction for each signal), queues (PTRACE_PEEKSIGINFO copies without taking), stacks.
// Restored: actions in the leader's tape, pending signals queued by the process to itself (only a process itself may send a
// signal with a kernel's or timer's si_code: rt_sigqueueinfo(2)), while every signal is blocked; the masks come last, with
// the registers.
#pragma once

#include <vector>

#include "core/result.h"
#include "image/image.pb.h"
#include "tracer/stopped_world.h"
#include "tracer/tape_draft.h"

namespace vmckpt {

struct SignalQuestions {
  struct Action {
    int number;
    size_t call;
    uint64_t answer;
  };
  std::vector<Action> actions;
};

SignalQuestions ask_signal_actions(TapeDraft& tape);
void save_signal_actions(const SignalQuestions& questions, const TapeDraft& tape, pb::Process* process);
// Process-directed signals (`shared`) or those of one thread.
Result<void> save_pending_signals(pid_t tid, bool shared, google::protobuf::RepeatedPtrField<pb::Signal>* pending);

void plan_signal_actions(const pb::Process& process, TapeDraft& tape);
void plan_pending_signals(const pb::Process& process, TapeDraft& tape);
void plan_pending_signals(const pb::Thread& thread, int32_t pid, TapeDraft& tape);

}  // namespace vmckpt
