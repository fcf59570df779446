// What a path leads to: regular files, directories, block devices, and anything opened with O_PATH.
//
// Made by open(2) and its relatives; changed by lseek, read, write (position) and fcntl (flags, locks). Saved: path,
// access mode and flags, position, and what the file looked like (type, size, time of change, device, inode, birth,
// owner). Its content stays the user's affair, as with any program that is stopped and started again, with one
// exception: a small file that is open for writing is copied, in case that it is a temporary one that the program
// renames or removes before it ends. Where it is missing at restart it is made again from the copy.
// A program whose rights are not the caller's gets copies of its own files alone.
//
// Preflight, a problem each: a path that is gone, leads to another type of file or over a symbolic link, or may not be
// opened. Files are opened with the rights that the program had (memory/file_access.h). A file that has changed:
//
//   written to in place, or locked   a problem (--changed-files=accept: a note): a virtual machine or a database has in
//                                    memory what it knows of the file, and would destroy it
//   written to at its end            a note: a log; what came after the checkpoint is written over
//   opened for appending             nothing, when it only has more in it now; otherwise a note
//   only read                        a note
//   another user's by now            a problem (--changed-files=accept: a note)
//
// Numbers 0 to 2 that cannot be opened again are restart's own, as if they had been a pipe (stdio.cc).
//
// A file whose path leads elsewhere by now (removed, or replaced by rename, while another hard link keeps it) is opened
// by the other name, if that is in the same folder; otherwise it is captured with its content like a deleted one, the
// link to the other name is lost, and that is noted. A removed directory comes back as a removed directory, a removed
// symbolic link as one. Files under /proc/PID of the target itself are kept as /proc/self, for the PID may be shown
// otherwise.
//
// Flags that act on opening only (O_CREAT, O_EXCL, O_TRUNC) are never repeated. Restore order is free.
// Sources: open(2), proc_pid_fd(5), Documentation/filesystems/proc.rst.
#include <climits>
#include <cstdlib>

#include <dirent.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "core/proc.h"
#include "memory/file_owner.h"
#include "modules/credentials.h"
#include "modules/descriptor_module.h"
#include "modules/regular_file.pb.h"

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

constexpr std::string_view kDeletedMark = " (deleted)";
constexpr int kMaxNamesLookedAt = 10'000;

enum class Leads { kHere, kElsewhere, kUnknown };

// Where the path leads, seen from here or from the target's mount namespace. Unknown: a folder may not be searched.
Leads where_path_leads(const SaveContext& context, const std::string& path, const struct stat& status) {
  int flags = opened_as_link(status.st_mode) ? AT_SYMLINK_NOFOLLOW : 0;
  bool denied = false;
  for (const std::string& seen : {path, "root" + path}) {
    struct stat there;
    if (::fstatat(context.proc, seen.c_str(), &there, flags) != 0) {
      denied |= errno == EACCES;
    } else if (there.st_dev == status.st_dev && there.st_ino == status.st_ino) {
      return Leads::kHere;
    }
  }
  return denied && !path.ends_with(kDeletedMark) ? Leads::kUnknown : Leads::kElsewhere;
}

