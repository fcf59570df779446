#include "supervisor/freeze_at_rest.h"

#include <algorithm>
#include <optional>
#include <utility>

#include <unistd.h>

#include "tracer/ledger_reader.h"

namespace vmckpt {

Result<StoppedWorld> freeze_at_rest(StateSave& state, RemoteAddr ledger_address, const Waiting& waiting) {
  constexpr int kTries = 50;  // a ledger update lasts microseconds
  constexpr int kLedgerUpdateUs = 200;  // between two of them
  constexpr int64_t kStopUs = 1'000'000;  // to stop again, when the time is over: what it was not ready for is told then
  const pid_t pid = state.pid;
  std::optional<VcpuGate>& gate = state.gate;
  std::optional<StoppedWorld> world;
  world.emplace(VMCKPT_TRY(freeze(pid, waiting, state.interrupted)));
  for (int tries = 1;; ++tries) {
    state.ledger = VMCKPT_TRY(read_ledger(pid, ledger_address));
    std::optional<VcpuGate::Busy> busy;
    if (gate && state.has_split_irqchip)
      VMCKPT_TRY(gate->serve_requests(*world, waiting.no_shorter_than(kStopUs), state.interrupted));
    if (gate) busy = VMCKPT_TRY(gate->find_busy(*world));
    const bool submitting = state.ledger->aio_submitters != 0;
    if (state.ledger->writers == 0 && !submitting && !busy) return std::move(*world);
    // Submitting may mean waiting for a disk, as answering an access may.
    if ((submitting || busy) && !waiting.is_over()) tries = std::min(tries, kTries - 1);
    if (tries >= kTries && busy) return error(busy->describe(pid), "try again, or with a longer --freeze-timeout");
    if (tries >= kTries && submitting) {
      return error(fmt::format("process {} is submitting asynchronous I/O without end", pid),
                   "try again when its disks are less busy");
    }
    if (tries >= kTries) {
      return error(fmt::format("process {} stays inside an update of its ledger", pid), "try again");
    }
    auto wait = [&](const Waiting& how_long) -> Result<bool> {
      if (busy) return gate->wait_for(*busy, how_long);
      VMCKPT_TRY(how_long.check());
      ::usleep(kLedgerUpdateUs);
      return true;
    };
    if (world->is_stopped_by_job_control()) {
      constexpr int64_t kSliceUs = 500;
      StoppedWorld later = VMCKPT_TRY(freeze_later(std::move(*world), [&] { return wait(waiting.no_longer_than(kSliceUs)); },
                                                   waiting.no_shorter_than(kSliceUs), state.interrupted));
      world.emplace(std::move(later));
    } else {
      world->resume();
      VMCKPT_TRY(wait(waiting));
      world.emplace(VMCKPT_TRY(freeze(pid, waiting.no_shorter_than(kStopUs), state.interrupted)));
    }
  }
}

}  // namespace vmckpt
