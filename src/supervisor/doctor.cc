#include "supervisor/doctor.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <sstream>

#include <cpuid.h>
#include <elf.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/io_uring.h>
#include <linux/kcmp.h>
#include <linux/prctl.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/fd.h"
#include "core/kvm_api.h"
#include "core/result.h"

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

constexpr uint64_t kPageBytes = 4096;
constexpr uint64_t kMiB = uint64_t{1} << 20;
constexpr unsigned kChildSeconds = 10;  // a probe that hangs is ended by SIGALRM

Probe ok(std::string reason) { return {.state = ProbeState::kOk, .reason = std::move(reason)}; }
Probe limited(std::string reason, std::string cure = {}) {
  return {.state = ProbeState::kLimited, .reason = std::move(reason), .cure = std::move(cure)};
}
Probe missing(std::string reason, std::string cure = {}) {
  return {.state = ProbeState::kMissing, .reason = std::move(reason), .cure = std::move(cure)};
}

std::string why(const Error& error) { return error.message(); }

// One line of a /proc or /sys file, or empty.
std::string read_line(const std::string& path) {
  Result<std::string> text = read_whole_file(path, kMiB);
  return text ? text->substr(0, text->find('\n')) : std::string();
}

Result<void> failed(const char* call) { return errno_error(call); }

// Runs `body` in a forked child: namespaces, filters and moved mappings go away with it.
Result<void> in_child(const std::function<Result<void>()>& body) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) < 0) return failed("pipe");
  Fd reading(ends[0]), writing(ends[1]);
  pid_t child = ::fork();
  if (child < 0) return failed("fork");
  if (child == 0) {
    ::alarm(kChildSeconds);
    Result<void> result = body();
    std::string answer = "+";
    if (!result) answer = fmt::format("-{} {}", result.error().err, result.error().what);
    (void)!::write(writing.get(), answer.data(), answer.size());
    ::_exit(0);
  }
  writing.reset();
  Result<std::string> answer = read_whole_fd(reading.get(), "the probe's answer", kMiB);
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (!answer || answer->empty()) return error(fmt::format("the probe ended early (wait status {:#x})", status));
  if ((*answer)[0] == '+') return {};
  char* rest = nullptr;
  int err = static_cast<int>(std::strtol(answer->c_str() + 1, &rest, 10));
  return Error{*rest == ' ' ? rest + 1 : rest, err, {}};
}

// A child that waits to be looked at, killed and reaped at the end.
class Sleeper {
 public:
  Sleeper() {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) < 0) return;
    Fd reading(ends[0]), writing(ends[1]);
    pid_ = ::fork();
    if (pid_ == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      marker = kChildMarker;
      (void)!::write(writing.get(), "r", 1);
      for (;;) ::pause();
    }
    char ready;
    (void)!::read(reading.get(), &ready, 1);
  }
  Sleeper(const Sleeper&) = delete;
  Sleeper& operator=(const Sleeper&) = delete;
  ~Sleeper() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    while (::waitpid(pid_, nullptr, __WALL) < 0 && errno == EINTR) {
    }
  }
  pid_t pid() const { return pid_; }

  static constexpr uint64_t kChildMarker = 0x1122334455667788;
  static volatile uint64_t marker;  // differs between us and the child

 private:
  pid_t pid_ = -1;
};
volatile uint64_t Sleeper::marker = 0;

// clone3 like fork, with the child's PID chosen.
pid_t fork_with_pid(pid_t wanted) {
  clone_args arguments{};
  arguments.exit_signal = SIGCHLD;
  arguments.set_tid = reinterpret_cast<uint64_t>(&wanted);
  arguments.set_tid_size = 1;
  pid_t pid = static_cast<pid_t>(::syscall(SYS_clone3, &arguments, sizeof arguments));
  if (pid == 0) ::_exit(0);
  if (pid > 0) ::waitpid(pid, nullptr, 0);
  return pid;
}

// Enters new namespaces, inside a new user namespace where we may not do it as we are.
Result<void> enter_namespaces(int flags) {
  if (::unshare(flags) == 0) return {};
  if (errno != EPERM) return failed("unshare");
  const std::string uid_map = fmt::format("{0} {0} 1", ::geteuid());
  const std::string gid_map = fmt::format("{0} {0} 1", ::getegid());
  if (::unshare(CLONE_NEWUSER | flags) < 0) return failed("unshare with a user namespace");
  VMCKPT_TRY(write_file("/proc/self/setgroups", "deny"));
  VMCKPT_TRY(write_file("/proc/self/uid_map", uid_map));
  return write_file("/proc/self/gid_map", gid_map);
}

