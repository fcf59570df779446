// How a guest's clocks go on after a restart: kvmclock, the TSC, and what the guest's scheduler is told.
//
// By default they go on from where they stood, as QEMU lets them after `stop` and `cont`. A guest whose clock jumps charges the
// gap to the task that ran: that task then waits until all others have had as much. With GuestClock::kAdvance the gap is added
// all the same, and told to the guest as stolen time (MSR_KVM_STEAL_TIME: time that the guest wanted to run and the host did not
// let it), which Linux takes off the time that it charges (update_rq_clock_task, CONFIG_PARAVIRT_TIME_ACCOUNTING).
//
// The TSC. A guest's TSC is the host's plus an offset (scaled, where the guest was promised another frequency). Let g be the
// saved offset and v the value that was read: v - g is the host's TSC at that moment, as the guest scales it, and the latest of
// all vCPUs is when the guest stood still. Each vCPU then gets the offset that makes its TSC go on from there,
//
//     new offset = max(v - g over all vCPUs) + g (+ the gap) - the host's TSC now
//
// with one reading of the host's TSC for all of them, so that they stay exactly in step. This is the rule of KVM's own
// documentation (Documentation/virt/kvm/devices/vcpu.rst, KVM_VCPU_TSC_OFFSET). No old offset is trusted: that the host has the
// same boot id does not mean that its TSC has counted on, it starts anew after suspend to memory or disk. Where a guest's TSC may
// be scaled (another host or boot, KVM_SET_TSC_KHZ) or has no readable offset, the value is written instead; KVM takes writes of
// vCPUs that are less than a second apart for the same moment (kvm_synchronize_tsc), which keeps them in step, too.
#include <algorithm>
#include <cstddef>
#include <cstring>

#include <sys/syscall.h>

#include "core/clock.h"
#include "modules/kvm.h"
#include "recorder/kvm_calls.h"

