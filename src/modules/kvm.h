// KVM virtual machines. What the recorder wrote down (recorder/kvm_calls.h) is replayed, all other state is read back at the
// checkpoint by ioctls that the target's own threads make, and put in again at restart, when the guest's memory is there.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/fd.h"
#include "core/kvm_api.h"
#include "core/result.h"
#include "image/image.pb.h"
#include "modules/host.h"
#include "recorder/ledger.h"
#include "tracer/stopped_world.h"
#include "tracer/tape_draft.h"
#include "tracer/vcpu_gate.h"

namespace vmckpt {

// KVM_GET_XSAVE's; KVM_GET_XSAVE2's may be more.
inline constexpr size_t kPlainXsaveBytes = 4096;

// What this host's KVM can do, asked once.
struct KvmHost {
  Fd device;
  size_t run_bytes = 0;     // of the kvm_run mapping
  size_t xsave_bytes = 0;   // at most, of any guest's extended state
  bool has_xsave2 = false;
  bool has_sregs2 = false;
  bool has_tsc_offset = false;
  bool has_real_time_clock = false;  // KVM_CLOCK_REALTIME
  size_t nested_bytes = 0;  // 0: no nested virtualization
  std::vector<kvm_cpuid_entry2> cpuid;  // KVM_GET_SUPPORTED_CPUID
  std::vector<uint32_t> msrs;  // that this host's vCPUs let be read; shrinks as some turn out not to

  static Result<std::shared_ptr<KvmHost>> ask();
  // How fast a new guest's TSC runs; 0: KVM does not say.
  uint32_t tsc_khz() const;
  bool can_scale_tsc() const;
};

// The extended state of a guest that has all that this processor has (Intel SDM volume 1, 13.2, CPUID leaf 0xd). KVM's own answer
// depends on what the process that asks may give its guests (AMX), and the one that asks is not the VMM.
size_t most_xsave_bytes();

// Checkpoint, world stopped, every vCPU at rest. `image` has the threads, whose filters may forbid what they are to ask.
Result<void> save_kvm(StoppedWorld& world, const Ledger& ledger, const KvmNotes& notes, KvmHost& host, pb::Image& image);
// ... and the descriptors saved: which of them are the eventfds of irqfds and ioeventfds.
Result<void> link_kvm_events(const KvmNotes& notes, const pb::DescriptorTable& table, pb::Kvm* saved);

// Preflight, before anything is started.
void check_kvm(const pb::Image& image, CpuCheck cpu_check, std::vector<Error>& problems, std::vector<std::string>& notes);
// kvm_host.cc: CPUID bits of the guest that this host lacks, one by one.
void check_guest_cpuid(const pb::Kvm& kvm, const KvmHost& host, CpuCheck cpu_check, std::vector<Error>& problems,
                       std::vector<std::string>& notes);
// ... and the frequency of its TSC.
void check_guest_tsc(const pb::Kvm& kvm, const KvmHost& host, CpuCheck cpu_check, std::vector<Error>& problems,
                     std::vector<std::string>& notes);

// Restart: makes the virtual machines again. `device` is /dev/kvm; numbers from `first_service_fd` on are free and closed later.
Result<void> plan_kvm(const pb::Image& image, int device, int first_service_fd, TapeDraft& tape);

// kvm_check.cc: of an image
std::string kvm_call_name(uint32_t request);
bool kvm_call_refers_to_events(uint32_t request);                              // eventfds are among its arguments
const pb::KvmObject* find_kvm_object(const pb::Kvm& kvm, uint32_t id);         // nullptr: there is none
kvm_clock_data kvm_clock_of(const pb::KvmVmState& state);                      // zeros when there is none

// kvm_state.cc: what can be read back of one VM or vCPU. The tape is played in the target between the two.
struct KvmQuestions {
  int fd = -1;
  std::vector<std::pair<size_t, size_t>> parts;  // call, room; in the order of the state's fields
  std::vector<uint64_t> rooms;
};
void ask_vm(int fd, bool has_irqchip, bool has_pit, TapeDraft& tape, KvmQuestions& questions);
void save_vm(const KvmQuestions& questions, const TapeDraft& tape, bool has_irqchip, bool has_pit, pb::KvmVmState* saved);
void ask_vcpu(int fd, bool has_lapic, const KvmHost& host, TapeDraft& tape, KvmQuestions& questions);
// False when an MSR could not be read: it is taken from host.msrs, and the vCPU must be asked again.
Result<bool> save_vcpu(const KvmQuestions& questions, const TapeDraft& tape, bool has_lapic, KvmHost& host, pb::KvmVcpuState* saved);
// How a guest's TSC goes on.
struct TscGap {
  bool is_this_boot = false;  // the host's TSC has counted on since the checkpoint
  int64_t away_ns = 0;        // real time since then; 0 where the guest's clocks stand still meanwhile
};
// Without the offset: the TSC of a guest that was `saved`, after the gap.
uint64_t tsc_after(uint64_t saved, uint32_t tsc_khz, const TscGap& gap);

void plan_vm_state(const pb::KvmVmState& state, int fd, TapeDraft& tape);
void plan_vm_clock(const pb::KvmVmState& state, int fd, TapeDraft& tape);
void plan_vcpu_state(const pb::KvmVcpuState& state, const TscGap& gap, int fd, TapeDraft& tape);

}  // namespace vmckpt
