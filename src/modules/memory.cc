// The address space as a module: what is mapped. Found by memory/address_space.h, which says what is saved and how; its pages are
// copied after the pause (memory/page_dump.h). Restored by restart/memory_plan.cc, which other modules' tapes stand behind.
#include "image/one_process.h"
#include "modules/module.h"

namespace vmckpt {
namespace {

Result<void> prepare(StateSave& state) {
  state.preview = VMCKPT_TRY(preview_address_space(state.pid, state.ledger->madvise_generation));
  return {};
}

Result<void> save(StateSave& state) {
  state.space = VMCKPT_TRY(save_address_space(*state.world, *state.ledger, state.preview, state.backing, state.memory_options,
                                              state.captured, &one_process(&state.image).memory));
  state.notes.insert(state.notes.end(), state.space.notes.begin(), state.space.notes.end());
  return {};
}

}  // namespace

extern const StateModule kMemoryModule{.name = "memory", .prepare = prepare, .save = save};

}  // namespace vmckpt
