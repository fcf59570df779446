#include "memory/file_access.h"

#include <algorithm>

#include <fcntl.h>
#include <linux/capability.h>
#include <linux/openat2.h>
#include <sys/fsuid.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core/clock.h"

namespace vmckpt {
namespace {

// Those that decide about files: what the kernel takes away with a change of the file-system user id (capability.h,
// CAP_FS_MASK).
constexpr uint64_t kFileCapabilities = uint64_t{1} << CAP_CHOWN | uint64_t{1} << CAP_MKNOD |
                                       uint64_t{1} << CAP_DAC_OVERRIDE | uint64_t{1} << CAP_DAC_READ_SEARCH |
                                       uint64_t{1} << CAP_FOWNER | uint64_t{1} << CAP_FSETID |
                                       uint64_t{1} << CAP_LINUX_IMMUTABLE | uint64_t{1} << CAP_MAC_OVERRIDE;

struct Capabilities {
  __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct data[2]{};

  bool get() { return ::syscall(SYS_capget, &header, data) == 0; }
  bool set() { return ::syscall(SYS_capset, &header, data) == 0; }
  uint64_t effective() const { return uint64_t{data[1].effective} << 32 | data[0].effective; }
  uint64_t permitted() const { return uint64_t{data[1].permitted} << 32 | data[0].permitted; }
  void set_effective(uint64_t bits) {
    data[0].effective = static_cast<uint32_t>(bits);
    data[1].effective = static_cast<uint32_t>(bits >> 32);
  }
};

// The ids of this thread alone: libc's setgroups would change those of all.
bool set_groups(const std::vector<gid_t>& groups) {
  return ::syscall(SYS_setgroups, groups.size(), groups.empty() ? nullptr : groups.data()) == 0;
}

bool set_file_user(uid_t uid) {
  ::syscall(SYS_setfsuid, uid);
  return static_cast<uid_t>(::syscall(SYS_setfsuid, uid_t(-1))) == uid;
}

bool set_file_group(gid_t gid) {
  ::syscall(SYS_setfsgid, gid);
  return static_cast<gid_t>(::syscall(SYS_setfsgid, gid_t(-1))) == gid;
}

// One component after the other, each looked at before it is entered: for kernels and filters without openat2.
int walk_without_links(const std::string& path, int flags, mode_t mode) {
  Fd folder(::open(path.starts_with("/") ? "/" : ".", O_PATH | O_DIRECTORY | O_CLOEXEC));
  if (!folder) return -1;
  for (size_t at = path.find_first_not_of('/'); at != std::string::npos;) {
    const size_t end = path.find('/', at);
    const size_t next = end == std::string::npos ? end : path.find_first_not_of('/', end);
    const std::string name = path.substr(at, end == std::string::npos ? end : end - at);
    if (next == std::string::npos) return ::openat(folder.get(), name.c_str(), flags | O_NOFOLLOW | O_CLOEXEC, mode);
    Fd inner(::openat(folder.get(), name.c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC));
    if (!inner) return -1;
    struct stat status {};
    if (::fstat(inner.get(), &status) != 0) return -1;
    if (!S_ISDIR(status.st_mode)) {
      errno = S_ISLNK(status.st_mode) ? ELOOP : ENOTDIR;
      return -1;
    }
    folder = std::move(inner);
    at = next;
  }
  return ::openat(folder.get(), ".", flags | O_CLOEXEC);
}

int open_without_links(const std::string& path, int flags, mode_t mode = 0) {
  open_how how{};
  how.flags = static_cast<uint64_t>(static_cast<unsigned>(flags)) | O_CLOEXEC;
  how.mode = mode;
  how.resolve = RESOLVE_NO_SYMLINKS;
  for (;;) {
    long fd = ::syscall(SYS_openat2, AT_FDCWD, path.c_str(), &how, sizeof how);
    if (fd >= 0) return static_cast<int>(fd);
    if (errno == EINTR || errno == EAGAIN) continue;
    if (errno == ENOSYS || errno == EPERM) break;  // EPERM: a container's filter that does not know the call
    return -1;
  }
  int fd = walk_without_links(path, flags, mode);
  struct stat status {};
  if (fd < 0 || (flags & O_PATH) == 0 || (flags & O_NOFOLLOW) != 0) return fd;
  if (::fstat(fd, &status) != 0 || !S_ISLNK(status.st_mode)) return fd;
  ::close(fd);
  errno = ELOOP;
  return -1;
}

Error exchanged(const std::string& path, const char* how) {
  return Error{fmt::format("\"{}\" {}", path, how), 0, "put back what was there"};
}

Error cannot_open(const std::string& path) {
  if (errno == ELOOP) {
    Error failed = exchanged(path, "leads over a symbolic link now, and did not at the checkpoint");
    failed.err = ELOOP;
    return failed;
  }
  return errno_error("open " + path);
}

Error another_file(const std::string& path, bool may_accept) {
  Error failed = exchanged(path, "is another file than at the checkpoint, and the program had other rights than you");
  if (may_accept) failed.cure += ", or pass --changed-files=accept to open it with the program's rights";
  return failed;
}

}  // namespace

pb::Inode inode_of(int fd) {
  pb::Inode inode;
  struct stat status {};
  if (::fstat(fd, &status) != 0) return inode;
  inode.set_device(status.st_dev);
  inode.set_number(status.st_ino);
  inode.set_uid(status.st_uid);
  inode.set_gid(status.st_gid);
  struct statx more {};
  if (::statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_BTIME, &more) == 0 && (more.stx_mask & STATX_BTIME) != 0) {
    inode.set_birth_ns(to_ns({more.stx_btime.tv_sec, more.stx_btime.tv_nsec}));
  }
  return inode;
}