const char* namespace_cure() {
  return "allow unprivileged user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, "
         "kernel.apparmor_restrict_unprivileged_userns), or restart as root";
}

// ---------------------------------------------------------------------------------------------------- the machine

Probe probe_machine() {
  unsigned eax, ebx, ecx = 0, edx;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0 || (ecx & bit_OSXSAVE) == 0) {
    return missing("the CPU or the kernel has no XSAVE",
                   "run on an x86-64 machine made after 2011, with XSAVE enabled");
  }
  return ok("x86-64 with XSAVE");
}

Probe probe_kernel() {
  utsname name;
  ::uname(&name);
  int major = 0, minor = 0;
  std::sscanf(name.release, "%d.%d", &major, &minor);
  if (major < 5 || (major == 5 && minor < 10)) {
    return missing(fmt::format("Linux {} is older than 5.10", name.release), "run a newer kernel");
  }
  return ok(fmt::format("Linux {}", name.release));
}

// ------------------------------------------------------------------------------------------ looking into the target

Result<void> seize_and_stop(pid_t pid) {
  if (::ptrace(PTRACE_SEIZE, pid, nullptr, nullptr) < 0) return failed("PTRACE_SEIZE");
  if (::ptrace(PTRACE_INTERRUPT, pid, nullptr, nullptr) < 0) return failed("PTRACE_INTERRUPT");
  int status;
  if (::waitpid(pid, &status, __WALL) != pid || !WIFSTOPPED(status)) return failed("waitpid");
  return {};
}

Probe probe_ptrace() {
  const std::string scope = read_line("/proc/sys/kernel/yama/ptrace_scope");
  const std::string yama = scope.empty() ? "no Yama" : "Yama ptrace_scope " + scope;
  Sleeper child;
  Result<void> stopped = seize_and_stop(child.pid());
  if (!stopped) {
    std::string cure = "allow ptrace in this container or sandbox (seccomp profile, security module)";
    if (scope == "2") cure = "sysctl kernel.yama.ptrace_scope=1, or give vmckpt CAP_SYS_PTRACE";
    if (scope == "3") cure = "boot with kernel.yama.ptrace_scope=1: mode 3 cannot be left while the machine runs";
    return missing(fmt::format("a child of ours cannot be stopped: {} ({})", why(stopped.error()), yama), cure);
  }
  user_regs_struct registers;
  iovec area{&registers, sizeof registers};
  if (::ptrace(PTRACE_GETREGSET, child.pid(), NT_PRSTATUS, &area) < 0) {
    return missing("registers of a stopped child cannot be read: " + why(errno_error("PTRACE_GETREGSET")));
  }
  return ok(fmt::format("a child of ours can be stopped ({})", yama));
}

Probe probe_pidfd_getfd() {
  Sleeper child;
  Fd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, child.pid(), 0)));
  if (!pidfd) return missing(why(errno_error("pidfd_open")), "run a kernel of at least 5.10");
  Fd copy(static_cast<int>(::syscall(SYS_pidfd_getfd, pidfd.get(), STDERR_FILENO, 0)));
  // EBADF: permitted, but we were started without a stderr.
  if (!copy && errno != EBADF) {
    return missing("descriptors of a child cannot be duplicated: " + why(errno_error("pidfd_getfd")),
                   "allow pidfd_getfd in this container or sandbox");
  }
  return ok("descriptors of the target can be looked at from outside");
}

Probe probe_process_vm() {
  Sleeper child;
  uint64_t value = 0;
  iovec here{&value, sizeof value};
  iovec there{const_cast<uint64_t*>(&Sleeper::marker), sizeof value};
  if (::process_vm_readv(child.pid(), &here, 1, &there, 1, 0) != sizeof value || value != Sleeper::kChildMarker) {
    return missing("memory of a child cannot be read: " + why(errno_error("process_vm_readv")),
                   "allow process_vm_readv in this container, and a kernel with CONFIG_CROSS_MEMORY_ATTACH");
  }
  if (::process_vm_writev(child.pid(), &here, 1, &there, 1, 0) != sizeof value) {
    return missing("memory of a child cannot be written: " + why(errno_error("process_vm_writev")),
                   "allow process_vm_writev in this container");
  }
  return ok("memory of the target can be read and written from outside");
}

