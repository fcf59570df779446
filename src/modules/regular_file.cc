// What a path leads to: regular files, directories, block devices, and anything opened with O_PATH.
//
// Made by open(2) and its relatives; changed by lseek, read, write (position) and fcntl (flags, locks). Saved: path,
// access mode and flags, position, and what the file looked like (type, size, time of change, device and inode), not
// its content: that stays the user's affair, as with any program that is stopped and started again.
//
// Preflight: a path that is gone, leads to another type of file or may not be opened is a problem. A file that has
// changed is a note that says what changed: for a file being written (log, disk image) it is the normal course of
// things.
//
// A file whose path leads elsewhere by now (removed, or replaced by rename, while another hard link keeps it) is
// captured with its content like a deleted one; the link to the other name is lost then, and noted. A removed directory
// comes back as a removed directory. Files under /proc/PID of the target itself are kept as /proc/self, for the PID may
// be shown otherwise.
//
// Flags that act on opening only (O_CREAT, O_EXCL, O_TRUNC) are never repeated. Restore order is free.
// Sources: open(2), proc_pid_fd(5), Documentation/filesystems/proc.rst.
#include <cstdlib>

#include <linux/magic.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "core/proc.h"
#include "modules/descriptor_module.h"

namespace vmckpt {
namespace {

constexpr uint32_t kTmpfileBit = O_TMPFILE & ~O_DIRECTORY;
constexpr std::string_view kOwnProc = "/proc/self";

bool recognise(const TargetFile& file) {
  if (file.link.empty() || file.link[0] != '/') return false;
  if ((file.flags & O_PATH) != 0) return true;
  return (S_ISREG(file.status.st_mode) && has_ordinary_content(file)) || S_ISDIR(file.status.st_mode) ||
         S_ISBLK(file.status.st_mode);
}

bool opened_as_link(uint32_t mode) { return S_ISLNK(mode); }

// Whether the path leads to the file, seen from here or from the target's mount namespace.
bool is_same_file(const SaveContext& context, const std::string& path, const struct stat& status) {
  int flags = opened_as_link(status.st_mode) ? AT_SYMLINK_NOFOLLOW : 0;
  for (const std::string& seen : {path, "root" + path}) {
    struct stat there;
    if (::fstatat(context.proc, seen.c_str(), &there, flags) == 0 && there.st_dev == status.st_dev &&
        there.st_ino == status.st_ino) {
      return true;
    }
  }
  return false;
}

// The number that the target has in the /proc that the file belongs to: a target in a PID namespace has a /proc of its
// own.
pid_t own_number(const SaveContext& context, const TargetFile& file) {
  struct stat our_proc;
  bool ours = ::stat("/proc", &our_proc) == 0 && our_proc.st_dev == file.status.st_dev;
  return ours ? context.pid() : context.save.world.pid_in_target();
}

// The target's own folder in /proc under the name that is right in every PID namespace. Empty: a thread's folder, which
// does not exist yet when files are opened at restart.
std::string portable_path(const SaveContext& context, const TargetFile& file) {
  const std::string& path = file.link;
  if (!path.starts_with("/proc/")) return path;
  pid_t number = own_number(context, file);
  std::string own = fmt::format("/proc/{}", number);
  if (path != own && !path.starts_with(own + "/")) return path;
  std::string rest = path.substr(own.size());
  std::string threads = "/task/", leader = fmt::format("/task/{}", number);
  if (!rest.starts_with(threads)) return std::string(kOwnProc) + rest;
  if (rest != leader && !rest.starts_with(leader + "/")) return {};
  return fmt::format("{}/task/{}{}", kOwnProc, context.save.world.pid_in_target(), rest.substr(leader.size()));
}

void save_identity(const TargetFile& file, pb::PathFile* saved) {
  saved->set_mode(file.status.st_mode);
  saved->set_position(file.position);
  saved->set_device(file.status.st_dev);
  saved->set_inode(file.status.st_ino);
  saved->set_size_bytes(static_cast<uint64_t>(file.status.st_size));
  saved->set_mtime_sec(file.status.st_mtim.tv_sec);
  saved->set_mtime_nsec(file.status.st_mtim.tv_nsec);
  if (S_ISBLK(file.status.st_mode) || S_ISCHR(file.status.st_mode)) saved->set_device_number(file.status.st_rdev);
}

Result<void> save(SaveContext& context, const TargetFile& file, int fd, pb::OpenFile* saved) {
  std::string path = portable_path(context, file);
  if (path.empty()) {
    return error(file.describe() + " belongs to a single thread in /proc, which cannot be opened again at restart",
                 "let the program close it before the checkpoint");
  }
  pb::PathFile* path_file = saved->mutable_path_file();
  save_identity(file, path_file);
  path_file->set_path(path);
  bool own_proc = path != file.link;
  path_file->set_volatile_content(own_proc || is_pseudo_file(file));
  if (own_proc || file.file_system == PROC_SUPER_MAGIC || is_same_file(context, path, file.status)) return {};
  if (S_ISDIR(file.status.st_mode)) {
    path_file->set_deleted_directory(true);
    return {};
  }
  if (!S_ISREG(file.status.st_mode) || (file.flags & O_PATH) != 0 || path_file->volatile_content()) {
    return error(file.describe() + " is no longer what its path leads to, and cannot be opened again at restart",
                 "let the program close it before the checkpoint");
  }
  context.note(fmt::format("{} is no longer what its path leads to; its content is saved, its other names are not",
                           file.describe()));
  saved->clear_path_file();
  return save_captured(context, file, fd, saved);
}

const char* type_name(uint32_t mode) {
  switch (mode & S_IFMT) {
    case S_IFREG: return "a regular file";
    case S_IFDIR: return "a directory";
    case S_IFBLK: return "a block device";
    case S_IFCHR: return "a character device";
    case S_IFIFO: return "a FIFO";
    case S_IFSOCK: return "a socket";
    case S_IFLNK: return "a symbolic link";
    default: return "something else";
  }
}

bool belongs_to_target(const std::string& path) {
  return path == kOwnProc || path.starts_with(std::string(kOwnProc) + "/");
}

void check_access(CheckContext& context, const pb::OpenFile& file) {
  if ((file.status_flags() & O_PATH) != 0) return;
  int wanted = (can_read(file.status_flags()) ? R_OK : 0) | (can_write(file.status_flags()) ? W_OK : 0);
  if (::faccessat(AT_FDCWD, file.path_file().path().c_str(), wanted, AT_EACCESS) != 0) {
    context.problem(
        errno_error(fmt::format("file \"{}\" ({}) may not be opened again", file.path_file().path(), describe(file)),
                    "restart as the user who owns it, or change its permissions"));
  }
}

// Says what differs from the time of the checkpoint, if anything.
void note_changes(CheckContext& context, const pb::OpenFile& file, const struct stat& now) {
  const pb::PathFile& then = file.path_file();
  if (!S_ISREG(then.mode()) || then.volatile_content() || (file.status_flags() & O_PATH) != 0) return;
  bool size_changed = static_cast<uint64_t>(now.st_size) != then.size_bytes();
  bool time_changed = now.st_mtim.tv_sec != then.mtime_sec() || now.st_mtim.tv_nsec != then.mtime_nsec();
  if (!size_changed && !time_changed) return;
  std::string what = now.st_ino != then.inode() ? "has been replaced" : "has been changed";
  if (size_changed) what += fmt::format(" (size {} bytes, was {})", now.st_size, then.size_bytes());
  std::string text = fmt::format("file \"{}\" ({}) {} since the checkpoint", then.path(), describe(file), what);
  if (can_read(file.status_flags()) && then.position() > now.st_size) {
    text += fmt::format("; it now ends before the program's position {}", then.position());
  }
  context.note(text);
}

void check(CheckContext& context) {
  for (const pb::OpenFile& file : context.table.files()) {
    if (!file.has_path_file()) continue;
    const pb::PathFile& then = file.path_file();
    if (then.deleted_directory() || belongs_to_target(then.path())) continue;
    struct stat now;
    if (::fstatat(AT_FDCWD, then.path().c_str(), &now, opened_as_link(then.mode()) ? AT_SYMLINK_NOFOLLOW : 0) != 0) {
      context.problem(errno_error(fmt::format("file \"{}\" ({}) is missing", then.path(), describe(file)),
                                  "put it back where it was"));
      continue;
    }
    if ((now.st_mode & S_IFMT) != (then.mode() & S_IFMT)) {
      context.problem(error(fmt::format("\"{}\" ({}) is {} now and was {}", then.path(), describe(file),
                                        type_name(now.st_mode), type_name(then.mode())),
                            "put back what was there"));
      continue;
    }
    if (then.device_number() != 0 && now.st_rdev != then.device_number()) {
      context.note(fmt::format("\"{}\" ({}) is device {}:{} now and was {}:{}", then.path(), describe(file),
                               major(now.st_rdev), minor(now.st_rdev), major(then.device_number()),
                               minor(then.device_number())));
    }
    check_access(context, file);
    note_changes(context, file, now);
    check_locks(context, file, then.path());
  }
}

Result<Fd> open_removed_directory(const pb::OpenFile& file, int flags) {
  char name[] = "/tmp/vmckpt-removed-XXXXXX";
  if (::mkdtemp(name) == nullptr) return errno_error("make a folder in place of the removed one of " + describe(file));
  auto fd = open_file(name, flags);
  ::rmdir(name);
  return fd;
}

Result<Fd> open_again(RestoreContext& context, const pb::OpenFile& file) {
  const std::string& path = file.path_file().path();
  uint32_t dropped = kTmpfileBit | O_CREAT | O_EXCL | O_TRUNC | O_ASYNC;
  if (!S_ISDIR(file.path_file().mode())) dropped |= O_DIRECTORY;
  int flags = static_cast<int>(file.status_flags() & ~dropped) | O_NOCTTY;
  if (file.path_file().deleted_directory()) return open_removed_directory(file, flags);
  auto fd = open_file(path, flags);
  if (!fd.ok() && fd.error().err == EPERM && (flags & O_NOATIME) != 0) {
    context.note(
        fmt::format("file \"{}\" ({}) is open without O_NOATIME: it belongs to another user", path, describe(file)));
    return open_file(path, flags & ~O_NOATIME);
  }
  if (!fd.ok() && fd.error().err == EINVAL && (flags & O_DIRECT) != 0) {
    context.note(fmt::format("file \"{}\" ({}) is open without O_DIRECT: its file system has no direct access", path,
                             describe(file)));
    return open_file(path, flags & ~O_DIRECT);
  }
  return fd;
}

Result<void> restore(RestoreContext& context) {
  for (const pb::OpenFile& file : context.table.files()) {
    if (!file.has_path_file()) continue;
    Fd fd = VMCKPT_TRY(open_again(context, file));
    int64_t position = file.path_file().position();
    if (position != 0 && (file.status_flags() & O_PATH) == 0 && ::lseek(fd.get(), position, SEEK_SET) < 0) {
      return errno_error(fmt::format("{}: go to position {}", describe(file), position));
    }
    VMCKPT_TRY(context.put(file, std::move(fd)));
  }
  return {};
}

}  // namespace

bool has_ordinary_content(const TargetFile& file) {
  constexpr uint64_t kMessageQueue = 0x19800202;  // MQUEUE_MAGIC (ipc/mqueue.c)
  return file.link.starts_with("/") && file.file_system != kMessageQueue && file.file_system != SECRETMEM_MAGIC &&
         file.file_system != DMA_BUF_MAGIC;
}

// Size and times are of the moment.
bool is_pseudo_file(const TargetFile& file) {
  switch (file.file_system) {
    case PROC_SUPER_MAGIC:
    case SYSFS_MAGIC:
    case CGROUP_SUPER_MAGIC:
    case CGROUP2_SUPER_MAGIC:
    case DEBUGFS_MAGIC:
    case TRACEFS_MAGIC:
    case SECURITYFS_MAGIC: return true;
    default: return false;
  }
}

const DescriptorModule kRegularFileModule{"regular file", recognise, save, nullptr, check, restore};

}  // namespace vmckpt
