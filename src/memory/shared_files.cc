#include "memory/shared_files.h"

#include <algorithm>
#include <filesystem>

#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core/proc.h"
#include "image/one_process.h"
#include "memory/file_access.h"
#include "memory/file_owner.h"
#include "memory/maps.h"

namespace vmckpt {
namespace {

constexpr char kCure[] = "restart with --shared-files=overwrite to put the image's content there all the same, or with "
                         "--shared-files=leave to go on with what the file holds now";

bool is_kept(const pb::CapturedFile& file) { return file.kind() == pb::CapturedFile::KEPT; }

std::string describe(const pb::CapturedFile& file) { return (is_kept(file) ? "mapped file " : "memory file ") + file.path(); }

bool is_of_owner(const pb::CapturedFile& file, const struct stat& now) {
  return !file.has_owner() || is_same_owner(static_cast<uid_t>(file.uid()), now.st_uid);
}

// On tmpfs the numbers of inodes start over with the machine: its owner tells another user's file from this one. And what
// has a second name may be a file that somebody has linked here.
bool is_same(const pb::CapturedFile& file, const struct stat& now) {
  return now.st_dev == file.device() && now.st_ino == file.inode() && static_cast<uint64_t>(now.st_size) == file.size_bytes() &&
         is_of_owner(file, now) && now.st_nlink == 1;
}

// By the time of its birth, if the image has that.
bool is_another_inode(const pb::CapturedFile& file, const pb::Image& image) {
  for (const pb::Mapping& mapping : one_process(image).memory.mappings()) {
    if (mapping.kind() != pb::Mapping::CAPTURED || mapping.captured_id() != file.id() || !mapping.file().has_origin()) continue;
    Fd fd(::open(file.path().c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC));
    return !is_same_inode(mapping.file().origin(), inode_of(fd.get()));
  }
  return false;
}

// Whether --shared-files=overwrite or leave may use what is there: not a third user's, who would read, or lose, what is in it.
bool may_be_used(const pb::CapturedFile& file, const struct stat& now) {
  return is_of_owner(file, now) || now.st_uid == ::geteuid();
}

std::string describe_difference(const pb::CapturedFile& file, const struct stat& now) {
  if (!is_of_owner(file, now)) return fmt::format("it belongs to user {} and belonged to {}", now.st_uid, file.uid());
  if (now.st_ino == file.inode() && now.st_dev == file.device()) {
    if (now.st_nlink != 1) return "it has another name, too";
    const auto bytes = static_cast<uint64_t>(now.st_size);
    if (bytes != file.size_bytes()) return fmt::format("it has {} bytes and had {}", bytes, file.size_bytes());
  }
  return "another file has its name by now";
}

// A process that maps the file, or has it open; 0 when none is seen. Processes of other users show nothing to an ordinary one.
pid_t find_user(const std::string& path, const struct stat& file) {
  std::error_code ignored;
  for (const auto& process : std::filesystem::directory_iterator("/proc", ignored)) {
    const std::string number = process.path().filename().string();
    if (number.find_first_not_of("0123456789") != std::string::npos) continue;
    const auto pid = static_cast<pid_t>(parse_number(number));
    if (pid == ::getpid()) continue;
    auto vmas = read_maps(pid);
    if (vmas.ok() &&
        std::any_of(vmas->begin(), vmas->end(), [&](const Vma& vma) { return vma.inode == file.st_ino && vma.name == path; }))
      return pid;
    for (const auto& entry : std::filesystem::directory_iterator(process.path() / "fd", ignored)) {
      struct stat open_file {};
      if (::stat(entry.path().c_str(), &open_file) == 0 && open_file.st_dev == file.st_dev && open_file.st_ino == file.st_ino)
        return pid;
    }
  }
  return 0;
}

void check_missing(const pb::CapturedFile& file, SharedFiles rule, std::vector<Error>& problems) {
  const std::string folder = std::filesystem::path(file.path()).parent_path().string();
  if (rule == SharedFiles::kLeave) {
    problems.push_back(error(describe(file) + " is missing", "restart without --shared-files=leave: the image has its content"));
  } else if (::faccessat(AT_FDCWD, folder.c_str(), W_OK | X_OK, AT_EACCESS) != 0) {
    problems.push_back(
        errno_error("make " + describe(file) + " again", "make the directory " + folder + " and let its user write there"));
  }
}

void check_present(const pb::CapturedFile& file, const pb::Image& image, const struct stat& now, SharedFiles rule,
                   std::vector<Error>& problems) {
  const std::string& path = file.path();
  if (!S_ISREG(now.st_mode)) {
    problems.push_back(error(describe(file) + " is no longer a regular file", "put back what was there"));
  } else if (::faccessat(AT_FDCWD, path.c_str(), R_OK | W_OK, AT_EACCESS) != 0) {
    problems.push_back(errno_error("open " + describe(file), "restart as the user who owns it, or change its permissions"));
  } else if (rule != SharedFiles::kRestore && !may_be_used(file, now)) {
    problems.push_back(
        error(fmt::format("{} is another user's: {}", describe(file), describe_difference(file, now)), "remove it"));
  } else if (rule == SharedFiles::kLeave && static_cast<uint64_t>(now.st_size) < file.size_bytes()) {
    problems.push_back(error(fmt::format("{} has {} bytes and had {}", describe(file), now.st_size, file.size_bytes()),
                             "put the old file back"));
  } else if (rule == SharedFiles::kRestore && (!is_same(file, now) || is_another_inode(file, image))) {
    const std::string cure = may_be_used(file, now) ? "remove it; " + std::string(kCure) : "remove it";
    problems.push_back(error(fmt::format("{} is not what it was: {}", describe(file), describe_difference(file, now)), cure));
  } else if (rule == SharedFiles::kRestore) {
    if (pid_t user = find_user(path, now); user != 0) {
      problems.push_back(error(fmt::format("{} is in use by process {} ({})", describe(file), user, command_of(user)),
                               "end that; " + std::string(kCure)));
    }
  }
}

// The path came from the kernel, without a symbolic link in it: one that is there now would lead to somebody else's file.
Fd open_without_links(const std::string& path, int flags) {
  open_how how{};
  how.flags = static_cast<uint64_t>(flags);
  if (flags & O_CREAT) how.mode = 0600;
  how.resolve = RESOLVE_NO_SYMLINKS;
  Fd fd(static_cast<int>(::syscall(SYS_openat2, AT_FDCWD, path.c_str(), &how, sizeof how)));
  if (fd || (errno != ENOSYS && errno != EPERM)) return fd;
  // A container's filter may not know openat2.
  const std::filesystem::path folder = std::filesystem::path(path).parent_path();
  std::error_code ignored;
  if (std::filesystem::canonical(folder, ignored) != folder) {
    errno = ELOOP;
    return Fd();
  }
  return Fd(::open(path.c_str(), flags | O_NOFOLLOW, 0600));
}

// Zeros, without giving up the size: pages that the image does not have are zero.
Result<void> empty(int fd, const pb::CapturedFile& file) {
  const auto size = static_cast<off_t>(file.size_bytes());
  if (size != 0 && ::fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, size) != 0 && ::ftruncate(fd, 0) != 0) {
    return errno_error("empty " + describe(file));
  }
  if (::ftruncate(fd, size) != 0) return errno_error(fmt::format("give {} its {} bytes", describe(file), size));
  return {};
}

}  // namespace

