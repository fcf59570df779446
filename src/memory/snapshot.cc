#include "memory/snapshot.h"

#include <utility>

#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/fd.h"
#include "memory/maps.h"

namespace vmckpt {
namespace {

// While the copy is written, each page that the target changes takes memory once more. When that runs short the copy must go, not
// the target, whose score it has inherited. Not an error when it fails: that takes a target that has made itself undumpable.
void offer_to_the_memory_killer(pid_t snapshot) {
  constexpr const char* kFirstOfAll = "1000";
  (void)write_file(fmt::format("/proc/{}/oom_score_adj", snapshot), kFirstOfAll);
}

}  // namespace

void Snapshot::ask(const StoppedWorld& world, const AddressSpaceSave& space, TapeDraft& leader) {
  // None must succeed: whatever one of them answers, the advice is put back.
  auto advise = [&](const std::vector<Vma>& vmas, int advice) {
    std::vector<size_t> calls;
    for (const Vma& vma : vmas)
      calls.push_back(leader.call(SYS_madvise, {vma.start, vma.bytes(), static_cast<uint64_t>(advice)}));
    return calls;
  };
  // The target's parent as the target sees it: from inside a PID namespace the supervisor is invisible, its number there is 0.
  const bool same_namespace = world.pid() == world.pid_in_target();
  const pid_t parent_in_target = same_namespace ? ::getpid() : 0;
  lifted_ = advise(space.not_forked, MADV_DOFORK);
  const std::vector<size_t> more = advise(space.wiped_on_fork, MADV_KEEPONFORK);
  lifted_.insert(lifted_.end(), more.begin(), more.end());
  fork_ = leader.call(kOpSnapshot, {static_cast<uint64_t>(parent_in_target)});
  advise(space.not_forked, MADV_DONTFORK);
  advise(space.wiped_on_fork, MADV_WIPEONFORK);
  state_ = State::kAsked;
}

void Snapshot::give_up(std::string why) {
  why_none_ = std::move(why);
  state_ = State::kNone;
}

TakeCopy Snapshot::taker() {
  return [this](Tracee copy) {
    copy_ = std::move(copy);
    state_ = State::kForked;
  };
}

Result<void> Snapshot::settle(const TapeDraft& leader) {
  if (state_ == State::kNone) return {};
  if (!leader.succeeded(fork_)) {
    errno = static_cast<int>(-leader.result(fork_));
    give_up(errno_error("the target could not be forked").message());
    return {};
  }
  for (size_t call : lifted_) {
    if (leader.succeeded(call)) continue;
    errno = static_cast<int>(-leader.result(call));
    return errno_error(fmt::format("let the snapshot have the memory at {:#x}", leader.all_calls()[call].args[0]), "try again");
  }
  if (state_ != State::kForked) return error("the forked snapshot was not seen by ptrace");
  // It starts with a stop of its own. From now on it dies with the supervisor, and runs to its waiting place.
  int status = 0;
  for (int round = 0; copy_.take_stop(&status) == 0; ++round) wait_for_child_signal(round);
  if (!WIFSTOPPED(status)) return error("the forked snapshot has ended");
  copy_.set_options(PTRACE_O_EXITKILL);
  offer_to_the_memory_killer(copy_.tid);
  if (!copy_.go_on()) return errno_error("let the forked snapshot run");
  state_ = State::kSettled;
  return {};
}

Result<void> Snapshot::check(const AddressSpaceSave& space) const {
  if (!exists()) return {};
  std::vector<Vma> copied = VMCKPT_TRY(read_maps(copy_.tid));
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
