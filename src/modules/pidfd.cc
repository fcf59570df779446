// pidfd_open(2), CLONE_PIDFD: a descriptor that refers to a process.
//
// Its only state is which process. The target's own is opened again. Any other process is not part of the checkpoint,
// or has ended: at restart the descriptor refers to a process that has just ended, so it polls readable and signals
// through it give ESRCH; a note says so unless the process had ended already. Restore order is free; the short-lived
// child is made without a termination signal, so that the target never sees a SIGCHLD. Descriptors of one process share
// an inode since Linux 6.9, by which programs compare them (before, all have the same one): they are opened again on one
// ended process. Sources:
// pidfd_open(2), clone(2); fdinfo has Pid and NSpid since Linux 5.2, PIDFD_THREAD exists since 6.9.
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <sched.h>

#include "core/proc.h"
#include "modules/descriptor_module.h"
#include "modules/pidfd.pb.h"

namespace vmckpt {
namespace {

constexpr unsigned kPidfdThread = O_EXCL;  // PIDFD_THREAD

bool recognise(const TargetFile& file) {
  return file.is_anonymous("[pidfd]") || std::string_view(file.link).starts_with("pidfd:[");
}

Result<void> save(SaveContext& context, const TargetFile& file, int, pb::OpenFile* saved) {
  std::string_view text = fdinfo_field(file.fdinfo, "Pid");
  if (text.empty()) return error(file.describe() + " has no Pid in /proc/PID/fdinfo");
  pid_t pid = static_cast<pid_t>(parse_number(text));  // as we see it; -1: ended, 0: not in our namespace
  pb::PidFd* pidfd = saved->MutableExtension(pb::pidfd);
  pidfd->set_self(pid == context.pid());
  pidfd->set_thread((file.flags & kPidfdThread) != 0);
  pidfd->set_pid(pid > 0 ? context.pid_in_target(pid) : pid);
  pidfd->set_inode(file.status.st_ino);
  if (!pidfd->self() && pid != -1) {
    context.note(fmt::format(
        "{} refers to process {}, which is not part of the checkpoint: after a restart it is shown as ended",
        file.describe(), pid));
  }
  return {};
}

int open_process(pid_t pid, const pb::OpenFile& file) {
  return static_cast<int>(::syscall(SYS_pidfd_open, pid, file.GetExtension(pb::pidfd).thread() ? kPidfdThread : 0));
}

// A process that has ended when this returns, for all of `files`. They are opened while it is a zombie.
Result<void> open_ended_process(RestoreContext& context, const std::vector<const pb::OpenFile*>& files) {
  const pb::OpenFile& first = *files.front();
  long pid = ::syscall(SYS_clone, CLONE_UNTRACED, nullptr, nullptr, nullptr, 0);
  if (pid == 0) ::syscall(SYS_exit_group, 0);
  if (pid < 0) return errno_error("make an ended process for " + describe(first));
  auto open_all = [&]() -> Result<void> {
    siginfo_t ended{};
    while (::waitid(P_PID, static_cast<id_t>(pid), &ended, WEXITED | WNOWAIT | __WALL) < 0 && errno == EINTR) {}
    for (const pb::OpenFile* file : files) {
      Fd fd(open_process(static_cast<pid_t>(pid), *file));
      if (!fd) return errno_error("open an ended process for " + describe(*file));
      VMCKPT_TRY(context.put(*file, std::move(fd)));
    }
    return {};
  };
  auto opened = open_all();
  while (::waitpid(static_cast<pid_t>(pid), nullptr, __WALL) < 0 && errno == EINTR) {}
  return opened;
}

Result<void> restore(RestoreContext& context) {
  std::map<uint64_t, std::vector<const pb::OpenFile*>> by_inode;
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (!file.HasExtension(pb::pidfd)) continue;
    if (!file.GetExtension(pb::pidfd).self() && file.GetExtension(pb::pidfd).inode() != 0) {
      by_inode[file.GetExtension(pb::pidfd).inode()].push_back(&file);
    } else if (!file.GetExtension(pb::pidfd).self()) {
      VMCKPT_TRY(open_ended_process(context, {&file}));
    } else {
      Fd fd(open_process(::getpid(), file));
      if (!fd) return errno_error("open the process itself for " + describe(file));
      VMCKPT_TRY(context.put(file, std::move(fd)));
    }
  }
  for (const auto& [inode, files] : by_inode) VMCKPT_TRY(open_ended_process(context, files));
  return {};
}

}  // namespace

const DescriptorModule kPidfdModule{"pidfd", recognise, save, nullptr, nullptr, restore};

}  // namespace vmckpt