void check_shared_files(const pb::Image& image, const FileAccess& access, std::vector<Error>& problems,
                        std::vector<std::string>& notes) {
  const SharedFiles rule = access.policy().shared_files;
  for (const pb::CapturedFile& file : image.captured_files()) {
    if (file.path().empty() || (is_kept(file) && !is_put_back(file, access))) continue;
    const size_t before = problems.size();
    struct stat now {};
    const bool is_there = ::lstat(file.path().c_str(), &now) == 0;
    if (is_there) check_present(file, image, now, rule, problems);
    else if (errno == ENOENT) check_missing(file, rule, problems);
    else problems.push_back(errno_error("examine " + describe(file)));
    if (problems.size() != before) continue;
    if (rule == SharedFiles::kLeave) notes.push_back(describe(file) + " is used with what it holds now");
    else if (is_kept(file) && !is_there)
      notes.push_back(describe(file) + " is missing; it is made again as it was at the checkpoint");
  }
}

bool is_put_back(const pb::CapturedFile& file, const FileAccess& access) {
  const SharedFiles rule = access.policy().shared_files;
  if (file.path().empty() || rule == SharedFiles::kLeave) return false;
  if (!is_kept(file)) return true;
  pb::Inode then;
  then.set_number(file.inode());
  then.set_uid(file.uid());
  if (!may_have_content(access, then)) return false;
  if (rule == SharedFiles::kOverwrite) return true;
  struct stat now {};
  return ::lstat(file.path().c_str(), &now) != 0 && errno == ENOENT;
}

std::set<std::string> paths_put_back(const pb::Image& image, const FileAccess& access) {
  std::set<std::string> paths;
  for (const pb::CapturedFile& file : image.captured_files()) {
    if (is_put_back(file, access)) paths.insert(file.path());
  }
  return paths;
}

Result<Fd> open_shared_file(const pb::CapturedFile& file, const FileAccess& access) {
  const SharedFiles rule = access.policy().shared_files;
  const std::string& path = file.path();
  constexpr int kFlags = O_RDWR | O_NONBLOCK | O_CLOEXEC;
  // The target had it open: the very file is looked for below. Where any will do, it must be one that the target could open.
  auto open_existing = [&] { return open_without_links(path, kFlags).release(); };
  Fd fd(rule == SharedFiles::kRestore ? open_existing() : access.as_target(open_existing));
  if (!fd && errno != ENOENT) return errno_error("open " + describe(file));
  if (!fd && rule == SharedFiles::kLeave) return errno_error("open " + describe(file));
  if (!fd) {
    fd = Fd(access.as_target([&] { return open_without_links(path, kFlags | O_CREAT | O_EXCL).release(); }));
    if (!fd) return errno_error("make " + describe(file) + " again");
    // Only the owner's identity may be missing: a caller without privileges makes files of his own.
    (void)!::fchown(fd.get(), file.uid(), file.gid());
    if (::fchmod(fd.get(), static_cast<mode_t>(file.mode())) != 0) return errno_error("set the mode of " + describe(file));
  } else {
    struct stat now {};
    if (::fstat(fd.get(), &now) != 0) return errno_error("examine " + describe(file));
    // Once more: it may have been exchanged since the preflight.
    const bool is_it = rule == SharedFiles::kRestore ? !is_kept(file) && is_same(file, now) : may_be_used(file, now);
    if (!S_ISREG(now.st_mode) || !is_it) {
      return error(describe(file) + " has changed since it was looked at", "restart again");
    }
    if (rule == SharedFiles::kLeave) return fd;
  }
  VMCKPT_TRY(empty(fd.get(), file));
  return fd;
}

}  // namespace vmckpt
