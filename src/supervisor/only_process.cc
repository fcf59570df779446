#include "supervisor/only_process.h"

#include <algorithm>

#include <ctime>
#include <fcntl.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/fd.h"
#include "core/proc.h"

namespace vmckpt {
namespace {

Result<std::vector<pid_t>> processes_of(const Target& target) {
  std::vector<pid_t> processes = VMCKPT_TRY(list_descendants(::getpid()));
  std::erase(processes, target.namespace_init);
  // Orphans that have ended and that the service loop has not reaped yet.
  std::erase_if(processes, [](pid_t pid) {
    auto stat = read_stat(pid);
    return stat.ok() && stat->size() > 1 && (*stat)[0] == "Z" && parse_number((*stat)[1]) == ::getpid();
  });
  return processes;
}

}  // namespace

// Until the coordinator takes on whole trees: one process. `others`: there are more.
Result<pid_t> only_process(const Target& target, bool& others) {
  std::vector<pid_t> processes = VMCKPT_TRY(processes_of(target));
  if (processes.empty()) return error(fmt::format("target \"{}\" has ended", target.name));
  if (processes.size() == 1) {
    if (!process_exists(processes.front())) return error(fmt::format("target \"{}\" has ended", target.name));
    return processes.front();
  }
  others = true;
  std::string list;
  for (pid_t pid : processes) list += fmt::format("{}{} ({})", list.empty() ? "" : ", ", pid, command_of(pid));
  return error(fmt::format("target \"{}\" has {} processes: {}", target.name, processes.size(), list),
               "one process can be checkpointed, trees cannot yet; wait until its children have ended");
}

// The same when `pid` stands still, and with it the only one that could start others. Its children come first: a middle process
// of a double fork that has ended meanwhile is a zombie there, or has already passed its child on to who adopts orphans.
Result<void> still_only_process(const Target& target, pid_t pid, bool& others) {
  others = !VMCKPT_TRY(list_children(pid)).empty();
  for (pid_t adopter : {::getpid(), target.namespace_init}) {
    if (adopter == 0) continue;
    for (pid_t child : VMCKPT_TRY(list_children(adopter))) {
      others |= child != pid && child != target.namespace_init && process_exists(child);
    }
  }
  if (!others) return {};
  return error(fmt::format("process {} has just started another", pid), "try again when that has ended");
}

// Whether it is worth while to wait: a program that has just started another often ends it soon; one that has run for longer is
// there to stay.
bool others_may_end_soon(const Target& target) {
  constexpr size_t kStartTime = 19;  // of read_stat()
  constexpr int64_t kYoungNs = 3'000'000'000;
  auto processes = processes_of(target);
  if (!processes.ok()) return false;
  const int64_t now_ns = clock_ns(CLOCK_BOOTTIME), tick_ns = kNsPerSecond / ::sysconf(_SC_CLK_TCK);
  if (processes->size() <= 1) return true;  // they have ended
  return std::any_of(processes->begin(), processes->end(), [&](pid_t pid) {
    auto stat = read_stat(pid);
    if (pid == target.pid || !stat.ok() || stat->size() <= kStartTime) return false;
    return now_ns - parse_number((*stat)[kStartTime]) * tick_ns < kYoungNs;
  });
}

// A process that has become another user can be looked into by root with CAP_SYS_PTRACE only, which containers leave out.
Result<void> check_may_look_into(pid_t pid) {
  const auto maps = open_file(fmt::format("/proc/{}/maps", pid), O_RDONLY);
  if (maps.ok() || maps.error().err != EACCES) return {};
  auto status = VMCKPT_TRY(read_status(pid));
  const auto ids = split_words(status_field(status, "Uid"));
  return error(fmt::format("the kernel does not let vmckpt look into process {}, which runs as user {}", pid,
                           ids.empty() ? "?" : ids[0]),
               "give vmckpt CAP_SYS_PTRACE (docker run --cap-add=SYS_PTRACE), or let the program stay the user that launches it");
}

}  // namespace vmckpt
