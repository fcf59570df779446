// File locks: flock(2), POSIX record locks (F_SETLK), open-file-description locks (F_OFD_SETLK) and leases
// (F_SETLEASE).
//
// Saved from the "lock:" lines of /proc/PID/fdinfo/N, which list the locks taken through this open file. Restart takes
// them without waiting; a lock that somebody else holds is an error, found by the preflight where the kernel can be
// asked.
//
// Locks come last of all: a process loses its POSIX locks on a file when it closes any descriptor of that file, and
// restart closes many. late_locks() lists them for those who close descriptors even later. Sources: proc_pid_fdinfo(5),
// fcntl(2) "Advisory record locking", fs/locks.c (lock_get_status). Linux 4.1 shows the lines.
#include <sys/file.h>
#include <unistd.h>

#include "core/proc.h"
#include "modules/descriptor_module.h"

namespace vmckpt {
namespace {

// "lock:\t1: POSIX  ADVISORY  WRITE 1234 fe:00:10952747 5 14": kind, mode, type, owner, file, first and last byte.
Result<pb::FileLock> parse_lock(const TargetFile& file, std::string_view line) {
  auto words = split_words(line);
  if (words.size() < 9) return error(fmt::format("{} has a lock of unknown form: {}", file.describe(), line));
  pb::FileLock lock;
  std::string_view kind = words[2], type = words[4], first = words[7], last = words[8];
  if (kind == "FLOCK") lock.set_kind(pb::FileLock::FLOCK);
  else if (kind == "POSIX") lock.set_kind(pb::FileLock::POSIX);
  else if (kind == "OFDLCK") lock.set_kind(pb::FileLock::OPEN_FILE);
  else if (kind == "LEASE") lock.set_kind(pb::FileLock::LEASE);
  else {
    return error(fmt::format("{} has a lock of kind {}, which vmckpt does not know", file.describe(), kind),
                 "let the program release it before the checkpoint");
  }
  // Somebody is waiting for the program to give the lease up or to downgrade it, for /proc/sys/fs/lease-break-time at most.
  if (lock.kind() == pb::FileLock::LEASE && words[3] == "BREAKING") {
    return error(fmt::format("{} has a lease that another process is breaking", file.describe()),
                 "checkpoint again when the program has answered");
  }
  lock.set_exclusive(type == "WRITE");
  lock.set_start(static_cast<uint64_t>(parse_number(first)));
  lock.set_bytes(last == "EOF" ? 0 : static_cast<uint64_t>(parse_number(last)) - lock.start() + 1);
  return lock;
}

struct flock to_flock(const pb::FileLock& lock) {
  struct flock range {};
  range.l_type = lock.exclusive() ? F_WRLCK : F_RDLCK;
  range.l_whence = SEEK_SET;
  range.l_start = static_cast<off_t>(lock.start());
  range.l_len = static_cast<off_t>(lock.bytes());
  return range;
}

int take(int fd, const pb::FileLock& lock) {
  struct flock range = to_flock(lock);
  switch (lock.kind()) {
    case pb::FileLock::FLOCK: return ::flock(fd, (lock.exclusive() ? LOCK_EX : LOCK_SH) | LOCK_NB);
    case pb::FileLock::POSIX: return ::fcntl(fd, F_SETLK, &range);
    case pb::FileLock::OPEN_FILE: return ::fcntl(fd, F_OFD_SETLK, &range);
    case pb::FileLock::LEASE: return ::fcntl(fd, F_SETLEASE, lock.exclusive() ? F_WRLCK : F_RDLCK);
    default: errno = EINVAL; return -1;
  }
}

constexpr const char* kLockCure =
    "end the process that holds it; a program that locks its files cannot run twice at a time";

}  // namespace

Result<void> save_locks(const TargetFile& file, pb::OpenFile* saved) {
  for (std::string_view line : fdinfo_lines(file.fdinfo, "lock:")) {
    *saved->add_locks() = VMCKPT_TRY(parse_lock(file, line));
  }
  return {};
}

void check_locks(CheckContext& context, const pb::OpenFile& file, const std::string& path, int located) {
  const std::string link = fmt::format("/proc/self/fd/{}", located);
  for (const pb::FileLock& lock : file.locks()) {
    if (lock.kind() == pb::FileLock::LEASE || lock.kind() == pb::FileLock::FLOCK) {
      if (lock.kind() == pb::FileLock::LEASE) continue;
      Fd fd(::open(link.c_str(), O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC));
      if (fd && take(fd.get(), lock) != 0 && errno == EWOULDBLOCK) {
        context.problem(
            error(fmt::format("file \"{}\" ({}) is locked by another process", path, describe(file)), kLockCure));
      }
      continue;
    }
    Fd fd(::open(link.c_str(), O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC));
    struct flock range = to_flock(lock);
    if (!fd || ::fcntl(fd.get(), F_OFD_GETLK, &range) != 0 || range.l_type == F_UNLCK) continue;
    std::string holder = range.l_pid > 0 ? fmt::format("process {} ({})", range.l_pid, command_of(range.l_pid))
                                         : std::string("another process");
    context.problem(error(fmt::format("file \"{}\" ({}) is locked by {}", path, describe(file), holder), kLockCure));
  }
}

Result<void> restore_locks(const RestoreContext& context, const pb::OpenFile& file) {
  const int fd = context.descriptors.lowest(file);
  for (const pb::FileLock& lock : file.locks()) {
    if (take(fd, lock) != 0) return errno_error("lock the file of " + describe(file), kLockCure);
  }
  return {};
}

std::vector<LateLock> late_locks(const pb::Image& image) {
  const DescriptorsOfFiles descriptors(one_process(image).descriptors);
  std::vector<LateLock> locks;
  for (const pb::OpenFile& file : image.open_files()) {
    for (const pb::FileLock& lock : file.locks()) {
      if (lock.kind() == pb::FileLock::POSIX) locks.push_back({descriptors.lowest(file), to_flock(lock)});
    }
  }
  return locks;
}

}  // namespace vmckpt