Probe probe_rseq() {
  Sleeper child;
  if (!seize_and_stop(child.pid())) return limited("not known: the ptrace probe failed", "see ptrace");
  __ptrace_rseq_configuration configuration;
  if (::ptrace(PTRACE_GET_RSEQ_CONFIGURATION, child.pid(), sizeof configuration, &configuration) < 0) {
    return limited("the kernel does not tell where a thread's rseq area is (" +
                       why(errno_error("PTRACE_GET_RSEQ_CONFIGURATION")) + "): only glibc's own is kept",
                   "run a kernel of at least 5.13");
  }
  return ok("restartable sequences can be read and set up again");
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
    return missing("it cannot be told which descriptors share one open file: " + why(errno_error("kcmp")),
                   "allow kcmp in this container, and a kernel with CONFIG_KCMP or CONFIG_CHECKPOINT_RESTORE");
  }
  return ok("descriptors that share one open file can be told");
}

Probe probe_pagemap_scan() {
  Fd pagemap(::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  if (!pagemap) {
    return missing("which pages exist cannot be read: " + why(errno_error("open /proc/self/pagemap")),
                   "mount an unrestricted /proc, and a kernel with CONFIG_PROC_PAGE_MONITOR");
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
  if (::ioctl(pagemap.get(), kPagemapScan, &arguments) == 1) return ok("pages that exist are found by PAGEMAP_SCAN");
  return limited(
      "PAGEMAP_SCAN is not there (" + why(errno_error("ioctl")) + "): /proc/PID/pagemap is read, which is slower",
      "run a kernel of at least 6.7 for faster checkpoints");
}

// ----------------------------------------------------------------------------------------------- making it again

Probe probe_set_tid() {
  // A number that was free a moment ago.
  pid_t wanted = ::fork();
  if (wanted == 0) ::_exit(0);
  if (wanted < 0) return missing(why(errno_error("fork")), "raise the limit of processes (ulimit -u)");
  ::waitpid(wanted, nullptr, 0);
  pid_t got = fork_with_pid(wanted);
  if (got == wanted || (got < 0 && errno == EEXIST)) return ok("a process can be given a PID that is free here");
  Error reason = errno_error("clone3 with set_tid");
  if (reason.err == EPERM) {
    return limited("only root may choose PIDs here: a restarted program gets its PID in a PID namespace of its own",
                   "run restart with CAP_CHECKPOINT_RESTORE to keep PIDs without a namespace");
  }
  return missing(why(reason), "allow clone3 in this container, and a kernel of at least 5.5");
}

Probe probe_user_namespace() {
  Result<void> result = in_child([]() -> Result<void> {
    if (::unshare(CLONE_NEWUSER) < 0) return failed("unshare");
    return {};
  });
  if (result) return ok("user namespaces can be made");
  return limited(why(result.error()), namespace_cure());
}

Probe probe_pid_namespace() {
  static constexpr pid_t kWanted = 4321;
  Result<void> result = in_child([]() -> Result<void> {
    VMCKPT_TRY(enter_namespaces(CLONE_NEWPID));
    return in_child([]() -> Result<void> {  // the first process of the namespace
      pid_t got = fork_with_pid(kWanted);
      if (got < 0) return failed("clone3 with set_tid in a PID namespace");
      if (got != kWanted) return error(fmt::format("clone3 made PID {} instead of {}", got, kWanted));
      return {};
    });
  });
  if (result) return ok("a restarted program can get its old PIDs in a PID namespace of its own");
  return missing(why(result.error()), namespace_cure());
}

Probe probe_time_namespace() {
  static constexpr int64_t kOffsetSeconds = 100000;
  Result<void> result = in_child([]() -> Result<void> {
    timespec before;
    ::clock_gettime(CLOCK_MONOTONIC, &before);
    VMCKPT_TRY(enter_namespaces(CLONE_NEWTIME));
    VMCKPT_TRY(write_file("/proc/self/timens_offsets", fmt::format("monotonic {} 0\n", kOffsetSeconds)));
    return in_child([before]() -> Result<void> {
      timespec now;
      ::clock_gettime(CLOCK_MONOTONIC, &now);
      if (now.tv_sec - before.tv_sec >= kOffsetSeconds) return {};
      return error("the monotonic clock is not moved in a time namespace");
    });
  });
  if (result) return ok("the monotonic clock can go on from where it was, also after a reboot of this host");
  return limited(
      why(result.error()) + ": after a reboot of this host the monotonic clock jumps for a restarted program",
      fmt::format("run a kernel with CONFIG_TIME_NS (5.6 or newer); {}", namespace_cure()));
}

Probe probe_mount_proc() {
  Result<void> result = in_child([]() -> Result<void> {
    VMCKPT_TRY(enter_namespaces(CLONE_NEWPID | CLONE_NEWNS));
    return in_child([]() -> Result<void> {
      if (::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) < 0) return failed("make mounts private");
      if (::mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, nullptr) < 0) return failed("mount /proc");
      return {};
    });
  });
  if (result) return ok("a PID namespace can have a /proc of its own");
  return limited(why(result.error()) + ": a program restarted in a PID namespace sees other PIDs in /proc than its own",
                 "in a container, leave /proc unmasked, or restart as root outside of it");
}

