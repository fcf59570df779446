// A KVM that only pretends: it answers the calls that vmckpt makes of it by the kernel's rules, for hosts that the tests do not
// run on. Where a rule is not plain from KVM's documentation it is said where the kernel has it (arch/x86/kvm). No guest ever
// runs.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "core/kvm_api.h"
#include "tracer/tape_draft.h"

namespace vmckpt {

// What a host's KVM has.
struct FakeHost {
  std::vector<uint32_t> listed;            // KVM_GET_MSR_INDEX_LIST
  std::map<uint32_t, uint64_t> msrs;       // all that a new vCPU has, and what is in them; machine-check banks aside
  std::set<uint32_t> refused;              // listed, and not to be read all the same
  std::map<unsigned long, int> capabilities;
  uint32_t tsc_khz = 2'000'000;
};

// By the tables msrs_to_save_base, msrs_to_save_pmu and emulated_msrs_all of Linux 6.12 (x86.c), less what kvm_probe_msr_to_save
// and has_emulated_msr leave out on such processors.
FakeHost intel_host();  // Sapphire Rapids: nested VMX, PMU, Hyper-V, scalable TSC
FakeHost amd_host();    // Zen 4: nested SVM, PMU, Hyper-V

struct FakeVcpu {
  uint32_t vm = 0;
  std::map<uint32_t, uint64_t> msrs;
  std::vector<kvm_cpuid_entry2> cpuid;
  std::vector<std::pair<uint32_t, uint64_t>> msr_writes;  // in their order
  uint64_t machine_checks = 0;
  int64_t tsc_offset = 0;
  uint64_t ssp = 0;
  bool synic = false, in_smm = false, nested_lost = false;
  std::string nested;
  kvm_vcpu_events events{};
  bool lapic_set = false;
};

struct FakeVm {
  uint64_t clock_ns = 0;
  uint64_t wall_clock_ns = 0;  // what MSR_KVM_WALL_CLOCK made KVM write into guest memory: when the clock was zero
  bool pit_ticks_lost = false;
  std::set<uint64_t> disabled_exits;
};

class FakeKvm {
 public:
  static constexpr int kDevice = 1000;
  explicit FakeKvm(FakeHost host) : host(std::move(host)) {}

  // As the kernel answers: negative errno.
  int64_t ioctl(int fd, unsigned long request, unsigned long argument);
  // As libc does.
  int door(int fd, unsigned long request, unsigned long argument);
  // Plays a tape as the player does. False when a call that must succeed fails; then `failed` says which.
  bool play(TapeDraft& tape);

  int make_vm();
  int make_vcpu(int vm_fd);

  FakeHost host;
  uint64_t host_tsc = 0;
  uint64_t real_time_ns = 0;
  std::map<int, FakeVm> vms;  // by descriptor
  std::map<int, FakeVcpu> vcpus;
  std::vector<std::pair<int, unsigned long>> calls;  // ioctls that succeeded
  std::map<uint64_t, uint64_t> memory_added;         // kOpAdd
  TapeCall failed{};
  int get_msrs_calls = 0;

 private:
  int64_t vm_ioctl(int fd, FakeVm& vm, unsigned long request, unsigned long argument);
  int64_t vcpu_ioctl(FakeVcpu& vcpu, unsigned long request, unsigned long argument);
  const uint64_t* find_msr(const FakeVcpu& vcpu, uint32_t index) const;
  bool set_msr(FakeVcpu& vcpu, uint32_t index, uint64_t value);
  int next_fd_ = 2000;
};

}  // namespace vmckpt
