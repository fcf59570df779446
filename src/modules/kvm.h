// KVM virtual machines. What the recorder wrote down (recorder/kvm_calls.h) is replayed, all other state is read back at the
// checkpoint by ioctls that the target's own threads make, and put in again at restart, when the guest's memory is there.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/fd.h"
#include "core/kvm_api.h"
#include "core/result.h"
#include "image/image.pb.h"
#include "modules/host.h"
#include "modules/kvm.pb.h"
#include "recorder/ledger.h"
#include "tracer/stopped_world.h"
#include "tracer/tape_draft.h"
#include "tracer/vcpu_gate.h"

namespace vmckpt {

// KVM_GET_XSAVE's; KVM_GET_XSAVE2's may be more.
inline constexpr size_t kPlainXsaveBytes = 4096;

// What is known of the model-specific registers of vCPUs that have one CPUID and one set of machine checks.
struct KnownMsrs {
  std::vector<uint32_t> readable;
  std::map<uint32_t, uint64_t> fresh;  // what a new vCPU has in them
};

// The way to KVM: ioctl(2), or a test's stand-in.
using KvmDoor = std::function<int(int fd, unsigned long request, unsigned long argument)>;

struct KvmHost;

// Waits for interrupts that irqfds have taken and not yet given to KVM's PIC and IOAPIC (kvm_irqfd.cc).
class IrqfdFlush {
 public:
  static IrqfdFlush make(const KvmHost& host);  // takes a millisecond; run() says so if it has failed
  // World stopped: microseconds for each processor. What others than the target signal meanwhile is not waited for.
  Result<void> run(const KvmHost& host) const;

 private:
  Fd vm_, event_;
};

// What this host's KVM can do, asked once.
struct KvmHost {
  KvmDoor call;
  Fd device;
  size_t run_bytes = 0;     // of the kvm_run mapping
  size_t xsave_bytes = 0;   // at most, of any guest's extended state
  bool has_xsave2 = false;
  bool has_sregs2 = false;
  bool has_tsc_offset = false;
  size_t nested_bytes = 0;  // 0: no nested virtualization
  std::vector<kvm_cpuid_entry2> cpuid;  // KVM_GET_SUPPORTED_CPUID
  std::vector<uint32_t> msrs;  // that this host's KVM lists
  bool has_one_reg = false;    // KVM_GET_ONE_REG, which alone has the guest's shadow stack pointer
  std::map<std::string, KnownMsrs> known;  // by CPUID and machine checks
  std::optional<IrqfdFlush> irqfd_flush;   // made for the first VM that needs it

