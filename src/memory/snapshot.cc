#include "memory/snapshot.h"

#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "core/fd.h"
#include "memory/maps.h"

namespace vmckpt {

SnapshotQuestion ask_snapshot(const AddressSpaceSave& space, pid_t parent_in_target, TapeDraft& tape) {
  SnapshotQuestion question{};
  // None must succeed: whatever one of them answers, the advice is put back.
  auto advise = [&](const std::vector<Vma>& vmas, int advice) {
    std::vector<size_t> calls;
    for (const Vma& vma : vmas) calls.push_back(tape.call(SYS_madvise, {vma.start, vma.bytes(), static_cast<uint64_t>(advice)}));
    return calls;
  };
  question.lifted = advise(space.not_forked, MADV_DOFORK);
  std::vector<size_t> more = advise(space.wiped_on_fork, MADV_KEEPONFORK);
  question.lifted.insert(question.lifted.end(), more.begin(), more.end());
  question.call = tape.call(kOpSnapshot, {static_cast<uint64_t>(parent_in_target)});
  advise(space.not_forked, MADV_DONTFORK);
  advise(space.wiped_on_fork, MADV_WIPEONFORK);
  return question;
}

namespace {

// While the copy is written, each page that the target changes takes memory once more. When that runs short the copy must go, not
// the target, whose score it has inherited. Not an error when it fails: that takes a target that has made itself undumpable.
void offer_to_the_memory_killer(pid_t snapshot) {
  constexpr const char* kFirstOfAll = "1000";
  (void)write_file(fmt::format("/proc/{}/oom_score_adj", snapshot), kFirstOfAll);
}

}  // namespace

bool was_forked(const SnapshotQuestion& question, const TapeDraft& tape) {
  if (tape.succeeded(question.call)) return true;
  errno = static_cast<int>(-tape.result(question.call));
  return false;
}

Result<void> settle_snapshot(const SnapshotQuestion& question, const TapeDraft& tape, SnapshotChild& snapshot) {
  for (size_t call : question.lifted) {
    if (tape.succeeded(call)) continue;
    errno = static_cast<int>(-tape.result(call));
    return errno_error(fmt::format("let the snapshot have the memory at {:#x}", tape.all_calls()[call].args[0]), "try again");
  }
  if (!was_forked(question, tape)) {
    return errno_error("fork the snapshot", "free memory, raise vm.overcommit or RLIMIT_NPROC, or checkpoint with --stop");
  }
  Tracee& copy = snapshot.copy();
  if (copy.tid == 0) return error("the forked snapshot was not seen by ptrace");
  // It starts with a stop of its own. From now on it dies with the supervisor, and runs to its waiting place.
  int status = 0;
  for (int round = 0; copy.take_stop(&status) == 0; ++round) wait_for_child_signal(round);
  if (!WIFSTOPPED(status)) return error("the forked snapshot has ended");
  copy.set_options(PTRACE_O_EXITKILL);
  offer_to_the_memory_killer(copy.tid);
  if (!copy.go_on()) return errno_error("let the forked snapshot run");
  return {};
}

Result<void> check_snapshot(const SnapshotChild& snapshot, const AddressSpaceSave& space) {
  std::vector<Vma> copied = VMCKPT_TRY(read_maps(snapshot.pid()));
  auto vma = copied.begin();  // both lists are sorted
  for (const DumpRange& range : space.ranges) {
    uint64_t reached = range.start;
    while (vma != copied.end() && vma->end <= reached) ++vma;
    for (auto next = vma; next != copied.end() && next->start <= reached && reached < range.end; ++next) reached = next->end;
    if (reached >= range.end) continue;
    return error(fmt::format("the forked snapshot lacks memory at {:#x}", reached),
                 "the program changed its fork advice meanwhile; try again");
  }
  return {};
}

}  // namespace vmckpt