// A device's number may be another one after a reboot. An inode's number is used again after the file has gone, but not
// with the same time of birth.
bool is_same_inode(const pb::Inode& then, const pb::Inode& now) {
  if (then.number() == 0 || then.number() != now.number()) return false;
  if (then.birth_ns() != 0 || now.birth_ns() != 0) return then.birth_ns() == now.birth_ns();
  return then.device() == now.device() && then.uid() == now.uid() && then.gid() == now.gid();
}

FileAccess::FileAccess(const FileRights& target, FilePolicy policy) : policy_(policy) {
  uid_ = target.uid;
  gid_ = target.gid;
  groups_ = target.groups;
  effective_ = target.effective;
  Capabilities own;
  // In a user namespace made for the restart this process has all capabilities there, but over its own files only.
  constexpr uint64_t kOverride = uint64_t{1} << CAP_DAC_OVERRIDE, kReadSearch = uint64_t{1} << CAP_DAC_READ_SEARCH;
  const bool fewer = ::geteuid() == 0 && own.get() && (own.effective() & (kOverride | kReadSearch)) != 0 &&
                     (effective_ & kOverride) == 0;
  foreign_ = uid_ != ::geteuid() || gid_ != ::getegid() || fewer;
}

FileAccess::AsTarget::AsTarget(const FileAccess& access) {
  if (access.foreign_) holds_ = take(access);
}

bool FileAccess::AsTarget::take(const FileAccess& access) {
  Capabilities own;
  int count = ::getgroups(0, nullptr);
  if (count < 0 || !own.get()) return false;
  groups_.resize(static_cast<size_t>(count));
  if (::getgroups(count, groups_.data()) < 0) return false;
  uid_ = static_cast<uid_t>(::syscall(SYS_setfsuid, uid_t(-1)));
  gid_ = static_cast<gid_t>(::syscall(SYS_setfsgid, gid_t(-1)));
  effective_ = own.effective();
  dumpable_ = ::prctl(PR_GET_DUMPABLE);
  changed_ = true;
  groups_changed_ = groups_ != access.groups_;
  if ((groups_changed_ && !set_groups(access.groups_)) || !set_file_group(access.gid_) || !set_file_user(access.uid_)) {
    errno = EPERM;
    return false;
  }
  if (!own.get()) return false;  // another user id has changed them
  own.set_effective((effective_ & ~kFileCapabilities) | (access.effective_ & own.permitted() & kFileCapabilities));
  return own.set();
}

FileAccess::AsTarget::~AsTarget() {
  if (!changed_) return;
  const int error = errno;
  // The right to change the groups is not among those given away.
  VMCKPT_CHECK(set_file_user(uid_) && set_file_group(gid_));
  Capabilities own;
  VMCKPT_CHECK(own.get());
  own.set_effective(effective_);
  VMCKPT_CHECK(own.set());
  // Where the groups could not be taken on there is nothing to give back.
  VMCKPT_CHECK(!groups_changed_ || set_groups(groups_) || !holds_);
  if (dumpable_ == 1) ::prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);  // a change of ids has taken it away
  errno = error;
}

