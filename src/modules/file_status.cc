// State that fcntl(2) keeps with every open file description: status flags, and for signal-driven input and output the
// owner and the signal (F_SETOWN, F_SETOWN_EX, F_SETSIG, O_ASYNC).
//
// Status flags are mostly given when the object is made; here they are brought to exactly what they were. An owner that
// is a single thread other than the first does not exist yet at this point of a restart and is noted as lost. O_ASYNC
// comes when the file has its number (descriptors.cc). Sources: fcntl(2), F_SETOWN_EX since Linux 2.6.32.
#include <unistd.h>

#include "core/proc.h"
#include "modules/descriptor_module.h"

namespace vmckpt {
namespace {

constexpr uint32_t kSettable = O_APPEND | O_NONBLOCK | O_DIRECT | O_NOATIME;

Result<void> restore_async_io(RestoreContext& context, const pb::OpenFile& file, int fd) {
  const pb::AsyncIo& async = file.async();
  if (async.owner() != 0) {
    f_owner_ex owner{};
    owner.type = static_cast<decltype(owner.type)>(async.owner_kind());
    owner.pid = async.owner();
    if (::fcntl(fd, F_SETOWN_EX, &owner) != 0) {
      if (errno != ESRCH) return errno_error(describe(file) + ": set the receiver of its signals");
      context.note(fmt::format("{} no longer signals process or thread {}, which is not there at restart",
                               describe(file), async.owner()));
    }
  }
  if (async.signal() != 0 && ::fcntl(fd, F_SETSIG, async.signal()) != 0) {
    return errno_error(fmt::format("{}: set its signal {}", describe(file), async.signal()));
  }
  return {};
}

}  // namespace

Result<void> save_async_io(SaveContext& context, const TargetFile& file, int fd, pb::OpenFile* saved) {
  if ((file.flags & O_PATH) != 0) return {};
  f_owner_ex owner{};
  if (::fcntl(fd, F_GETOWN_EX, &owner) != 0) return errno_error(file.describe() + ": read the receiver of its signals");
  if (owner.pid != 0) {
    int32_t pid = context.pid_in_target(owner.pid);
    if (pid == 0) {
      context.note(fmt::format("{} signals process {} outside, which it will not do after a restart", file.describe(),
                               owner.pid));
    } else {
      saved->mutable_async()->set_owner_kind(owner.type);
      saved->mutable_async()->set_owner(pid);
    }
  }
  int signal = ::fcntl(fd, F_GETSIG);
  if (signal > 0) saved->mutable_async()->set_signal(signal);
  return {};
}

Result<void> restore_file_status(RestoreContext& context, const pb::OpenFile& file, int fd) {
  if ((file.status_flags() & O_PATH) != 0) return {};
  int now = ::fcntl(fd, F_GETFL);
  if (now < 0) return errno_error(describe(file) + ": read its status flags");
  uint32_t settable = context.shared_with_restart.count(file.id()) ? uint32_t{O_NONBLOCK} : kSettable;
  uint32_t wanted = (static_cast<uint32_t>(now) & ~settable) | (file.status_flags() & settable);
  if (wanted != static_cast<uint32_t>(now) && ::fcntl(fd, F_SETFL, wanted) != 0) {
    return errno_error(fmt::format("{}: set its status flags to {:#o}", describe(file), wanted));
  }
  return restore_async_io(context, file, fd);
}

int32_t SaveContext::pid_in_target(pid_t pid) const {
  for (const StoppedThread& thread : save.world.threads()) {
    if (thread.tid == pid) return thread.tid_in_target;
  }
  // NSpid has one number per PID namespace, from that of our /proc inwards. The target's own depth tells which is
  // meant.
  auto target = read_status(save.world.pid());
  auto other = read_status(pid);
  if (!target.ok() || !other.ok()) return 0;
  size_t depth = split_words(status_field(*target, "NSpid")).size();
  auto numbers = split_words(status_field(*other, "NSpid"));
  if (depth == 0 || numbers.size() < depth) return 0;
  return static_cast<int32_t>(parse_number(numbers[depth - 1]));
}

}  // namespace vmckpt
