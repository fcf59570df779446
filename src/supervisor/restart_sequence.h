// One restart, from the image's path to the running target.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "core/fd.h"
#include "core/result.h"
#include "memory/file_access.h"
#include "modules/host.h"
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

Result<RestartResult> restart_target(const RestartRequest& request);

}  // namespace vmckpt
