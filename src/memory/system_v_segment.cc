#include "memory/system_v_segment.h"

#include <fcntl.h>
#include <sys/ipc.h>
#include <sys/shm.h>
#include <unistd.h>

#include "core/fd.h"
#include "core/proc.h"

namespace vmckpt {
namespace {

constexpr uint32_t kPermissions = 0777;

std::string describe(const pb::SystemVSegment& segment) {
  return fmt::format("the System V shared memory segment {} (key {:#x})", segment.id(), static_cast<uint32_t>(segment.key()));
}

// An id can be asked for with the right to restore checkpoints (Documentation/admin-guide/sysctl/kernel.rst, shm_next_id).
void ask_for_id(int id) {
  auto file = open_file("/proc/sys/kernel/shm_next_id", O_WRONLY);
  if (!file.ok()) return;
  const std::string text = std::to_string(id);
  (void)!::write(file->get(), text.data(), text.size());
}

// What the target left behind when it was killed: its own segment, with nobody attached.
bool is_left_over(int id, const shmid_ds& found, const pb::SystemVSegment& segment) {
  return id == segment.id() && found.shm_nattch == 0 && found.shm_segsz == segment.size_bytes() &&
         found.shm_perm.uid == segment.uid() && found.shm_perm.__key == segment.key();
}

}  // namespace

bool is_system_v_name(const std::string& name) { return name.starts_with("/SYSV") && name.ends_with(" (deleted)"); }

Result<pb::SystemVSegment> describe_segment(pid_t target, int id) {
  if (VMCKPT_TRY(read_link(fmt::format("/proc/{}/ns/ipc", target))) != VMCKPT_TRY(read_link("/proc/self/ns/ipc"))) {
    return error(fmt::format("System V segment {} is in an IPC namespace of the target's own", id));
  }
  const std::string table = VMCKPT_TRY(read_whole_file("/proc/sysvipc/shm"));
  for (std::string_view line : split_lines(table)) {
    // key shmid perms size cpid lpid nattch uid gid ...
    auto words = split_words(line);
    if (words.size() < 9 || words[0] == "key" || parse_number(words[1]) != id) continue;
    const auto mode = static_cast<uint32_t>(std::stoul(std::string(words[2]), nullptr, 8));
    pb::SystemVSegment segment;
    segment.set_id(id);
    segment.set_key(static_cast<int32_t>(parse_number(words[0])));
    segment.set_mode(mode & kPermissions);
    segment.set_removed((mode & SHM_DEST) != 0);
    segment.set_size_bytes(static_cast<uint64_t>(parse_number(words[3])));
    segment.set_uid(static_cast<uint32_t>(parse_number(words[7])));
    segment.set_gid(static_cast<uint32_t>(parse_number(words[8])));
    return segment;
  }
  return error(fmt::format("System V segment {} is not in /proc/sysvipc/shm", id));
}

Result<int> make_segment(const pb::SystemVSegment& segment) {
  shmid_ds found{};
  const bool there = ::shmctl(segment.id(), IPC_STAT, &found) == 0;
  if (there && !segment.removed() && is_left_over(segment.id(), found, segment)) return segment.id();
  if (!there) ask_for_id(segment.id());
  const int id = ::shmget(segment.removed() ? IPC_PRIVATE : segment.key(), segment.size_bytes(),
                          IPC_CREAT | IPC_EXCL | static_cast<int>(segment.mode()));
  if (id < 0) {
    return errno_error("make " + describe(segment) + " again",
                       errno == EEXIST ? "another program has it: end that, or remove the segment with ipcrm" : "");
  }
  // Only the owner's identity may be missing: a caller without privileges makes segments of his own.
  found = {};
  if (::shmctl(id, IPC_STAT, &found) == 0 && (found.shm_perm.uid != segment.uid() || found.shm_perm.gid != segment.gid())) {
    found.shm_perm.uid = segment.uid();
    found.shm_perm.gid = segment.gid();
    (void)::shmctl(id, IPC_SET, &found);
  }
  return id;
}

}  // namespace vmckpt
