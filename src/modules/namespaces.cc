#include "modules/namespaces.h"

#include <utility>

#include "core/fd.h"
#include "core/proc.h"

namespace vmckpt {
namespace {

constexpr std::pair<const char*, const char*> kKinds[] = {
    {"net", "network"},
    {"mnt", "mount"},
    {"ipc", "IPC"},
    {"uts", "host name (UTS)"},
    {"cgroup", "cgroup"},
    {"user", "user"},
    {"pid", "PID"},
    {"pid_for_children", "PID (for its children)"},
    {"time", "time"},
    {"time_for_children", "time (for its children)"},
};

Namespaces read_links(const std::string& folder) {
  Namespaces found;
  for (const auto& [kind, words] : kKinds) {
    // A PID namespace for children that has none yet shows no link.
    auto link = read_link(folder + "/" + kind);
    if (link.ok()) found[kind] = *link;
  }
  return found;
}

}  // namespace

Result<void> check_root_directory(pid_t pid) {
  for (pid_t tid : VMCKPT_TRY(list_threads(pid))) {
    const auto root = read_link(fmt::format("/proc/{}/task/{}/root", pid, tid));
    if (!root.ok() || *root == "/") continue;
    return error(fmt::format("{} {} has the root directory {}, which restart cannot give it again",
                             tid == pid ? "process" : "thread", tid, *root),
                 fmt::format("start the program in it (`chroot {} vmckpt launch ...`), or tell it to keep its root directory",
                             *root));
  }
  return {};
}

Namespaces namespaces_of(pid_t pid) { return read_links(fmt::format("/proc/{}/ns", pid)); }

Result<void> check_namespaces(pid_t pid, const Namespaces& started_in) {
  const Namespaces allowed = started_in.empty() ? read_links("/proc/self/ns") : started_in;
  for (pid_t tid : VMCKPT_TRY(list_threads(pid))) {
    const Namespaces own = read_links(fmt::format("/proc/{}/task/{}/ns", pid, tid));
    std::string list;
    for (const auto& [kind, words] : kKinds) {
      auto now = own.find(kind), then = allowed.find(kind);
      const bool entered = now != own.end() && then != allowed.end() && now->second != then->second;
      if (entered) list += fmt::format("{}{}", list.empty() ? "" : ", ", words);
    }
    if (list.empty()) continue;
    return error(fmt::format("{} {} is in namespaces of its own, which restart cannot make again: {}",
                             tid == pid ? "process" : "thread", tid, list),
                 "start the program in them (`ip netns exec ... vmckpt launch ...`, `unshare ... vmckpt launch ...`)");
  }
  return {};
}

}  // namespace vmckpt