Probe probe_vdso() {
  Result<void> result = in_child([]() -> Result<void> {
    std::string maps = VMCKPT_TRY(read_whole_file("/proc/self/maps"));
    std::istringstream lines(maps);
    bool found = false;
    for (std::string line; std::getline(lines, line);) {
      if (line.find("[vdso") == std::string::npos && line.find("[vvar") == std::string::npos) continue;
      unsigned long start, end;
      if (std::sscanf(line.c_str(), "%lx-%lx", &start, &end) != 2) continue;
      found = true;
      void* to = ::mmap(nullptr, end - start, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (to == MAP_FAILED) return failed("mmap");
      void* from = reinterpret_cast<void*>(start);
      if (::mremap(from, end - start, end - start, MREMAP_MAYMOVE | MREMAP_FIXED, to) == MAP_FAILED) {
        return errno_error("move " + line.substr(line.find('[')));
      }
    }
    if (!found) return error("there is no vdso (vdso=0 on the kernel's command line)");
    return {};
  });
  if (result) return ok("vdso and vvar can be moved to where the program had them");
  return missing(why(result.error()), "run a kernel without CONFIG_MSEAL_SYSTEM_MAPPINGS, and with a vdso");
}

// ------------------------------------------------------------------------------------------------- what launch denies

Probe probe_seccomp() {
  Result<void> result = in_child([]() -> Result<void> {
    sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOTTY),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    sock_fprog program{static_cast<unsigned short>(std::size(filter)), filter};
    if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) return failed("prctl(PR_SET_NO_NEW_PRIVS)");
    if (::syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) < 0) return failed("seccomp");
    if (::syscall(SYS_getppid) != -1) return error("a seccomp filter has no effect");
    return {};
  });
  if (result) return ok("launch can deny what cannot be checkpointed");
  return missing(why(result.error()) + ": launch cannot make programs fall back from io_uring and Linux AIO",
                 "run a kernel with CONFIG_SECCOMP_FILTER");
}

Probe probe_io_uring() {
  io_uring_params parameters{};
  Fd ring(static_cast<int>(::syscall(SYS_io_uring_setup, 1, &parameters)));
  if (ring) return ok("is on here; launch denies it to programs, since a ring cannot be checkpointed");
  return ok("is off here (" + why(errno_error("io_uring_setup")) + "): programs fall back by themselves");
}

Probe probe_kvm() {
  Fd kvm(::open("/dev/kvm", O_RDWR | O_CLOEXEC));
  if (!kvm) {
    Error reason = errno_error("open /dev/kvm");
    return limited(why(reason) + ": virtual machines run emulated",
                   reason.err == EACCES ? "add yourself to the group kvm" : "enable virtualization for this machine");
  }
  int version = ::ioctl(kvm.get(), KVM_GET_API_VERSION, 0);
  if (version != KVM_API_VERSION) return limited(fmt::format("/dev/kvm answers with API version {}", version));
  return ok("/dev/kvm can be opened");
}

