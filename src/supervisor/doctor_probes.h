// What the probes of doctor are written with.
#pragma once

#include <functional>
#include <string>

#include <sys/types.h>

#include "core/page.h"
#include "core/result.h"
#include "supervisor/doctor.h"

namespace vmckpt {

inline constexpr uint64_t kMiB = uint64_t{1} << 20;

Probe ok(std::string reason);
Probe limited(std::string reason, std::string cure = {});
Probe missing(std::string reason, std::string cure = {});
std::string why(const Error& error);
Result<void> failed(const char* call);  // with errno

// One line of a /proc or /sys file, or empty.
std::string read_line(const std::string& path);

// Runs `body` in a forked child: namespaces, filters and moved mappings go away with it.
Result<void> in_child(const std::function<Result<void>()>& body);

// A child that waits to be looked at, killed and reaped at the end.
class Sleeper {
 public:
  Sleeper();
  Sleeper(const Sleeper&) = delete;
  Sleeper& operator=(const Sleeper&) = delete;
  ~Sleeper();
  pid_t pid() const { return pid_; }

  static constexpr uint64_t kChildMarker = 0x1122334455667788;
  static volatile uint64_t marker;  // differs between us and the child

 private:
  pid_t pid_ = -1;
};

// clone3 like fork, with the child's PID chosen. The child ends at once.
pid_t fork_with_pid(pid_t wanted);

// Enters new namespaces, inside a new user namespace where we may not do it as we are.
Result<void> enter_namespaces(int flags);
const char* namespace_cure();

// doctor_machine.cc
Probe probe_machine();
Probe probe_kernel();
Probe probe_seccomp();
Probe probe_io_uring();
Probe probe_kvm();
Probe probe_userfaultfd();
// doctor_tracing.cc: looking into the target
Probe probe_ptrace();
Probe probe_pidfd_getfd();
Probe probe_process_vm();
Probe probe_rseq();
Probe probe_checkpoint_restore();
Probe probe_kcmp();
Probe probe_pagemap_scan();
// doctor_restart.cc: making it again
Probe probe_set_tid();
Probe probe_user_namespace();
Probe probe_pid_namespace();
Probe probe_time_namespace();
Probe probe_mount_proc();
Probe probe_vdso();
// doctor_room.cc: disk, memory, limits
Probe probe_image_dir(const std::string& image_dir);
Probe probe_free_disk(const std::string& image_dir);
Probe probe_overcommit();
Probe probe_huge_pages();
Probe probe_limits();
// doctor_trial.cc: all of it at once
Probe probe_round_trip(const std::string& image_dir);

}  // namespace vmckpt
