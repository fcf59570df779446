#include "memory/file_owner.h"

#include <algorithm>
#include <cerrno>

#include <sys/syscall.h>
#include <unistd.h>

#include "core/proc.h"
#include "memory/file_access.h"

namespace vmckpt {
namespace {

constexpr uid_t kOverflowUser = 65534;  // /proc/sys/kernel/overflowuid, which nobody changes

bool has_number_here(uid_t uid) {
  auto map = read_whole_file("/proc/self/uid_map");
  if (!map.ok()) return true;
  const auto lines = split_lines(*map);
  return std::any_of(lines.begin(), lines.end(), [&](std::string_view line) {
    const auto words = split_words(line);
    if (words.size() != 3) return false;
    const int64_t first = parse_number(words[0]);
    return uid >= first && uid - first < parse_number(words[2]);
  });
}

}  // namespace

bool is_same_owner(uid_t then, uid_t now) { return then == now || (now == kOverflowUser && !has_number_here(then)); }

bool is_same_owner(const pb::Inode& then, uid_t now) { return then.number() == 0 || is_same_owner(then.uid(), now); }

Error another_users(const std::string& path, const pb::Inode& then, uid_t now) {
  return Error{fmt::format("\"{}\" belongs to user {} and belonged to {} at the checkpoint", path, now, then.uid()), EPERM,
               "put back what was there, or pass --changed-files=accept"};
}

bool may_have_content(const FileAccess& access, const pb::Inode& then) {
  if (!access.is_foreign()) return true;
  uid_t target = 0;
  auto ask = [&] {
    target = static_cast<uid_t>(::syscall(SYS_setfsuid, uid_t(-1)));
    return 0;
  };
  return access.as_target(ask) == 0 && then.number() != 0 && then.uid() == target;
}

}  // namespace vmckpt
