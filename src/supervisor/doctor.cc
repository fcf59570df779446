#include "supervisor/doctor.h"

#include <algorithm>
#include <functional>

#include "supervisor/doctor_probes.h"

namespace vmckpt {

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
      {"round-trip", true, [&] { return probe_round_trip(image_dir); }},
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
