// What the kernel keeps about a process and shows to nobody: known from the recorder's notes alone, and lost in a restart.
// Landlock's rules cannot be had again, and a sandbox must not come back open: refused. The others are noted.
#include <algorithm>
#include <cerrno>

#include <sys/sem.h>
#include <sys/stat.h>

#include "core/proc.h"
#include "modules/module.h"
#include "tracer/ledger_reader.h"

namespace vmckpt {
namespace {

union SemaphoreArgument {  // semctl(2): the caller declares it
  int value;
  semid_ds* about;
};

// A set that has been removed owes nothing. One that may not be looked at is taken to be there.
bool is_removed(int set) {
  semid_ds about{};
  SemaphoreArgument argument{};
  argument.about = &about;
  return ::semctl(set, 0, IPC_STAT, argument) != 0 && (errno == EINVAL || errno == EIDRM);
}

bool is_directory(pid_t pid, int number) {
  struct stat status {};
  return ::stat(fmt::format("/proc/{}/fd/{}", pid, number).c_str(), &status) == 0 && S_ISDIR(status.st_mode);
}

Result<void> check_note(pid_t pid, const LedgerNote& note, std::vector<std::string>& notes) {
  switch (note.kind) {
    case NoteKind::kLandlock:
      return error(fmt::format("process {} has restricted itself with Landlock, whose rules the kernel does not show", pid),
                   "it would come back unrestricted: start it without its sandbox, or restrict `vmckpt launch` and `vmckpt "
                   "restart` instead");
    case NoteKind::kSemaphoreUndo:
      if (is_removed(static_cast<int>(note.value))) break;
      notes.push_back(fmt::format("the process has changed System V semaphore set {} with SEM_UNDO: the kernel takes that back "
                                  "when it ends, so that a restarted one finds other values than it left", note.value));
      break;
    case NoteKind::kDirectoryNotify:
      if (!is_directory(pid, note.fd)) break;
      notes.push_back(fmt::format("a restarted program gets no signals about the directory that descriptor {} watches (F_NOTIFY)",
                                  note.fd));
      break;
    default: break;
  }
  return {};
}

Result<void> check_hidden_state(pid_t pid, const Ledger& ledger, std::vector<std::string>& notes) {
  const uint32_t first = std::min(ledger.notes_used, kLedgerNotes);
  for (uint32_t i = 0; i < first; ++i) VMCKPT_TRY(check_note(pid, ledger.notes[i], notes));
  for (const LedgerNote& note : VMCKPT_TRY(read_further_notes(pid, ledger))) VMCKPT_TRY(check_note(pid, note, notes));
  return {};
}

Result<void> save(StateSave& save) { return check_hidden_state(save.pid, *save.ledger, save.notes); }

}  // namespace

extern const StateModule kHiddenStateModule{.name = "hidden state", .save = save};

}  // namespace vmckpt
