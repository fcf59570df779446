// Making the target again, at restart.
#include <cstdio>
#include <sstream>

#include <linux/sched.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/fd.h"
#include "supervisor/doctor_probes.h"

namespace vmckpt {

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

}  // namespace vmckpt