namespace vmckpt {
namespace {

constexpr uint32_t kMsrTsc = 0x10;
constexpr uint32_t kMsrStealTime = 0x4b564d03;
constexpr uint64_t kStealTimeEnabled = 1, kStealTimeAddress = ~uint64_t{0x3f};  // Documentation/virt/kvm/x86/msr.rst

bool has_own_tsc_khz(const pb::Kvm& kvm, const pb::KvmObject& vcpu) {
  return std::any_of(kvm.records().begin(), kvm.records().end(), [&](const pb::KvmRecord& record) {
    return record.request() == KVM_SET_TSC_KHZ && (record.object() == vcpu.id() || record.object() == vcpu.parent());
  });
}

// Where the VMM has the guest's memory at `address`; 0: nowhere, or not all of `bytes`.
uint64_t guest_memory(const pb::Kvm& kvm, uint32_t vm, uint64_t address, uint64_t bytes) {
  for (const pb::KvmRecord& record : kvm.records()) {
    if (record.object() != vm) continue;
    if (record.request() != KVM_SET_USER_MEMORY_REGION && record.request() != KVM_SET_USER_MEMORY_REGION2) continue;
    kvm_userspace_memory_region slot{};
    std::memcpy(&slot, record.payload().data(), std::min(sizeof slot, record.payload().size()));
    const uint64_t offset = address - slot.guest_phys_addr;
    // The upper half of the number is the address space: 1 is system management mode's.
    if (slot.slot >> 16 != 0 || address < slot.guest_phys_addr || offset >= slot.memory_size || slot.memory_size - offset < bytes)
      continue;
    return slot.userspace_addr + offset;
  }
  return 0;
}

// Where a vCPU's guest is told how much time was stolen from it (struct kvm_steal_time begins with it); 0: nowhere.
uint64_t stolen_time_of(const pb::Kvm& kvm, const pb::KvmObject& vcpu) {
  const std::optional<uint64_t> msr = saved_msr(vcpu.vcpu(), kMsrStealTime);
  if (!msr || (*msr & kStealTimeEnabled) == 0) return 0;
  return guest_memory(kvm, vcpu.parent(), *msr & kStealTimeAddress, sizeof(uint64_t));
}

int64_t real_time_of(const pb::Image& image, uint32_t vm) {
  const pb::KvmObject* object = find_kvm_object(kvm_of(image), vm);
  if (object == nullptr) return image.host().realtime_ns();
  const kvm_clock_data clock = kvm_clock_of(object->vm());
  return (clock.flags & KVM_CLOCK_REALTIME) != 0 ? static_cast<int64_t>(clock.realtime) : image.host().realtime_ns();
}

}  // namespace

std::optional<uint64_t> saved_msr(const pb::KvmVcpuState& state, uint32_t index) {
  for (size_t at = 0; at + sizeof(kvm_msr_entry) <= state.msrs().size(); at += sizeof(kvm_msr_entry)) {
    kvm_msr_entry entry;
    std::memcpy(&entry, state.msrs().data() + at, sizeof entry);
    if (entry.index == index) return entry.data;
  }
  return std::nullopt;
}

uint64_t ticks_of(int64_t ns, uint32_t tsc_khz) {
  constexpr unsigned kNsPerMs = 1'000'000;
  return static_cast<uint64_t>(static_cast<unsigned __int128>(std::max<int64_t>(ns, 0)) * tsc_khz / kNsPerMs);
}

GuestTime::GuestTime(const pb::Image& image, GuestClock clock, int64_t now_real_ns, bool kvm_tells_real_time)
    : image_(image),
      adds_gap_(clock == GuestClock::kAdvance),
      now_real_ns_(now_real_ns),
      kvm_tells_real_time_(kvm_tells_real_time),
      same_boot_(is_this_boot(image.host())) {
  for (const pb::KvmObject& vcpu : kvm_of(image).objects()) {
    const std::optional<uint64_t> tsc = saved_msr(vcpu.vcpu(), kMsrTsc);
    if (!vcpu.vcpu().has_tsc_offset() || !tsc || !same_boot_ || has_own_tsc_khz(kvm_of(image), vcpu)) continue;
    uint64_t& latest = unshifted_tsc_[vcpu.parent()];
    latest = std::max(latest, *tsc - static_cast<uint64_t>(vcpu.vcpu().tsc_offset()));
  }
}

int64_t GuestTime::gap_ns(uint32_t vm) const {
  return adds_gap_ ? std::max<int64_t>(now_real_ns_ - real_time_of(image_, vm), 0) : 0;
}

void GuestTime::plan_clock(const pb::KvmObject& vm, int fd, TapeDraft& tape) const {
  if (vm.vm().clock().size() != sizeof(kvm_clock_data)) return;
  const kvm_clock_data saved = kvm_clock_of(vm.vm());
  kvm_clock_data clock{};
  if (adds_gap_ && kvm_tells_real_time_ && (saved.flags & KVM_CLOCK_REALTIME) != 0) {
    clock.clock = saved.clock;
    clock.realtime = saved.realtime;
    clock.flags = KVM_CLOCK_REALTIME;  // KVM adds the real time since then at the very moment it is set
  } else {
    clock.clock = saved.clock + static_cast<uint64_t>(gap_ns(vm.id()));
  }
  tape.call(SYS_ioctl, {static_cast<uint64_t>(fd), KVM_SET_CLOCK, tape.data_of(clock)}, true,
            fmt::format("KVM_SET_CLOCK of descriptor {}", fd));
}

TscPlan GuestTime::tsc_of(const pb::KvmObject& vcpu) const {
  const pb::KvmVcpuState& state = vcpu.vcpu();
  TscPlan plan;
  plan.frequency = same_boot_ ? 0 : state.tsc_khz();
  const std::optional<uint64_t> tsc = saved_msr(state, kMsrTsc);
  const uint64_t gap = ticks_of(gap_ns(vcpu.parent()), state.tsc_khz());
  auto unshifted = unshifted_tsc_.find(vcpu.parent());
  const bool by_offset = tsc && state.has_tsc_offset() && unshifted != unshifted_tsc_.end() &&
                         !has_own_tsc_khz(kvm_of(image_), vcpu);
  plan.goes_on_at = by_offset ? unshifted->second + static_cast<uint64_t>(state.tsc_offset()) + gap : tsc.value_or(0) + gap;
  plan.by_offset = by_offset;
  return plan;
}

void GuestTime::plan_stolen_time(const pb::KvmObject& vcpu, TapeDraft& tape) const {
  const int64_t gap = gap_ns(vcpu.parent());
  const uint64_t stolen = gap > 0 ? stolen_time_of(kvm_of(image_), vcpu) : 0;
  if (stolen != 0)
    tape.call(kOpAdd, {stolen, static_cast<uint64_t>(gap)}, true, fmt::format("tell vCPU {} of the time away", vcpu.number()));
}

// A gap that no scheduler minds needs no note.
void note_guests_that_mind_a_gap(const pb::Image& image, GuestClock clock, std::vector<std::string>& notes) {
  constexpr int64_t kNobodyMinds_ns = kNsPerSecond;
  if (clock != GuestClock::kAdvance) return;
  const GuestTime time(image, clock, clock_ns(CLOCK_REALTIME), false);
  for (const pb::KvmObject& vcpu : kvm_of(image).objects()) {
    if (vcpu.vcpu().regs().empty() || time.gap_ns(vcpu.parent()) < kNobodyMinds_ns || stolen_time_of(kvm_of(image), vcpu) != 0)
      continue;
    notes.push_back(
        fmt::format("the guest's clock goes forward by {} s, and the guest of vCPU {} does not ask KVM for stolen time: it may "
                    "take the gap for time that a task has run, and a busy guest may seem to stand still for as long",
                    time.gap_ns(vcpu.parent()) / kNsPerSecond, vcpu.number()));
    return;  // vCPUs are alike
  }
}

}  // namespace vmckpt