Result<Fd> FileAccess::locate(const std::string& path, int flags, const pb::Inode& then) const {
  const int how = O_PATH | (flags & (O_NOFOLLOW | O_DIRECTORY));
  Fd fd(as_target([&] { return open_without_links(path, how); }));
  const bool out_of_reach = !fd && foreign_ && errno == EACCES;
  if (out_of_reach) fd = Fd(open_without_links(path, how));
  if (!fd) return cannot_open(path);
  if (!foreign_ || is_same_inode(then, inode_of(fd.get()))) return fd;
  if (out_of_reach || !policy_.accept_changed) return another_file(path, !out_of_reach);
  return fd;
}

Result<Fd> FileAccess::open(const std::string& path, int flags, const pb::Inode& then) const {
  if ((flags & O_PATH) != 0) return locate(path, flags, then);
  if (!foreign_) {
    Fd fd(open_without_links(path, flags));
    if (!fd) return cannot_open(path);
    return fd;
  }
  Fd place = VMCKPT_TRY(locate(path, flags & O_DIRECTORY, then));
  const pb::Inode found = inode_of(place.get());
  // Through /proc it is the file that was looked at, whatever becomes of its name meanwhile. A flag that shows in F_GETFL
  // wants the name: then the two are compared.
  const std::string link = fmt::format("/proc/self/fd/{}", place.get());
  auto open_it = [&] {
    if ((flags & O_NOFOLLOW) == 0) return ::open(link.c_str(), flags | O_CLOEXEC);
    return open_without_links(path, flags);
  };
  Fd fd(as_target(open_it));
  if (!fd && (errno == EACCES || errno == EPERM) && is_same_inode(then, found)) fd = Fd(open_it());
  if (!fd) return errno_error("open " + path);
  if (!is_same_inode(found, inode_of(fd.get()))) return another_file(path, false);
  return fd;
}

Result<Fd> FileAccess::create(const std::string& path, int flags, mode_t mode) const {
  const mode_t before = ::umask(0);
  Fd fd(as_target([&] { return open_without_links(path, flags | O_CREAT | O_EXCL | O_NOCTTY, mode); }));
  ::umask(before);
  if (!fd) return cannot_open(path);
  return fd;
}

Result<Fd> FileAccess::make_removed_directory(int flags) const {
  char name[] = "/tmp/vmckpt-removed-XXXXXX";
  if (as_target([&] { return ::mkdtemp(name) == nullptr ? -1 : 0; }) != 0) {
    return errno_error("make a directory in place of a removed one", "make /tmp a directory that the program may write to");
  }
  Fd fd(as_target([&] { return open_without_links(name, flags | O_DIRECTORY | O_NOFOLLOW); }));
  const int error = errno;
  as_target([&] { return ::rmdir(name); });  // the folder is the target's: its user may have put another there
  errno = error;
  if (!fd) return errno_error(fmt::format("open the directory {}", name));
  return fd;
}

Result<Fd> FileAccess::make_removed_link(const std::string& text) const {
  char folder[] = "/tmp/vmckpt-removed-XXXXXX";
  const std::string cure = "make /tmp a directory that the program may write to";
  if (as_target([&] { return ::mkdtemp(folder) == nullptr ? -1 : 0; }) != 0) {
    return errno_error("make a directory for a symbolic link in place of a removed one", cure);
  }
  const std::string link = std::string(folder) + "/link";
  Fd fd(as_target([&] {
    if (::symlink(text.c_str(), link.c_str()) != 0) return -1;
    return open_without_links(link, O_PATH | O_NOFOLLOW);
  }));
  const int error = errno;
  as_target([&] {
    ::unlink(link.c_str());
    return ::rmdir(folder);
  });
  errno = error;
  if (!fd) return errno_error("make a symbolic link in place of a removed one", cure);
  return fd;
}

bool FileAccess::permits(int located, int wanted, const pb::Inode& then) const {
  const std::string link = fmt::format("/proc/self/fd/{}", located);
  auto ask = [&] { return ::faccessat(AT_FDCWD, link.c_str(), wanted, AT_EACCESS); };
  if (as_target(ask) == 0) return true;
  return foreign_ && is_same_inode(then, inode_of(located)) && ask() == 0;
}

}  // namespace vmckpt
