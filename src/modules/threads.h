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
#include "recorder/ledger.h"
#include "tracer/stopped_world.h"
#include "tracer/tape_draft.h"

namespace vmckpt {

// A thread stopped inside an rseq critical section goes on at its abort handler, as the kernel does after any preemption: the
// section does not survive what we do in the thread. Call once, right after the freeze.
void abort_rseq_section(StoppedThread& thread, pid_t pid, const Ledger& ledger);

struct ThreadQuestions {
  uint64_t alternate_stack;
  uint64_t clear_child_tid;
  size_t clear_child_tid_call;
  uint64_t parent_death_signal;
  size_t timer_slack_call, securebits_call, mce_kill_call;
  std::optional<size_t> cpuid_call;  // unless a seccomp filter forbids to ask
};

ThreadQuestions ask_thread(const pb::Thread& thread, TapeDraft& tape);
// Everything but what the tape answers; before the tape is played, since the filters decide whether it may be.
Result<void> save_thread(const StoppedWorld& world, const StoppedThread& thread, const Ledger& ledger, bool launch_filter,
                         pb::Thread* saved);
void save_thread_answers(const ThreadQuestions& questions, const TapeDraft& tape, pb::Thread* saved);

Result<void> check_thread(const pb::Thread& thread, std::vector<std::string>& notes);
// Before its filters, which may forbid it.
void plan_cpuid(const pb::Thread& thread, TapeDraft& tape);
Result<void> plan_thread(const pb::Thread& thread, const pb::Process& process, TapeDraft& tape);

// The state to put into the restored thread.
StoppedThread restored_state(const pb::Thread& thread, pid_t tid);

}  // namespace vmckpt