// Another name of the file in the folder in which it was opened; empty when there is none.
std::string find_other_name(const SaveContext& context, const TargetFile& file) {
  std::string path = file.link;
  if (path.ends_with(kDeletedMark)) path.resize(path.size() - kDeletedMark.size());
  const std::string folder = path.substr(0, path.rfind('/') + 1);
  int fd = ::openat(context.proc, ("root" + folder).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR* names = fd < 0 ? nullptr : ::fdopendir(fd);
  if (names == nullptr) return {};
  std::string found;
  for (int i = 0; i < kMaxNamesLookedAt && found.empty(); ++i) {
    const dirent* entry = ::readdir(names);
    if (entry == nullptr) break;
    struct stat there;
    if (entry->d_ino == file.status.st_ino && ::fstatat(fd, entry->d_name, &there, AT_SYMLINK_NOFOLLOW) == 0 &&
        there.st_dev == file.status.st_dev && there.st_ino == file.status.st_ino) {
      found = folder + entry->d_name;
    }
  }
  ::closedir(names);
  return found;
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

void save_identity(const TargetFile& file, int fd, pb::PathFile* saved) {
  saved->set_mode(file.status.st_mode);
  saved->set_position(file.position);
  saved->set_device(file.status.st_dev);
  saved->set_inode(file.status.st_ino);
  saved->set_size_bytes(static_cast<uint64_t>(file.status.st_size));
  saved->set_mtime_sec(file.status.st_mtim.tv_sec);
  saved->set_mtime_nsec(file.status.st_mtim.tv_nsec);
  if (S_ISBLK(file.status.st_mode) || S_ISCHR(file.status.st_mode)) saved->set_device_number(file.status.st_rdev);
  *saved->mutable_origin() = inode_of(fd);
}

Result<void> save_without_path(SaveContext& context, const TargetFile& file, int fd, pb::OpenFile* saved) {
  pb::PathFile* path_file = saved->MutableExtension(pb::path_file);
  if (S_ISDIR(file.status.st_mode)) {
    if (!file.link.ends_with(kDeletedMark)) {
      return error(fmt::format("{} is a directory that is there but that no path leads to: of a mount that was never attached, "
                               "that has been taken away, or that another one hides",
                               file.describe()),
                   "attach the mount, or let the program close the directory before the checkpoint");
    }
    path_file->set_deleted_directory(true);
    return {};
  }
  const bool content_matters = S_ISREG(file.status.st_mode) && !path_file->volatile_content();
  if (std::string other = content_matters ? find_other_name(context, file) : std::string(); !other.empty()) {
    path_file->set_path(other);
    return {};
  }
  if (S_ISLNK(file.status.st_mode)) {
    char text[PATH_MAX];
    ssize_t length = ::readlinkat(fd, "", text, sizeof text);
    if (length <= 0) return errno_error("read the removed symbolic link " + file.describe());
    path_file->set_link_text(text, static_cast<size_t>(length));
    return {};
  }
  if (!content_matters) {
    return error(fmt::format("{} has been removed or replaced, and is {}, which cannot be made again at restart",
                             file.describe(), type_name(file.status.st_mode)),
                 "let the program close it before the checkpoint");
  }
  if (file.status.st_nlink > 0) {
    context.note(fmt::format("{} is no longer what its path leads to; its content is saved, its other names are not",
                             file.describe()));
  }
  saved->ClearExtension(pb::path_file);
  return save_captured(context, file, fd, saved);
}

bool is_in_temporary_folder(const SaveContext& context, const std::string& path) {
  for (std::string_view folder : {"/tmp/", "/var/tmp/", "/dev/shm/"}) {
    if (path.starts_with(folder)) return true;
  }
  auto environment = read_whole_file(fmt::format("/proc/{}/environ", context.pid()));
  if (!environment.ok()) return false;
  for (const std::string& variable : split_nul(*environment)) {
    if (variable.starts_with("TMPDIR=/") && path.starts_with(variable.substr(7) + "/")) return true;
  }
  return false;
}

// With this process's rights any file can be read: what is in the image can come back to the target.
bool may_be_read_by_target(const SaveContext& context, const TargetFile& file) {
  if (can_read(file.flags)) return true;
  auto status = read_status(context.pid());
  if (!status.ok()) return false;
  pb::Credentials target;
  save_credentials(*status, &target);
  if (target.uid_size() != 4) return false;
  return !file_access_of(target, {}).is_foreign() || file.status.st_uid == target.uid(3);
}

// A file that the program is writing may be a temporary one: renamed or removed by the time of the restart.
void keep_content(SaveContext& context, const TargetFile& file, int fd, pb::OpenFile* saved) {
  pb::PathFile* path_file = saved->MutableExtension(pb::path_file);
  if (!S_ISREG(file.status.st_mode) || path_file->volatile_content() || !can_write(file.flags)) return;
  if ((file.flags & O_PATH) != 0) return;
  if (!context.save.captured.has_room_to_keep(static_cast<uint64_t>(file.status.st_size))) {
    const bool looks_permanent = (file.flags & O_APPEND) != 0 || saved->locks_size() != 0;
    if (looks_permanent || !is_in_temporary_folder(context, path_file->path())) return;
    context.note(fmt::format("{} is open for writing in a directory for temporary files, and too large to be saved; once the "
                             "program has renamed or removed it, a restart needs --missing-files=empty",
                             file.describe()));
    return;
  }
  if (!may_be_read_by_target(context, file)) return;
  auto id = capture_content(context, file, fd, true);
  if (!id.ok()) return;  // it may be written but not read
  path_file->set_content_id(*id);
}

// What was written to it is the trigger (kernel: Documentation/accounting/psi.rst), and nobody can read that back.
void note_pressure_trigger(SaveContext& context, const TargetFile& file) {
  constexpr uint64_t kCgroupMagic = 0x63677270;  // CGROUP2_SUPER_MAGIC
  const std::string_view link = file.link;
  const bool has_pressure = (file.file_system == PROC_SUPER_MAGIC && link.find("/pressure/") != std::string_view::npos) ||
                            (file.file_system == kCgroupMagic && link.ends_with(".pressure"));
  if (!has_pressure || (file.flags & O_ACCMODE) == O_RDONLY) return;
  context.note(fmt::format("{}: a restarted program has no trigger on it, and must write it again", file.describe()));
}

Result<void> save(SaveContext& context, const TargetFile& file, int fd, pb::OpenFile* saved) {
  std::string path = portable_path(context, file);
  if (path.empty()) {
    return error(file.describe() + " belongs to a single thread in /proc, which cannot be opened again at restart",
                 "let the program close it before the checkpoint");
  }
  pb::PathFile* path_file = saved->MutableExtension(pb::path_file);
  save_identity(file, fd, path_file);
  path_file->set_path(path);
  bool own_proc = path != file.link;
  path_file->set_volatile_content(own_proc || is_pseudo_file(file));
  note_pressure_trigger(context, file);
  if (own_proc || file.file_system == PROC_SUPER_MAGIC) return {};
  const Leads leads = where_path_leads(context, path, file.status);
  if (leads == Leads::kElsewhere) return save_without_path(context, file, fd, saved);
  if (leads == Leads::kUnknown) {
    context.note(fmt::format("{} lies in a directory that you may not search: {}", file.describe(),
                             file.stdio() >= 0 ? "after a restart it will be restart's own"
                                               : "a restart needs the right to open it"));
  }
  keep_content(context, file, fd, saved);
  return {};
}

// The copy serves all that is open of the same file.
Result<void> share_kept_content(SaveContext& context) {
  std::map<std::pair<uint64_t, uint64_t>, uint64_t> kept;
  for (const pb::OpenFile& file : context.image.open_files()) {
    const pb::PathFile& path_file = file.GetExtension(pb::path_file);
    if (path_file.content_id() != 0) kept[{path_file.device(), path_file.inode()}] = path_file.content_id();
  }
  for (pb::OpenFile& file : *context.image.mutable_open_files()) {
    if (!file.HasExtension(pb::path_file)) continue;
    auto found = kept.find({file.GetExtension(pb::path_file).device(), file.GetExtension(pb::path_file).inode()});
    if (found != kept.end()) file.MutableExtension(pb::path_file)->set_content_id(found->second);
  }
  return {};
}

bool belongs_to_target(const std::string& path) {
  return path == kOwnProc || path.starts_with(std::string(kOwnProc) + "/");
}

// Standard input, output and error may be restart's own instead: for the two that are written it is as good as any other.
bool may_be_own(const DescriptorsOfFiles& descriptors, const pb::OpenFile& file, int error) {
  if (descriptors.stdio(file) < 0) return false;
  return !can_read(file.status_flags()) || error == EACCES || error == EPERM;
}

bool is_seen_by_path(const pb::OpenFile& file) {
  const pb::PathFile& then = file.GetExtension(pb::path_file);
  return file.HasExtension(pb::path_file) && !then.deleted_directory() && then.link_text().empty() &&
         !belongs_to_target(then.path());
}

// /proc and /sys give out new inodes as they like.
FileAccess access_to(const FileAccess& access, const pb::PathFile& file) {
  return file.volatile_content() ? access.accepting_others() : access;
}

// The target makes a missing file again: content that it could write, but not read, is nothing that it may have.
bool has_content(const FileAccess& access, const pb::PathFile& file) {
  return file.content_id() != 0 && may_have_content(access, file.origin());
}

int located_flags(const pb::PathFile& file) {
  return opened_as_link(file.mode()) ? O_NOFOLLOW : S_ISDIR(file.mode()) ? O_DIRECTORY : 0;
}

void check_access(CheckContext& context, const pb::OpenFile& file, int located) {
  if ((file.status_flags() & O_PATH) != 0) return;
  int wanted = (can_read(file.status_flags()) ? R_OK : 0) | (can_write(file.status_flags()) ? W_OK : 0);
  if (context.access.permits(located, wanted, file.GetExtension(pb::path_file).origin())) return;
  if (may_be_own(context.descriptors, file, errno)) return;
  context.problem(errno_error(fmt::format("file \"{}\" ({}) may not be opened again", file.GetExtension(pb::path_file).path(),
                                          describe(file)),
                              "restart as the user who owns it, or change its permissions"));
}

// What has become of a regular file since the checkpoint.
struct Change {
  bool size = false, time = false, inode = false;
  bool any() const { return size || time; }
};

Change change_of(const pb::PathFile& then, const struct stat& now) {
  return {static_cast<uint64_t>(now.st_size) != then.size_bytes(),
          now.st_mtim.tv_sec != then.mtime_sec() || now.st_mtim.tv_nsec != then.mtime_nsec(),
          now.st_ino != then.inode()};
}

std::string describe_change(const pb::OpenFile& file, const Change& change, const struct stat& now) {
  const pb::PathFile& then = file.GetExtension(pb::path_file);
  std::string what = change.inode ? "has been replaced" : "has been changed";
  if (change.size) what += fmt::format(" (size {} bytes, was {})", now.st_size, then.size_bytes());
  std::string text = fmt::format("file \"{}\" (descriptor {}) {} since the checkpoint", then.path(), file.shown_number(), what);
  if (can_read(file.status_flags()) && then.position() > now.st_size) {
    text += fmt::format("; it now ends before the program's position {}", then.position());
  }
  return text;
}

bool is_compared(const pb::PathFile& then, uint32_t flags) {
  return S_ISREG(then.mode()) && !then.volatile_content() && (flags & O_PATH) == 0;
}

// See the head of this file.
void check_changes(CheckContext& context, const pb::OpenFile& file, const struct stat& now) {
  const pb::PathFile& then = file.GetExtension(pb::path_file);
  if (!is_compared(then, file.status_flags())) return;
  // Whoever owns a file can make its size and time what they were.
  if (!is_same_owner(then.origin(), now.st_uid)) {
    Error problem = another_users(then.path(), then.origin(), now.st_uid);
    problem.what = fmt::format("{}: {}", describe(file), problem.what);
    if (context.access.policy().accept_changed) context.note(problem.what);
    else if (may_be_own(context.descriptors, file, EPERM)) return;
    else return context.problem(std::move(problem));
  }
  const Change change = change_of(then, now);
  if (!change.any()) return;
  const bool writes = can_write(file.status_flags());
  const bool appends = writes && (file.status_flags() & O_APPEND) != 0;
  const bool has_grown = !change.inode && static_cast<uint64_t>(now.st_size) >= then.size_bytes();
  if (appends && has_grown) return;
  const bool at_its_end = !can_read(file.status_flags()) && static_cast<uint64_t>(then.position()) >= then.size_bytes();
  const bool is_stream = appends || context.descriptors.stdio(file) >= 0 || (at_its_end && has_grown);
  const bool guarded = file.locks_size() != 0 || (writes && !is_stream);
  std::string text = describe_change(file, change, now);
  if (!guarded || context.access.policy().accept_changed) {
    if (writes && !appends && has_grown && is_stream) text += "; the program goes on at its old position in it";
    return context.note(std::move(text));
  }
  text += fmt::format("; the program {}, and going on from what it knew could destroy it",
                      writes ? "was writing to it" : "had it locked");
  context.problem(error(std::move(text),
                        "put it back as it was, its time included (cp -p), or pass --changed-files=accept"));
}

// A file that is gone: whether restart can make another, says what it will do.
void check_missing(CheckContext& context, const pb::OpenFile& file, const Error& why) {
  const pb::PathFile& then = file.GetExtension(pb::path_file);
  const FilePolicy& policy = context.access.policy();
  const std::string folder = then.path().substr(0, std::max<size_t>(then.path().rfind('/'), 1));
  const bool content = has_content(context.access, then);
  const bool has_folder = context.access.accepting_others().locate(folder, O_DIRECTORY, {}).ok();
  if (S_ISREG(then.mode()) && !then.volatile_content()) {
    if (has_folder && content) {
      return context.note(fmt::format("file \"{}\" ({}) is missing; it is made again as it was at the checkpoint",
                                      then.path(), describe(file)));
    }
    if (policy.empty_missing) {
      return context.note(fmt::format("file \"{}\" ({}) is missing; {}", then.path(), describe(file),
                                      !has_folder ? "so is its directory, and it has no name now"
                                                  : "it is created again, without its content"));
    }
  }
  if (may_be_own(context.descriptors, file, ENOENT)) return;
  const bool can_be_empty = S_ISREG(then.mode()) && !then.volatile_content();
  context.problem(Error{fmt::format("file \"{}\" ({}) is missing", then.path(), describe(file)), why.err,
                        can_be_empty ? "put it back where it was, or pass --missing-files=empty" : "put it back where it was"});
}

void check_file(CheckContext& context, const pb::OpenFile& file) {
  const pb::PathFile& then = file.GetExtension(pb::path_file);
  auto located = access_to(context.access, then).locate(then.path(), located_flags(then), then.origin());
  struct stat now;
  if (!located.ok() && located.error().err == ENOENT) return check_missing(context, file, located.error());
  if (!located.ok() && located.error().err != ENOTDIR) {
    if (may_be_own(context.descriptors, file, located.error().err)) return;
    Error problem = located.error();
    problem.what = fmt::format("{}: {}", describe(file), problem.what);
    if (problem.cure.empty()) problem.cure = "restart as the user who owns it, or put back what was there";
    return context.problem(std::move(problem));
  }
  // With O_DIRECTORY what is no folder is not found: what is it?
  auto other = located.ok() ? std::move(located) : access_to(context.access, then).locate(then.path(), O_NOFOLLOW, then.origin());
  if (!other.ok()) return check_missing(context, file, other.error());
  if (::fstat(other->get(), &now) != 0) return context.problem(errno_error("look at " + describe(file)));
  if ((now.st_mode & S_IFMT) != (then.mode() & S_IFMT)) {
    if (may_be_own(context.descriptors, file, ENOENT)) return;
    return context.problem(error(fmt::format("\"{}\" ({}) is {} now and was {}", then.path(), describe(file),
                                             type_name(now.st_mode), type_name(then.mode())),
                                 "put back what was there"));
  }
  if (then.device_number() != 0 && now.st_rdev != then.device_number()) {
    context.note(fmt::format("\"{}\" ({}) is device {}:{} now and was {}:{}", then.path(), describe(file),
                             major(now.st_rdev), minor(now.st_rdev), major(then.device_number()),
                             minor(then.device_number())));
  }
  check_access(context, file, other->get());
  check_changes(context, file, now);
  check_locks(context, file, then.path(), other->get());
}

void check(CheckContext& context) {
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (is_seen_by_path(file) && context.put_back.count(file.GetExtension(pb::path_file).path()) == 0) check_file(context, file);
  }
}

// Opens files again, and makes those that are missing.
class Opener {
 public:
  explicit Opener(RestoreContext& context) : context_(context) {}

  Result<Fd> open_again(const pb::OpenFile& file) {
    const pb::PathFile& then = file.GetExtension(pb::path_file);
    uint32_t dropped = kTmpfileBit | O_CREAT | O_EXCL | O_TRUNC | O_ASYNC;
    if (!S_ISDIR(then.mode())) dropped |= O_DIRECTORY;
    int flags = static_cast<int>(file.status_flags() & ~dropped) | O_NOCTTY;
    if (then.deleted_directory()) return access().make_removed_directory(flags);
    if (!then.link_text().empty()) return access().make_removed_link(then.link_text());
    if (belongs_to_target(then.path())) return open_file(then.path(), flags);
    auto fd = open(then, flags);
    if (!fd.ok() && fd.error().err == EPERM && (flags & O_NOATIME) != 0) {
      context_.note(fmt::format("file \"{}\" ({}) is open without O_NOATIME: it belongs to another user", then.path(),
                                describe(file)));
      return open(then, flags & ~O_NOATIME);
    }
    if (!fd.ok() && fd.error().err == EINVAL && (flags & O_DIRECT) != 0) {
      context_.note(fmt::format("file \"{}\" ({}) is open without O_DIRECT: its file system has no direct access",
                                then.path(), describe(file)));
      return open(then, flags & ~O_DIRECT);
    }
    return fd;
  }

 private:
  const FileAccess& access() const { return context_.restore.access; }

  Result<Fd> open(const pb::PathFile& then, int flags) {
    if (int shared = context_.restore.captured.fd_of_path(then.path()); shared >= 0) return reopen(shared, flags & ~O_NOFOLLOW);
    if (auto nameless = nameless_.find(then.path()); nameless != nameless_.end()) {
      return reopen(nameless->second.get(), flags & ~O_NOFOLLOW);
    }
    auto made = made_.find(then.path());
    if (made != made_.end()) return access().open(then.path(), flags, made->second);
    auto fd = access_to(access(), then).open(then.path(), flags, then.origin());
    if (fd.ok() && is_compared(then, static_cast<uint32_t>(flags)) && !access().policy().accept_changed) {
      // Once more: it may have been exchanged since the preflight.
      const pb::Inode now = inode_of(fd->get());
      if (!is_same_owner(then.origin(), now.uid())) return another_users(then.path(), then.origin(), now.uid());
    }
    const bool can_be_made = S_ISREG(then.mode()) && !then.volatile_content() &&
                             (has_content(access(), then) || access().policy().empty_missing);
    if (fd.ok() || fd.error().err != ENOENT || !can_be_made) return fd;
    auto again = make(then);
    if (!again.ok() && again.error().err == ENOENT && !access().policy().empty_missing) return fd;
    VMCKPT_TRY(std::move(again));
    return open(then, flags);
  }

  Result<void> make(const pb::PathFile& then) {
    auto fd = access().create(then.path(), O_RDWR | O_NOFOLLOW, 0600);
    const bool has_folder = fd.ok();
    if (!fd.ok() && fd.error().err == ENOENT && access().policy().empty_missing) {
      fd = context_.lift(Fd(::memfd_create("missing", MFD_CLOEXEC)));
    }
    Fd made = VMCKPT_TRY(std::move(fd));
    if (has_content(access(), then)) VMCKPT_TRY(context_.restore.captured.fill(then.content_id(), made.get()));
    // Only now: nobody else has it open while it gets its content and its owner.
    if (has_folder && ::fchmod(made.get(), then.mode() & 07777) != 0) return errno_error("set the mode of " + then.path());
    if (has_folder) made_[then.path()] = inode_of(made.get());
    else nameless_[then.path()] = std::move(made);
    return {};
  }

  RestoreContext& context_;
  std::map<std::string, pb::Inode> made_;
  std::map<std::string, Fd> nameless_;  // whose folder is missing too
};

Result<Fd> open_or_attach(RestoreContext& context, Opener& opener, const pb::OpenFile& file, bool* attached) {
  auto fd = opener.open_again(file);
  if (fd.ok() || !may_be_own(context.descriptors, file, fd.error().err)) return fd;
  *attached = true;
  context.note(fmt::format("{} cannot be opened again ({}); restart's own takes its place", describe(file),
                           fd.error().message()));
  return attach_stdio(context, file, context.descriptors.stdio(file));
}

Result<void> restore(RestoreContext& context) {
  Opener opener(context);
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (!file.HasExtension(pb::path_file)) continue;
    bool attached = false;
    Fd fd = VMCKPT_TRY(open_or_attach(context, opener, file, &attached));
    int64_t position = file.GetExtension(pb::path_file).position();
    if (!attached && position != 0 && (file.status_flags() & O_PATH) == 0 && ::lseek(fd.get(), position, SEEK_SET) < 0) {
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

const DescriptorModule kRegularFileModule{"regular file", recognise, save, share_kept_content, check, restore};

}  // namespace vmckpt
