// Looking into the target, for a checkpoint.
#include <elf.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <linux/prctl.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/fd.h"
#include "supervisor/doctor_probes.h"

namespace vmckpt {

namespace {

// Newer than the kernel headers of Debian 12 (6.1): struct pm_scan_arg of linux/fs.h, since Linux 6.7.
struct PagemapScanArguments {
  uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
  uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
struct PagemapRegion {
  uint64_t start, end, categories;
};
constexpr uint64_t kPageIsPresent = 1 << 3;
constexpr unsigned long kPagemapScan = _IOWR('f', 16, PagemapScanArguments);

Result<void> seize_and_stop(pid_t pid) {
  if (::ptrace(PTRACE_SEIZE, pid, nullptr, nullptr) < 0) return failed("PTRACE_SEIZE");
  if (::ptrace(PTRACE_INTERRUPT, pid, nullptr, nullptr) < 0) return failed("PTRACE_INTERRUPT");
  int status;
  if (::waitpid(pid, &status, __WALL) != pid || !WIFSTOPPED(status)) return failed("waitpid");
  return {};
}

}  // namespace

Probe probe_ptrace() {
  const std::string scope = read_line("/proc/sys/kernel/yama/ptrace_scope");
  const std::string yama = scope.empty() ? "no Yama" : "Yama ptrace_scope " + scope;
  Sleeper child;
  Result<void> stopped = seize_and_stop(child.pid());
  if (!stopped) {
    std::string cure = "allow ptrace in this container or sandbox (seccomp profile, security module)";
    if (scope == "2") cure = "sysctl kernel.yama.ptrace_scope=1, or give vmckpt CAP_SYS_PTRACE";
    if (scope == "3") cure = "boot with kernel.yama.ptrace_scope=1: mode 3 cannot be changed without a reboot";
    return missing(fmt::format("a child process cannot be stopped: {} ({})", why(stopped.error()), yama), cure);
  }
  user_regs_struct registers;
  iovec area{&registers, sizeof registers};
  if (::ptrace(PTRACE_GETREGSET, child.pid(), NT_PRSTATUS, &area) < 0) {
    return missing("the registers of a stopped child process cannot be read: " + why(errno_error("PTRACE_GETREGSET")));
  }
  return ok(fmt::format("a child process can be stopped ({})", yama));
}

Probe probe_pidfd_getfd() {
  Sleeper child;
  Fd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, child.pid(), 0)));
  if (!pidfd) return missing(why(errno_error("pidfd_open")), "run Linux 5.10 or newer");
  Fd copy(static_cast<int>(::syscall(SYS_pidfd_getfd, pidfd.get(), STDERR_FILENO, 0)));
  // EBADF: permitted, but we were started without a stderr.
  if (!copy && errno != EBADF) {
    return missing("descriptors of a child process cannot be duplicated: " + why(errno_error("pidfd_getfd")),
                   "allow pidfd_getfd in this container or sandbox");
  }
  return ok("descriptors of the target can be inspected from outside");
}

Probe probe_process_vm() {
  Sleeper child;
  uint64_t value = 0;
  iovec here{&value, sizeof value};
  iovec there{const_cast<uint64_t*>(&Sleeper::marker), sizeof value};
  if (::process_vm_readv(child.pid(), &here, 1, &there, 1, 0) != sizeof value || value != Sleeper::kChildMarker) {
    return missing("memory of a child process cannot be read: " + why(errno_error("process_vm_readv")),
                   "allow process_vm_readv in this container, and run a kernel with CONFIG_CROSS_MEMORY_ATTACH");
  }
  if (::process_vm_writev(child.pid(), &here, 1, &there, 1, 0) != sizeof value) {
    return missing("memory of a child process cannot be written: " + why(errno_error("process_vm_writev")),
                   "allow process_vm_writev in this container");
  }
  return ok("memory of the target can be read and written from outside");
}

Probe probe_rseq() {
  Sleeper child;
  if (!seize_and_stop(child.pid())) return limited("not known: the ptrace probe failed", "see ptrace");
  __ptrace_rseq_configuration configuration;
  if (::ptrace(PTRACE_GET_RSEQ_CONFIGURATION, child.pid(), sizeof configuration, &configuration) < 0) {
    return limited("the kernel does not report the address of a thread's rseq area (" +
                       why(errno_error("PTRACE_GET_RSEQ_CONFIGURATION")) + "): only glibc's rseq area is kept",
                   "run Linux 5.13 or newer");
  }
  return ok("restartable sequences (rseq) can be read and registered again");
}

Probe probe_checkpoint_restore() {
  unsigned map_bytes = 0;
  if (::prctl(PR_SET_MM, PR_SET_MM_MAP_SIZE, &map_bytes, 0, 0) < 0) {
    return missing("PR_SET_MM_MAP: " + why(errno_error("prctl")),
                   "run a kernel with CONFIG_CHECKPOINT_RESTORE (Debian's and Ubuntu's have it)");
  }
  int* address = nullptr;
  if (::prctl(PR_GET_TID_ADDRESS, &address, 0, 0, 0) < 0) {
    return missing("PR_GET_TID_ADDRESS: " + why(errno_error("prctl")), "run a kernel with CONFIG_CHECKPOINT_RESTORE");
  }
  return ok("the kernel has CONFIG_CHECKPOINT_RESTORE");
}

Probe probe_kcmp() {
  Sleeper child;
  long order = ::syscall(SYS_kcmp, ::getpid(), child.pid(), KCMP_FILE, STDERR_FILENO, STDERR_FILENO);
  if (order < 0 && errno != EBADF) {
    return missing("it cannot be determined which descriptors share one open file: " + why(errno_error("kcmp")),
                   "allow kcmp in this container, and run a kernel with CONFIG_KCMP or CONFIG_CHECKPOINT_RESTORE");
  }
  return ok("descriptors that share one open file can be identified");
}

Probe probe_pagemap_scan() {
  Fd pagemap(::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  if (!pagemap) {
    return missing("the list of existing pages cannot be read: " + why(errno_error("open /proc/self/pagemap")),
                   "mount an unrestricted /proc, and run a kernel with CONFIG_PROC_PAGE_MONITOR");
  }
  alignas(kPageBytes) static volatile char page[kPageBytes];
  page[0] = 1;
  PagemapRegion region{};
  PagemapScanArguments arguments{};
  arguments.size = sizeof arguments;
  arguments.start = reinterpret_cast<uint64_t>(&page);
  arguments.end = arguments.start + kPageBytes;
  arguments.vec = reinterpret_cast<uint64_t>(&region);
  arguments.vec_len = 1;
  arguments.category_mask = kPageIsPresent;
  arguments.return_mask = kPageIsPresent;
  if (::ioctl(pagemap.get(), kPagemapScan, &arguments) == 1) return ok("existing pages are found with PAGEMAP_SCAN");
  return limited(
      "PAGEMAP_SCAN is not available (" + why(errno_error("ioctl")) + "): /proc/PID/pagemap is read, which is slower",
      "run Linux 6.7 or newer for faster checkpoints");
}

}  // namespace vmckpt
