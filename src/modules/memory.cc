// The address space as a module: what is mapped. Found by memory/address_space.h, which says what is saved and how; its pages are
// copied after the pause (memory/page_dump.h). Restored by restart/memory_plan.cc, which other modules' tapes stand behind.
#include <fcntl.h>

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

Result<void> ask(Questions& questions) {
  questions.when_answered([brk = ask_brk(questions.leader())](const std::vector<TapeDraft>& tapes, pb::Image& image) {
    save_brk(brk, tapes.front(), &one_process(&image).memory);
  });
  return {};
}

// Files for the tapes to map. Without the executable, only its link in /proc is lost: what is mapped of it comes from its
// mappings.
Result<void> restore(StateRestore& state) {
  pb::FileIdentity now;
  auto executable = open_mapped_file(one_process(state.image).memory.executable(), O_RDONLY, state.access, &now);
  if (executable.ok()) state.executable = VMCKPT_TRY(state.lift(std::move(*executable)));
  return state.captured.rebuild(state.reader, state.first_service_fd, state.access);
}

}  // namespace

extern const StateModule kMemoryModule{.name = "memory", .prepare = prepare, .save = save, .ask = ask, .restore = restore};

}  // namespace vmckpt