Probe probe_userfaultfd() {
  Fd uffd(static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY)));
  if (!uffd) {
    return limited(
        why(errno_error("userfaultfd")) + ": programs that use it cannot run here; vmckpt itself does not need it",
        "run a kernel with CONFIG_USERFAULTFD");
  }
  uffdio_api api{};
  api.api = UFFD_API;
  if (::ioctl(uffd.get(), UFFDIO_API, &api) < 0) return limited(why(errno_error("UFFDIO_API")));
  return ok(fmt::format("is there, write protection {}",
                        (api.features & UFFD_FEATURE_PAGEFAULT_FLAG_WP) != 0 ? "too" : "not"));
}

// -------------------------------------------------------------------------------------------------------- room

Probe probe_image_dir(const std::string& image_dir) {
  const std::string elsewhere = "choose another image directory with launch -d";
  constexpr off_t kDataAt = 32 * kMiB;
  constexpr off_t kFileBytes = 64 * kMiB;
  bool unnamed = true;
  Fd file(::open(image_dir.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  if (!file && (errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL)) {
    unnamed = false;
    std::string name = image_dir + "/.vmckpt-doctor-XXXXXX";
    file = Fd(::mkostemp(name.data(), O_CLOEXEC));
    if (file) ::unlink(name.c_str());
  }
  if (!file) return missing(why(errno_error("create a file in " + image_dir)), elsewhere);
  std::string page(kPageBytes, 'x');
  Result<void> written = pwrite_exactly(file.get(), page.data(), page.size(), kDataAt, "a file in " + image_dir);
  if (!written || ::ftruncate(file.get(), kFileBytes) < 0) {
    return missing(why(written ? errno_error("ftruncate") : written.error()), elsewhere);
  }
  ::fdatasync(file.get());
  struct stat status;
  ::fstat(file.get(), &status);

  // Restart maps memory from the image, and generated code in it must stay executable.
  for (int protection : {PROT_READ | PROT_WRITE, PROT_READ | PROT_EXEC}) {
    void* at = ::mmap(nullptr, kPageBytes, protection, MAP_PRIVATE, file.get(), kDataAt);
    if (at == MAP_FAILED) {
      Error reason = errno_error(fmt::format("map a file in {}", image_dir));
      if ((protection & PROT_EXEC) == 0) return missing(why(reason), elsewhere);
      return limited(why(reason) + ": programs that generate code, like QEMU, cannot be restarted from there",
                     "remount it without noexec, or " + elsewhere);
    }
    ::munmap(at, kPageBytes);
  }
  if (static_cast<int64_t>(status.st_blocks) * 512 > kFileBytes / 2 || ::lseek(file.get(), 0, SEEK_HOLE) != 0) {
    return limited(image_dir + " keeps no holes: zero pages take space in images", elsewhere);
  }
  if (!unnamed)
    return limited(image_dir + " has no unnamed files: a killed checkpoint leaves a .NAME.tmp-* file behind");
  return ok(image_dir + " keeps holes and takes unnamed files");
}

Probe probe_free_disk(const std::string& image_dir) {
  struct statvfs status;
  if (::statvfs(image_dir.c_str(), &status) < 0) return missing(why(errno_error("look at " + image_dir)));
  uint64_t free_mib = uint64_t{status.f_bavail} * status.f_frsize / kMiB;
  if (free_mib < 1024) return limited(fmt::format("{} MiB are free in {}", free_mib, image_dir), "free some space");
  return ok(fmt::format("{} MiB are free in {}", free_mib, image_dir));
}

Probe probe_overcommit() {
  const std::string mode = read_line("/proc/sys/vm/overcommit_memory");
  if (mode != "2")
    return ok("vm.overcommit_memory is " + (mode.empty() ? "unknown" : mode) + ": fork needs no spare memory");
  uint64_t limit_kib = 0, used_kib = 0;
  Result<std::string> meminfo = read_whole_file("/proc/meminfo", kMiB);
  std::istringstream lines(meminfo ? *meminfo : std::string());
  for (std::string line; std::getline(lines, line);) {
    std::sscanf(line.c_str(), "CommitLimit: %lu kB", &limit_kib);
    std::sscanf(line.c_str(), "Committed_AS: %lu kB", &used_kib);
  }
  uint64_t left_mib = limit_kib > used_kib ? (limit_kib - used_kib) / 1024 : 0;
  return limited(
      fmt::format("vm.overcommit_memory is 2: programs with more than {} MiB of private memory cannot be forked "
                  "for a checkpoint",
                  left_mib),
      "sysctl vm.overcommit_memory=0");
}

Probe probe_huge_pages() {
  const std::string enabled = read_line("/sys/kernel/mm/transparent_hugepage/enabled");
  if (enabled.find("[always]") != std::string::npos)
    return ok("transparent huge pages are on: forks of large programs are fast");
  if (enabled.find("[madvise]") != std::string::npos) {
    return ok("transparent huge pages are there for programs that ask for them, like QEMU");
  }
  return limited("there are no transparent huge pages: the pause of programs with much memory is longer",
                 "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled");
}

Probe probe_limits() {
  struct Limit {
    int resource;
    const char* name;
    const char* option;
    rlim_t least;
  };
  static constexpr Limit kLimits[] = {{RLIMIT_FSIZE, "file size", "-f", RLIM_INFINITY},
                                      {RLIMIT_AS, "address space", "-v", RLIM_INFINITY},
                                      {RLIMIT_NPROC, "processes", "-u", 64},
                                      {RLIMIT_NOFILE, "open files", "-n", 1024}};
  std::string low, cure;
  for (const Limit& limit : kLimits) {
    rlimit now{};
    ::getrlimit(static_cast<__rlimit_resource_t>(limit.resource), &now);
    if (now.rlim_cur >= limit.least) continue;
    low += fmt::format("{}{} {}", low.empty() ? "" : ", ", limit.name, now.rlim_cur);
    cure += fmt::format("{}ulimit {}", cure.empty() ? "raise with " : ", ", limit.option);
  }
  if (low.empty()) return ok("no resource limit is in the way");
  return limited("low limits: " + low, cure);
}

}  // namespace

const char* probe_state_name(ProbeState state) {
  switch (state) {
    case ProbeState::kOk: return "ok";
    case ProbeState::kLimited: return "limited";
    case ProbeState::kMissing: return "missing";
  }
  return "?";
}

std::vector<Probe> run_probes(const std::string& image_dir) {
  struct Row {
    const char* name;
    bool required;
    std::function<Probe()> run;
  };
  const Row rows[] = {
      {"machine", true, probe_machine},
      {"kernel", true, probe_kernel},
      {"ptrace", true, probe_ptrace},
      {"pidfd-getfd", true, probe_pidfd_getfd},
      {"process-vm", true, probe_process_vm},
      {"checkpoint-restore", true, probe_checkpoint_restore},
      {"kcmp", true, probe_kcmp},
      {"vdso", true, probe_vdso},
      {"pagemap-scan", true, probe_pagemap_scan},
      {"rseq", false, probe_rseq},
      {"set-tid", false, probe_set_tid},
      {"user-namespace", false, probe_user_namespace},
      {"pid-namespace", false, probe_pid_namespace},  // required when set-tid is not ok, see below
      {"time-namespace", false, probe_time_namespace},
      {"mount-proc", false, probe_mount_proc},
      {"seccomp", false, probe_seccomp},
      {"io-uring", false, probe_io_uring},
      {"kvm", false, probe_kvm},
      {"userfaultfd", false, probe_userfaultfd},
      {"image-dir", true, [&] { return probe_image_dir(image_dir); }},
      {"free-disk", false, [&] { return probe_free_disk(image_dir); }},
      {"overcommit", false, probe_overcommit},
      {"huge-pages", false, probe_huge_pages},
      {"limits", false, probe_limits},
  };
  std::vector<Probe> probes;
  bool may_set_tid = false;
  for (const Row& row : rows) {
    Probe probe = row.run();
    probe.name = row.name;
    probe.required = row.required;
    if (probe.name == "set-tid") may_set_tid = probe.state == ProbeState::kOk;
    if (probe.name == "pid-namespace") probe.required = !may_set_tid;
    probes.push_back(std::move(probe));
  }
  return probes;
}

bool host_is_usable(const std::vector<Probe>& probes) {
  return std::none_of(probes.begin(), probes.end(),
                      [](const Probe& probe) { return probe.required && probe.state == ProbeState::kMissing; });
}

}  // namespace vmckpt
