// Timers of the process. Kernel objects: the three interval timers (setitimer; alarm(2) is ITIMER_REAL) and POSIX timers.
//
// Saved: interval timers by getitimer; POSIX timers from /proc/PID/timers (id, clock, notification) with the remaining time
// and overrun asked by tape (timer_gettime, timer_getoverrun).
// Restored: last of all, so that they do not run while the process is being built. POSIX timers keep their ids: from
// Linux 6.15 by PR_TIMER_CREATE_RESTORE_IDS; before, the kernel counts ids up, so ids in between are made and deleted.
// Remaining time is what is restored: a timer on CLOCK_REALTIME goes off as much later as the target was not running.
#include <algorithm>
#include <map>

#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>

#include "core/clock.h"
#include "core/fd.h"
#include "core/proc.h"
#include "image/one_process.h"
#include "modules/module.h"
#include "modules/timers.pb.h"

#ifndef PR_TIMER_CREATE_RESTORE_IDS
#define PR_TIMER_CREATE_RESTORE_IDS 77
#endif

namespace vmckpt {
namespace {

// Ids that older kernels must burn through to reach the wanted one; more than that is refused rather than slow.
constexpr int32_t kMaxBurnedTimerIds = 20'000;

struct KernelSigevent {
  uint64_t value;
  int32_t signal;
  int32_t notify;
  int32_t tid;
  int32_t padding[11];
};
static_assert(sizeof(KernelSigevent) == 64);

// One timer of /proc/PID/timers:
//   ID: 3 / signal: 14/00007ffd2b1c / notify: signal/tid.123 (or signal/pid.N, none/pid.N) / ClockID: 1
std::vector<pb::PosixTimer> parse_timers(const std::string& text) {
  std::vector<pb::PosixTimer> timers;
  for (std::string_view line : split_lines(text)) {
    size_t colon = line.find(": ");
    if (colon == std::string_view::npos) continue;
    std::string_view name = line.substr(0, colon), value = line.substr(colon + 2);
    if (name == "ID") {
      timers.emplace_back().set_id(static_cast<int32_t>(parse_number(value)));
    } else if (timers.empty()) {
      continue;
    } else if (name == "signal") {
      size_t slash = value.find('/');
      timers.back().set_signal(static_cast<int32_t>(parse_number(value.substr(0, slash))));
      if (slash != std::string_view::npos) timers.back().set_sigev_value(parse_hex(value.substr(slash + 1)));
    } else if (name == "notify") {
      uint32_t notify = value.starts_with("none") ? SIGEV_NONE : SIGEV_SIGNAL;
      if (size_t tid = value.find("tid."); tid != std::string_view::npos) {
        notify |= SIGEV_THREAD_ID;
        timers.back().set_notify_tid(static_cast<int32_t>(parse_number(value.substr(tid + 4))));
      }
      timers.back().set_notify(notify);
    } else if (name == "ClockID") {
      timers.back().set_clock(static_cast<int32_t>(parse_number(value)));
    }
  }
  std::sort(timers.begin(), timers.end(), [](const auto& a, const auto& b) { return a.id() < b.id(); });
  return timers;
}

bool has_thread(const pb::Image& image, int32_t tid) {
  const auto& threads = one_process(image).process.threads();
  return std::any_of(threads.begin(), threads.end(), [&](const pb::Thread& thread) { return thread.tid() == tid; });
}

int64_t to_us(const timeval& time) { return int64_t{time.tv_sec} * 1'000'000 + time.tv_usec; }
timeval from_us(int64_t us) { return {us / 1'000'000, us % 1'000'000}; }

struct TimerAnswers {
  TapeWord interval_answers[3];
  struct Posix {
    pb::PosixTimer timer;
    TapeWord answer;
    size_t overrun_call;
  };
  std::vector<Posix> posix;
};

void save_timers(const TimerAnswers& questions, const TapeDraft& tape, pb::Timers* saved) {
  for (uint32_t which : {ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF}) {
    const auto& value = tape.as<itimerval>(questions.interval_answers[which]);
    if (to_us(value.it_value) == 0 && to_us(value.it_interval) == 0) continue;
    pb::IntervalTimer* timer = saved->add_interval_timers();
    timer->set_which(which);
    timer->set_value_us(to_us(value.it_value));
    timer->set_interval_us(to_us(value.it_interval));
  }
  for (const auto& question : questions.posix) {
    const auto& value = tape.as<itimerspec>(question.answer);
    pb::PosixTimer* timer = saved->add_posix_timers();
    *timer = question.timer;
    timer->set_value_ns(to_ns(value.it_value));
    timer->set_interval_ns(to_ns(value.it_interval));
    timer->set_overrun(static_cast<int32_t>(std::max<int64_t>(0, tape.result(question.overrun_call))));
  }
}

Result<void> ask(Questions& asked) {
  const StoppedWorld& world = asked.world;
  TapeDraft& tape = asked.leader();
  TimerAnswers questions{};
  for (int which : {ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF}) {
    questions.interval_answers[which] = tape.room(sizeof(itimerval));
    tape.call(SYS_getitimer, {static_cast<uint64_t>(which), questions.interval_answers[which]}, true, "read interval timer");
  }
  // The file is missing on kernels without CONFIG_CHECKPOINT_RESTORE; `vmckpt doctor` names that.
  std::string text = VMCKPT_TRY(read_whole_file(fmt::format("/proc/{}/timers", world.pid())));
  for (pb::PosixTimer& timer : parse_timers(text)) {
    // The file shows the number as we see the thread; the program gave, and will give again, its own.
    for (const StoppedThread& thread : world.threads()) {
      if (thread.tid == timer.notify_tid()) {
        timer.set_notify_tid(thread.tid_in_target);
        break;
      }
    }
    uint64_t id = static_cast<uint64_t>(timer.id());
    const TapeWord answer = tape.room(sizeof(itimerspec));
    tape.call(SYS_timer_gettime, {id, answer}, true, fmt::format("read POSIX timer {}", timer.id()));
    size_t overrun_call = tape.call(SYS_timer_getoverrun, {id});
    questions.posix.push_back({std::move(timer), answer, overrun_call});
  }
  asked.when_answered([questions = std::move(questions)](const std::vector<TapeDraft>& tapes, pb::Image& image) {
    save_timers(questions, tapes.front(), one_process(&image).process.MutableExtension(pb::timers));
  });
  return {};
}

Result<void> check_timers(const pb::Timers& timers) {
  int32_t highest = 0;
  for (const pb::PosixTimer& timer : timers.posix_timers()) highest = std::max(highest, timer.id());
  bool keeps_ids = ::prctl(PR_TIMER_CREATE_RESTORE_IDS, 2, 0, 0, 0) >= 0;  // 2: PR_TIMER_CREATE_RESTORE_IDS_GET
  if (!keeps_ids && highest > kMaxBurnedTimerIds) {
    return error(fmt::format("POSIX timer id {} cannot be given again on this kernel", highest), "use Linux 6.15 or newer");
  }
  return {};
}

void plan_timers(const pb::Image& image, TapeDraft& tape) {
  const pb::Timers& timers = one_process(image).process.GetExtension(pb::timers);
  bool keeps_ids = ::prctl(PR_TIMER_CREATE_RESTORE_IDS, 2, 0, 0, 0) >= 0;
  if (keeps_ids && timers.posix_timers_size() > 0) {
    tape.call(SYS_prctl, {PR_TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0}, true, "ask for POSIX timers with given ids");
  }
  int32_t next_id = 0;
  for (const pb::PosixTimer& timer : timers.posix_timers()) {
    KernelSigevent event{};
    event.value = timer.sigev_value();
    event.signal = timer.signal();
    event.notify = static_cast<int32_t>(timer.notify());
    event.tid = timer.notify_tid();
    // The thread it was for has ended: such a timer runs and tells nobody.
    if ((timer.notify() & SIGEV_THREAD_ID) && !has_thread(image, timer.notify_tid())) event.notify = SIGEV_NONE;
    auto create = [&](int32_t id) {
      tape.call(SYS_timer_create, {static_cast<uint64_t>(timer.clock()), tape.data_of(event), tape.data_of(id)}, true,
                fmt::format("create POSIX timer {} on clock {}", id, timer.clock()));
    };
    for (; !keeps_ids && next_id < timer.id(); ++next_id) {
      create(next_id);
      tape.call(SYS_timer_delete, {static_cast<uint64_t>(next_id)});
    }
    create(timer.id());
    next_id = timer.id() + 1;
  }
  if (keeps_ids && timers.posix_timers_size() > 0) tape.call(SYS_prctl, {PR_TIMER_CREATE_RESTORE_IDS, 0, 0, 0, 0});
  for (const pb::PosixTimer& timer : timers.posix_timers()) {
    if (timer.value_ns() == 0) continue;
    itimerspec value{to_timespec(timer.interval_ns()), to_timespec(timer.value_ns())};
    tape.call(SYS_timer_settime, {static_cast<uint64_t>(timer.id()), 0, tape.data_of(value), 0}, true,
              fmt::format("arm POSIX timer {}", timer.id()));
  }
  for (const pb::IntervalTimer& timer : timers.interval_timers()) {
    // A periodic timer whose signal is still pending shows 0: it is started anew when that is taken.
    itimerval value{from_us(timer.interval_us()), from_us(std::max<int64_t>(1, timer.value_us()))};
    tape.call(SYS_setitimer, {timer.which(), tape.data_of(value), 0}, true, "arm interval timer");
  }
}

void check(Preflight& preflight) { preflight.keep(check_timers(one_process(preflight.image).process.GetExtension(pb::timers))); }

Result<void> plan(ProcessPlan& process) {
  plan_timers(process.image, process.tape);
  return {};
}

}  // namespace

extern const StateModule kTimersModule{.name = "timers", .ask = ask, .check = check, .plan_late = plan};

}  // namespace vmckpt
