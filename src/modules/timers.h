// Timers of the process. Kernel objects: the three interval timers (setitimer; alarm(2) is ITIMER_REAL) and POSIX timers.
//
// Saved: interval timers by getitimer; POSIX timers from /proc/PID/timers (id, clock, notification) with the remaining time
// and overrun asked by tape (timer_gettime, timer_getoverrun).
// Restored: last of all, so that they do not run while the process is being built. POSIX timers keep their ids: from
// Linux 6.15 by PR_TIMER_CREATE_RESTORE_IDS; before, the kernel counts ids up, so ids in between are made and deleted.
// Remaining time is what is restored: a timer on CLOCK_REALTIME goes off as much later as the target was not running.
#pragma once

#include <vector>

#include "core/result.h"
#include "image/image.pb.h"
#include "tracer/stopped_world.h"
#include "tracer/tape_draft.h"

namespace vmckpt {

struct TimerQuestions {
  uint64_t interval_answers[3];
  struct Posix {
    pb::PosixTimer timer;
    uint64_t answer;
    size_t overrun_call;
  };
  std::vector<Posix> posix;
};

Result<TimerQuestions> ask_timers(const StoppedWorld& world, TapeDraft& tape);
void save_timers(const TimerQuestions& questions, const TapeDraft& tape, pb::Process* process);

Result<void> check_timers(const pb::Process& process);
// Played by the leader once all threads exist (a timer may notify one of them).
void plan_timers(const pb::Image& image, TapeDraft& tape);

}  // namespace vmckpt