  static Result<std::shared_ptr<KvmHost>> ask();
  static Result<std::shared_ptr<KvmHost>> ask(Fd device, KvmDoor call);
  // kvm_msrs.cc: of vCPUs with this kvm_cpuid2 and this KVM_X86_SETUP_MCE, either of which may be empty. Asks a VM of its own.
  const KnownMsrs& known_msrs(const std::string& cpuid, const std::string& machine_checks);
  // How fast a new guest's TSC runs; 0: KVM does not say.
  uint32_t tsc_khz() const;
  bool can_scale_tsc() const;
};

// The extended state of a guest that has all that this processor has (Intel SDM volume 1, 13.2, CPUID leaf 0xd). KVM's own answer
// depends on what the process that asks may give its guests (AMX), and the one that asks is not the VMM.
size_t most_xsave_bytes();

// Checkpoint, the target runs: finds out beforehand what would cost time while it is stopped.
void prepare_kvm(const KvmNotes& notes, KvmHost& host);
// Whether the IOAPIC of one of its VMs is the VMM's.
bool has_split_irqchip(const KvmNotes& notes);
// Checkpoint, world stopped, every vCPU at rest. `image` has the threads, whose filters may forbid what they are to ask.
Result<void> save_kvm(StoppedWorld& world, const Ledger& ledger, const KvmNotes& notes, KvmHost& host, pb::Image& image);
// ... and the descriptors saved: which of them are the eventfds of irqfds and ioeventfds.
Result<void> link_kvm_events(const KvmNotes& notes, pb::Image& image);

// Preflight, before anything is started.
void check_kvm(const pb::Image& image, CpuCheck cpu_check, GuestClock clock, std::vector<Error>& problems,
               std::vector<std::string>& notes);
void check_msrs(const pb::Kvm& kvm, const pb::KvmObject& vcpu, KvmHost& host, std::vector<Error>& problems);
// kvm_host.cc: CPUID bits of the guest that this host lacks, one by one.
void check_guest_cpuid(const pb::Kvm& kvm, const KvmHost& host, CpuCheck cpu_check, std::vector<Error>& problems,
                       std::vector<std::string>& notes);
// ... and the frequency of its TSC.
void check_guest_tsc(const pb::Kvm& kvm, const KvmHost& host, CpuCheck cpu_check, std::vector<Error>& problems,
                     std::vector<std::string>& notes);

// Restart: makes the virtual machines again. `device` is /dev/kvm; numbers from `first_service_fd` on are free and closed later.
Result<void> plan_kvm(const pb::Image& image, int device, int first_service_fd, GuestClock clock, TapeDraft& tape);

// kvm_check.cc: of an image
const pb::Kvm& kvm_of(const pb::Image& image);                                  // of its one process; empty: it has none
pb::Kvm& kvm_of(pb::Image* image);                                             // made where there is none
std::string kvm_call_name(uint32_t request);
// The payload of the object's last call of that kind; empty: there is none.
std::string payload_of(const pb::Kvm& kvm, uint32_t object, uint32_t request);
bool kvm_call_refers_to_events(uint32_t request);                              // eventfds are among its arguments
const pb::KvmObject* find_kvm_object(const pb::Kvm& kvm, uint32_t id);         // nullptr: there is none
kvm_clock_data kvm_clock_of(const pb::KvmVmState& state);                      // zeros when there is none

// kvm_state.cc: what can be read back of one VM or vCPU. The tape is played in the target between the two.
struct KvmQuestions {
  int fd = -1;
  std::vector<uint32_t> msrs;  // of a vCPU, asked for all at once, or one by one since a list ends at the first that is refused
  bool msrs_one_by_one = false;
  bool has_shadow_stacks = false;  // the vCPU's guest may use them
  std::vector<TapeWord> rooms;                              // in the order of the questions that must be answered
  std::vector<std::pair<size_t, TapeWord>> msr_answers;     // call, room
  size_t tsc_khz = 0, tsc_offset = 0, ssp = 0;              // calls that may fail
  TapeWord tsc_offset_room, ssp_room;
};
void ask_vm(int fd, bool has_irqchip, bool has_pit, TapeDraft& tape, KvmQuestions& questions);
void save_vm(const KvmQuestions& questions, const TapeDraft& tape, bool has_irqchip, bool has_pit, pb::KvmVmState* saved);
void ask_vcpu(int fd, bool has_lapic, const KvmHost& host, TapeDraft& tape, KvmQuestions& questions);
// False when an MSR of the list could not be read: the vCPU must be asked again, for one after the other.
bool save_vcpu(const KvmQuestions& questions, const TapeDraft& tape, bool has_lapic, const KvmHost& host,
               pb::KvmVcpuState* saved);
// How a vCPU's TSC goes on.
struct TscPlan {
  uint64_t goes_on_at = 0;
  bool by_offset = false;   // from the host's TSC; otherwise the value is written
  uint32_t frequency = 0;   // kHz to ask for; 0: new vCPUs have it
};

void plan_vm_state(const pb::KvmVmState& state, int fd, TapeDraft& tape);
void plan_pit(const pb::KvmVmState& state, int fd, TapeDraft& tape);
// Whether a new vCPU of the image's host had that value, too.
bool is_fresh(const pb::KvmVcpuState& state, const kvm_msr_entry& saved);
// `offset` is where the new TSC offset will lie when the tape is played.
void plan_vcpu_state(const pb::KvmVcpuState& state, const std::string& cpuid, const TscPlan& tsc, const TapeWord& offset, int fd,
                     TapeDraft& tape);

// kvm_clock.cc: how the guest's clocks go on
class GuestTime {
 public:
  // `kvm_tells_real_time`: KVM_SET_CLOCK knows KVM_CLOCK_REALTIME (Linux 5.16).
  GuestTime(const pb::Image& image, GuestClock clock, int64_t now_real_ns, bool kvm_tells_real_time);
  int64_t gap_ns(uint32_t vm) const;  // that the clocks of this VM's guest are put forward by
  TscPlan tsc_of(const pb::KvmObject& vcpu) const;
  void plan_clock(const pb::KvmObject& vm, int fd, TapeDraft& tape) const;
  void plan_stolen_time(const pb::KvmObject& vcpu, TapeDraft& tape) const;

 private:
  const pb::Image& image_;
  bool adds_gap_;
  int64_t now_real_ns_;
  bool kvm_tells_real_time_;
  bool same_boot_;
  std::map<uint32_t, uint64_t> unshifted_tsc_;  // of each VM: its TSC when it stood still, less the vCPU's offset
};

// kvm_msrs.cc
std::vector<uint32_t> msrs_to_ask(const KvmHost& host, const std::string& machine_checks);
std::string msr_list(const std::vector<uint32_t>& indices);  // kvm_msrs, to be filled
// Whether the features that the guest was shown (kvm_cpuid2) say that it has this MSR; also true where nobody can tell.
inline constexpr uint32_t kMsrOfShadowStacks = 0x6a4;  // IA32_PL0_SSP
bool guest_may_see(const std::string& cpuid, uint32_t msr);

std::optional<uint64_t> saved_msr(const pb::KvmVcpuState& state, uint32_t index);
uint64_t ticks_of(int64_t ns, uint32_t tsc_khz);
void note_guests_that_mind_a_gap(const pb::Image& image, GuestClock clock, std::vector<std::string>& notes);

}  // namespace vmckpt
