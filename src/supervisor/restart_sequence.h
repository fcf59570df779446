// One restart, from the image's path to the running target, as an object that goes through named phases:
//
//     verify     the image is whole, its metadata say what can be
//     preflight  this host has all that it needs; all problems are told at once, nothing has been started
//     create     a process with the old number
//     rebuild    it opens descriptors and does what hosted code can do
//     play       the player makes memory, threads, signals, timers
//     take over  the player goes, registers and masks come
//     run        the target goes on
//
// A phase that fails, or is interrupted (SIGINT, SIGTERM, SIGHUP, SIGQUIT, or whoever is looked after meanwhile), is the last:
// the destructor ends what was made. The image is untouched whatever happens.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/fd.h"
#include "core/result.h"
#include "core/waiting.h"
#include "image/reader.h"
#include "memory/file_access.h"
#include "modules/host.h"
#include "restart/new_process.h"
#include "supervisor/phase_clock.h"
#include "supervisor/target.h"

namespace vmckpt {

struct RestartRequest {
  std::string image;
  std::string name;  // empty: the image's
  // Called with the image's name when all checks have passed and nothing has been started: makes sure of the control socket.
  std::function<Result<void>(const pb::Target&)> claim_name;
  // Called with the notes right before the target runs, so that its own output comes after them.
  std::function<void(const std::vector<std::string>&)> tell_notes;
  CpuCheck cpu_check = CpuCheck::kStrict;
  FilePolicy files;
  GuestClock guest_clock = GuestClock::kContinue;
  // Called while a phase waits for the new process, from `claim_name` on. Returns soon; its Error ends the restart.
  std::function<Result<void>()> look_after_others;
  bool detached = false;
  int64_t started_us = 0;  // CLOCK_MONOTONIC when the command started
};

struct RestartResult {
  Target target;
  int64_t restart_us = 0;  // command start until the target's threads run
  std::vector<std::pair<std::string, int64_t>> phases;
  std::vector<std::string> notes;
  Fd terminal_master;          // of the terminal that stands in for one that restart has not: keep it open, drain it
  bool group_stopped = false;  // it was stopped by job control, and is again
};

class Restart {
 public:
  // `request` outlives it, and may get its name in `claim_name`.
  explicit Restart(const RestartRequest& request);
  ~Restart();
  Restart(const Restart&) = delete;
  Restart& operator=(const Restart&) = delete;

  // Goes through the next phase, in the thread that has made all others. An Error is the end of the restart.
  Result<void> advance();
  bool is_complete() const;
  RestartResult take_result() { return std::move(result_); }

 private:
  struct Phase {
    const char* name;
    Result<void> (Restart::*run)();
  };
  struct Work;
  static const Phase kPhases[];
  static constexpr size_t kCreate = 2;  // of kPhases

  Result<void> verify();
  Result<void> preflight();
  Result<void> create();
  Result<void> rebuild();
  Result<void> play();
  Result<void> take_over();
  Result<void> run();

  const RestartRequest& request_;
  Meanwhile meanwhile_;
  PhaseClock clock_;
  size_t next_ = 0;
  std::optional<ImageReader> image_;
  Surroundings surroundings_ = Surroundings::kAny;
  std::vector<std::string> early_notes_;  // until the process was made
  std::unique_ptr<Work> work_;
  RestartResult result_;
};

// All phases.
Result<RestartResult> restart_target(const RestartRequest& request);

}  // namespace vmckpt
