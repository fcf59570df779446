// KVM virtual machines. What the recorder wrote down (recorder/kvm_calls.h) is replayed, all other state is read back at the
// checkpoint by ioctls that the target's own threads make, and put in again at restart, when the guest's memory is there.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/fd.h"
#include "core/result.h"
#include "image/image.pb.h"
#include "recorder/ledger.h"
#include "tracer/stopped_world.h"
#include "tracer/tape_draft.h"
#include "tracer/vcpu_gate.h"

namespace vmckpt {

// What this host's KVM can do, asked once.
struct KvmHost {
  Fd device;
  size_t run_bytes = 0;     // of the kvm_run mapping
  size_t xsave_bytes = 0;   // KVM_GET_XSAVE2's, or 4096
  bool has_xsave2 = false;
  bool has_sregs2 = false;
  bool has_tsc_offset = false;
  size_t nested_bytes = 0;  // 0: no nested virtualization
  std::vector<uint32_t> msrs;  // that this host's vCPUs let be read; shrinks as some turn out not to

  static Result<std::shared_ptr<KvmHost>> ask();
};

// Checkpoint, world stopped, every vCPU at rest.
Result<void> save_kvm(StoppedWorld& world, const Ledger& ledger, const KvmNotes& notes, KvmHost& host, pb::Kvm* saved);
// ... and the descriptors saved: which of them are the eventfds of irqfds and ioeventfds.
Result<void> link_kvm_events(const KvmNotes& notes, const pb::DescriptorTable& table, pb::Kvm* saved);

// Preflight, before anything is started.
void check_kvm(const pb::Kvm& kvm, std::vector<Error>& problems);

// Restart: makes the virtual machines again. `device` is /dev/kvm; numbers from `first_service_fd` on are free and closed later.
Result<void> plan_kvm(const pb::Image& image, int device, int first_service_fd, TapeDraft& tape);

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
void plan_vm_state(const pb::KvmVmState& state, int fd, TapeDraft& tape);
void plan_vm_clock(const pb::KvmVmState& state, int fd, TapeDraft& tape);
void plan_vcpu_state(const pb::KvmVcpuState& state, int fd, TapeDraft& tape);

}  // namespace vmckpt
