#include "supervisor/failed_step.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "modules/played/operations.h"
#include "recorder/kvm_calls.h"
#include "tracer/remote_memory.h"
#include "tracer/tape_draft.h"

namespace vmckpt {
namespace {

struct Advice {
  int64_t number;
  int err;
  const char* text;
};

constexpr char kIds[] = "restart as the user that the program ran as, or with CAP_SETUID and CAP_SETGID";
constexpr char kUnmapped[] = "this user namespace has no such user or group: restart outside of it";
constexpr char kMemory[] =
    "free some memory, or raise what limits it (ulimit -v, the container's memory, sysctl vm.max_map_count, "
    "vm.overcommit_memory)";
constexpr char kProcesses[] =
    "raise the number of processes that is allowed (ulimit -u, pids.max of the cgroup, kernel.threads-max)";
constexpr char kLowAddress[] = "the program had memory below this host's vm.mmap_min_addr: lower it, or restart as root";

constexpr Advice kAdvice[] = {
    {SYS_setgroups, EPERM, "restart as root of the host, or leave the user namespace that denies setgroups"},
    {SYS_setgroups, EINVAL, kUnmapped},
    {SYS_setresuid, EPERM, kIds},
    {SYS_setresuid, EINVAL, kUnmapped},
    {SYS_setresuid, EAGAIN, kProcesses},
    {SYS_setresgid, EPERM, kIds},
    {SYS_setresgid, EINVAL, kUnmapped},
    {SYS_capset, EPERM, "restart with the capabilities that the program had"},
    {SYS_seccomp, EACCES, "restart with CAP_SYS_ADMIN"},
    {SYS_seccomp, EINVAL, "this kernel does not take the filter: restart on one like that of the checkpoint"},
    {kOpThread, EEXIST, "another process has its number: try again, or end that process"},
    {kOpThread, EAGAIN, kProcesses},
    {kOpThread, ENOMEM, kMemory},
    {kOpThread, EPERM, "give vmckpt CAP_CHECKPOINT_RESTORE"},
    {kOpReadList, EIO, "check the image with `vmckpt verify`, and its disk"},
    {SYS_mmap, ENOMEM, kMemory},
    {SYS_mmap, EPERM, "the image or a file is on a file system that is mounted noexec, or vm.mmap_min_addr is higher here"},
    {SYS_mmap, EACCES, "the file may not be mapped so by you: look at its mode"},
    {SYS_mmap, EAGAIN, "raise the limit of locked memory (ulimit -l)"},
    {SYS_mprotect, EACCES, "a security module forbids it, or the file system is mounted noexec"},
    {SYS_mprotect, ENOMEM, kMemory},
    {SYS_mremap, EPERM, "this kernel does not let its own mappings be moved (CONFIG_MSEAL_SYSTEM_MAPPINGS)"},
    {SYS_mlockall, EPERM, "raise the limit of locked memory (ulimit -l)"},
    {SYS_mlockall, ENOMEM, "raise the limit of locked memory (ulimit -l)"},
    {SYS_fcntl, EAGAIN, "another process has taken the lock: end it"},
    {SYS_timer_create, EAGAIN, "raise the limit of pending signals (ulimit -i)"},
    {SYS_rt_tgsigqueueinfo, EAGAIN, "raise the limit of pending signals (ulimit -i)"},
    {SYS_rt_sigqueueinfo, EAGAIN, "raise the limit of pending signals (ulimit -i)"},
    {kOpMakeAioRing, EAGAIN, "raise fs.aio-max-nr (sysctl)"},
    {kOpMakeAioRing, EINVAL, "restart it on a machine with fewer processors: this kernel's AIO rings are larger"},
    {kOpMakeAioRing, ENOMEM, kMemory},
    {SYS_arch_prctl, EINVAL, "this processor or kernel lacks AMX"},
    {SYS_arch_prctl, EOPNOTSUPP, "this processor or kernel lacks AMX"},
    {SYS_rseq, EINVAL, "this kernel takes no rseq area of that size: restart on one like that of the checkpoint"},
    {SYS_rseq, ENOSYS, "this kernel has no restartable sequences: restart on one with CONFIG_RSEQ"},
};

std::string text_at(pid_t pid, RemoteAddr address) {
  char text[kTapeTextBytes] = {};
  // It may lie at the end of the arena.
  for (size_t bytes = sizeof text - 1; bytes > 0; bytes /= 2) {
    if (read_memory(pid, address, text, bytes).ok()) break;
  }
  return text;
}

}  // namespace

const char* advice_for(const TapeCall& call, int err) {
  if (call.number == SYS_mmap && err == EPERM && call.args[0] < 0x10000) return kLowAddress;
  for (const Advice& advice : kAdvice) {
    if (advice.number == call.number && advice.err == err) return advice.text;
  }
  return "";
}

Result<void> check_tape(pid_t pid, pid_t tid_in_target, RemoteAddr address) {
  Tape head;
  VMCKPT_TRY(read_memory(pid, address, &head, sizeof head));
  if (head.failed == 0 && head.done == 1) return {};
  if (head.failed == 0) return error(fmt::format("thread {} stopped before it was restored", tid_in_target), "try again");
  TapeCall call;
  VMCKPT_TRY(read_memory(pid, address + sizeof head + (head.failed - 1) * sizeof call, &call, sizeof call));
  const int err = static_cast<int>(-call.result);
  const std::string step = fmt::format("step {} of {} of thread {}", head.failed, head.calls, tid_in_target);
  if (call.number == kOpSetMsrs) {
    return error(fmt::format("KVM refuses the saved value of the MSR {:#x} (descriptor {})", call.args[5], call.args[0]),
                 "restart it on a host like the one it was saved on");
  }
  if (call.number == SYS_ioctl || call.number == kOpMakeDescriptor) {
    const KvmCall* kvm_call = find_kvm_call(static_cast<uint32_t>(call.args[1]));
    return Error{fmt::format("{} of descriptor {} ({})",
                             kvm_call != nullptr ? kvm_call->name : fmt::format("ioctl {:#x}", call.args[1]), call.args[0], step),
                 err, "restart it on a host like the one it was saved on"};
  }
  const std::string name = call.number < kOpFirst ? tape_call_name(call.number)
                                                  : fmt::format("player call {}", call.number - kOpFirst);
  const std::string text = call.text != 0 ? text_at(pid, address + call.text) : std::string();
  if (!text.empty()) return Error{fmt::format("{} ({}, {})", text, name, step), err, advice_for(call, err)};
  return Error{fmt::format("{}({:#x}, {:#x}, {:#x}, {:#x}) ({})", name, call.args[0], call.args[1], call.args[2], call.args[3],
                           step),
               err, advice_for(call, err)};
}

}  // namespace vmckpt
