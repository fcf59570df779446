// The state of a VM and of a vCPU that KVM tells: each ioctl that reads stands beside the one that writes. The order of reading
// and of writing is that of QEMU's and of the kernel's own test (tools/testing/selftests/kvm/x86/state_test.c), with a reason
// where it matters.
#include <algorithm>
#include <cstring>

#include <sys/syscall.h>

#include "modules/kvm.h"

namespace vmckpt {
namespace {

constexpr int kIrqchips = 3;  // PIC master, PIC slave, IOAPIC
constexpr uint32_t kMsrTsc = 0x10;

uint64_t number(int fd) { return static_cast<uint64_t>(fd); }

// A question is a room that one ioctl fills.
uint64_t ask_into(KvmQuestions& questions, uint64_t request, uint64_t room, const char* name, TapeDraft& tape) {
  tape.call(SYS_ioctl, {number(questions.fd), request, room}, true, fmt::format("{} of descriptor {}", name, questions.fd));
  questions.rooms.push_back(room);
  return room;
}

std::string bytes_at(const TapeDraft& tape, uint64_t room, size_t bytes) {
  return std::string(static_cast<const char*>(tape.contents(room)), bytes);
}

void put(uint64_t request, const char* name, const std::string& state, int fd, TapeDraft& tape) {
  if (state.empty()) return;
  tape.call(SYS_ioctl, {number(fd), request, tape.data(state.data(), state.size())}, true,
            fmt::format("{} of descriptor {}", name, fd));
}

// kvm_device_attr that points to the offset's room.
uint64_t tsc_offset_attribute(uint64_t offset_room, TapeDraft& tape) {
  kvm_device_attr attribute{};
  attribute.group = KVM_VCPU_TSC_CTRL;
  attribute.attr = KVM_VCPU_TSC_OFFSET;
  uint64_t room = tape.data_of(attribute);
  tape.point(room, offsetof(kvm_device_attr, addr), offset_room);
  return room;
}

template <class T>
std::string text_of(const T& value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}

}  // namespace

// ---- a VM: interrupt controllers, timer, clock -----------------------------------------------------------------------

void ask_vm(int fd, bool has_irqchip, bool has_pit, TapeDraft& tape, KvmQuestions& questions) {
  questions.fd = fd;
  for (int i = 0; has_irqchip && i < kIrqchips; ++i) {
    kvm_irqchip chip{};
    chip.chip_id = static_cast<uint32_t>(i);
    ask_into(questions, KVM_GET_IRQCHIP, tape.data_of(chip), "KVM_GET_IRQCHIP", tape);
  }
  if (has_pit) ask_into(questions, KVM_GET_PIT2, tape.room(sizeof(kvm_pit_state2)), "KVM_GET_PIT2", tape);
  ask_into(questions, KVM_GET_CLOCK, tape.room(sizeof(kvm_clock_data)), "KVM_GET_CLOCK", tape);
}

void save_vm(const KvmQuestions& questions, const TapeDraft& tape, bool has_irqchip, bool has_pit, pb::KvmVmState* saved) {
  size_t next = 0;
  for (int i = 0; has_irqchip && i < kIrqchips; ++i) {
    saved->add_irqchips(bytes_at(tape, questions.rooms[next++], sizeof(kvm_irqchip)));
  }
  if (has_pit) saved->set_pit(bytes_at(tape, questions.rooms[next++], sizeof(kvm_pit_state2)));
  saved->set_clock(bytes_at(tape, questions.rooms[next++], sizeof(kvm_clock_data)));
}

void plan_vm_state(const pb::KvmVmState& state, int fd, TapeDraft& tape) {
  for (const std::string& chip : state.irqchips()) put(KVM_SET_IRQCHIP, "KVM_SET_IRQCHIP", chip, fd, tape);
  put(KVM_SET_PIT2, "KVM_SET_PIT2", state.pit(), fd, tape);
}

// With KVM_CLOCK_REALTIME the kernel adds the real time that has gone by since the checkpoint: the guest's clock is right.
void plan_vm_clock(const pb::KvmVmState& state, int fd, TapeDraft& tape) {
  if (state.clock().size() != sizeof(kvm_clock_data)) return;
  kvm_clock_data clock{};
  std::memcpy(&clock, state.clock().data(), sizeof clock);
  clock.flags &= KVM_CLOCK_REALTIME;
  clock.host_tsc = 0;
  put(KVM_SET_CLOCK, "KVM_SET_CLOCK", text_of(clock), fd, tape);
}

// ---- a vCPU ----------------------------------------------------------------------------------------------------------

void ask_vcpu(int fd, bool has_lapic, const KvmHost& host, TapeDraft& tape, KvmQuestions& questions) {
  questions.fd = fd;
  // First: it makes a pending INIT or SIPI part of the state that the others show.
  ask_into(questions, KVM_GET_MP_STATE, tape.room(sizeof(kvm_mp_state)), "KVM_GET_MP_STATE", tape);
  ask_into(questions, KVM_GET_REGS, tape.room(sizeof(kvm_regs)), "KVM_GET_REGS", tape);
  if (host.has_sregs2) {
    ask_into(questions, KVM_GET_SREGS2, tape.room(sizeof(kvm_sregs2)), "KVM_GET_SREGS2", tape);
  } else {
    ask_into(questions, KVM_GET_SREGS, tape.room(sizeof(kvm_sregs)), "KVM_GET_SREGS", tape);
  }
  ask_into(questions, host.has_xsave2 ? KVM_GET_XSAVE2 : KVM_GET_XSAVE, tape.room(host.xsave_bytes), "KVM_GET_XSAVE", tape);
  ask_into(questions, KVM_GET_XCRS, tape.room(sizeof(kvm_xcrs)), "KVM_GET_XCRS", tape);
  ask_into(questions, KVM_GET_DEBUGREGS, tape.room(sizeof(kvm_debugregs)), "KVM_GET_DEBUGREGS", tape);
  ask_into(questions, KVM_GET_VCPU_EVENTS, tape.room(sizeof(kvm_vcpu_events)), "KVM_GET_VCPU_EVENTS", tape);
  std::string msrs(sizeof(kvm_msrs) + host.msrs.size() * sizeof(kvm_msr_entry), '\0');
  auto* list = reinterpret_cast<kvm_msrs*>(msrs.data());
  list->nmsrs = static_cast<uint32_t>(host.msrs.size());
  for (size_t i = 0; i < host.msrs.size(); ++i) {
    kvm_msr_entry entry{host.msrs[i], 0, 0};
    std::memcpy(msrs.data() + sizeof(kvm_msrs) + i * sizeof entry, &entry, sizeof entry);
  }
  ask_into(questions, KVM_GET_MSRS, tape.data(msrs.data(), msrs.size()), "KVM_GET_MSRS", tape);
  questions.parts.push_back({tape.calls() - 1, 0});  // how many could be read
  const size_t khz = tape.call(SYS_ioctl, {number(fd), KVM_GET_TSC_KHZ, 0});
  questions.parts.push_back({khz, 0});
  if (has_lapic) ask_into(questions, KVM_GET_LAPIC, tape.room(sizeof(kvm_lapic_state)), "KVM_GET_LAPIC", tape);
  if (host.nested_bytes != 0) {
    std::string nested(host.nested_bytes, '\0');
    reinterpret_cast<kvm_nested_state*>(nested.data())->size = static_cast<uint32_t>(nested.size());
    ask_into(questions, KVM_GET_NESTED_STATE, tape.data(nested.data(), nested.size()), "KVM_GET_NESTED_STATE", tape);
  }
  if (host.has_tsc_offset) {
    const uint64_t offset = tape.room(sizeof(uint64_t));
    questions.parts.push_back({tape.call(SYS_ioctl, {number(fd), KVM_GET_DEVICE_ATTR, tsc_offset_attribute(offset, tape)}), 0});
    questions.rooms.push_back(offset);
  }
}

Result<bool> save_vcpu(const KvmQuestions& questions, const TapeDraft& tape, bool has_lapic, KvmHost& host, pb::KvmVcpuState* saved) {
  const auto msrs_read = static_cast<size_t>(tape.result(questions.parts[0].first));
  if (msrs_read < host.msrs.size()) {
    host.msrs.erase(host.msrs.begin() + static_cast<ptrdiff_t>(msrs_read));  // the one at which reading ended
    return false;
  }
  size_t next = 0;
  auto take = [&](size_t bytes) { return bytes_at(tape, questions.rooms[next++], bytes); };
  saved->set_mp_state(take(sizeof(kvm_mp_state)));
  saved->set_regs(take(sizeof(kvm_regs)));
  if (host.has_sregs2) {
    saved->set_sregs2(take(sizeof(kvm_sregs2)));
  } else {
    saved->set_sregs(take(sizeof(kvm_sregs)));
  }
  std::string xsave = take(host.xsave_bytes);
  // The room is for the largest guest; what this one's KVM has left of it is zero.
  xsave.resize(std::max(xsave.find_last_not_of('\0') + 1, kPlainXsaveBytes));
  saved->set_xsave(std::move(xsave));
  saved->set_xcrs(take(sizeof(kvm_xcrs)));
  saved->set_debug_regs(take(sizeof(kvm_debugregs)));
  saved->set_events(take(sizeof(kvm_vcpu_events)));
  saved->set_msrs(take(sizeof(kvm_msrs) + host.msrs.size() * sizeof(kvm_msr_entry)).substr(sizeof(kvm_msrs)));
  if (int64_t khz = tape.result(questions.parts[1].first); khz > 0) saved->set_tsc_khz(static_cast<uint32_t>(khz));
  if (has_lapic) saved->set_lapic(take(sizeof(kvm_lapic_state)));
  if (host.nested_bytes != 0) saved->set_nested(take(host.nested_bytes));
  if (host.has_tsc_offset && tape.succeeded(questions.parts[2].first)) {
    saved->set_has_tsc_offset(true);
    saved->set_tsc_offset(tape.as<int64_t>(questions.rooms[next]));
  }
  return true;
}

uint64_t tsc_after(uint64_t saved, uint32_t tsc_khz, const TscGap& gap) {
  constexpr unsigned kNsPerMs = 1'000'000;
  const auto ticks = static_cast<unsigned __int128>(std::max<int64_t>(gap.away_ns, 0)) * tsc_khz / kNsPerMs;
  return saved + static_cast<uint64_t>(ticks);
}

namespace {

// KVM reads as much as the largest guest's state takes, whatever the header says that there is.
std::string padded_xsave(std::string xsave) {
  if (!xsave.empty()) xsave.resize(std::max(xsave.size(), most_xsave_bytes()));
  return xsave;
}

// The TSC: by its offset where the host's TSC has only counted on. On another host, or after its reboot, by its value: KVM then
// takes writes of vCPUs that are less than a second apart for the same moment, so that they stay in step.
bool goes_on_by_offset(const pb::KvmVcpuState& state, const TscGap& gap) { return state.has_tsc_offset() && gap.is_this_boot; }

void put_msrs(const pb::KvmVcpuState& state, const TscGap& gap, int fd, TapeDraft& tape) {
  const std::string& entries = state.msrs();
  std::string list(sizeof(kvm_msrs), '\0');
  uint32_t count = 0;
  for (size_t at = 0; at + sizeof(kvm_msr_entry) <= entries.size(); at += sizeof(kvm_msr_entry)) {
    kvm_msr_entry entry;
    std::memcpy(&entry, entries.data() + at, sizeof entry);
    if (entry.index == kMsrTsc) {
      if (goes_on_by_offset(state, gap)) continue;
      entry.data = tsc_after(entry.data, state.tsc_khz(), gap);
    }
    list += text_of(entry);
    ++count;
  }
  std::memcpy(list.data(), &count, sizeof count);
  tape.call(kOpSetMsrs, {number(fd), tape.data(list.data(), list.size())}, true, fmt::format("KVM_SET_MSRS of descriptor {}", fd));
}

}  // namespace

void plan_vcpu_state(const pb::KvmVcpuState& state, const TscGap& gap, int fd, TapeDraft& tape) {
  // Before the TSC is set. Another host's guests run at another frequency, unless they are told.
  if (state.tsc_khz() != 0 && !gap.is_this_boot) {
    tape.call(SYS_ioctl, {number(fd), KVM_SET_TSC_KHZ, state.tsc_khz()}, false, fmt::format("KVM_SET_TSC_KHZ of descriptor {}", fd));
  }
  // The APIC's base and the paging mode say what the rest means.
  put(KVM_SET_SREGS2, "KVM_SET_SREGS2", state.sregs2(), fd, tape);
  put(KVM_SET_SREGS, "KVM_SET_SREGS", state.sregs(), fd, tape);
  // XCR0 allows the components that XSAVE brings.
  put(KVM_SET_XCRS, "KVM_SET_XCRS", state.xcrs(), fd, tape);
  put(KVM_SET_XSAVE, "KVM_SET_XSAVE", padded_xsave(state.xsave()), fd, tape);
  // The timer's mode before its deadline, which is an MSR.
  put(KVM_SET_LAPIC, "KVM_SET_LAPIC", state.lapic(), fd, tape);
  if (goes_on_by_offset(state, gap)) {
    const uint64_t offset = tape.data_of(state.tsc_offset());
    tape.call(SYS_ioctl, {number(fd), KVM_SET_DEVICE_ATTR, tsc_offset_attribute(offset, tape)}, true,
              fmt::format("set the TSC's offset of descriptor {}", fd));
  }
  put_msrs(state, gap, fd, tape);
  put(KVM_SET_NESTED_STATE, "KVM_SET_NESTED_STATE", state.nested(), fd, tape);
  // Registers drop pending exceptions, so events come after them.
  put(KVM_SET_REGS, "KVM_SET_REGS", state.regs(), fd, tape);
  put(KVM_SET_VCPU_EVENTS, "KVM_SET_VCPU_EVENTS", state.events(), fd, tape);
  put(KVM_SET_DEBUGREGS, "KVM_SET_DEBUGREGS", state.debug_regs(), fd, tape);
  put(KVM_SET_MP_STATE, "KVM_SET_MP_STATE", state.mp_state(), fd, tape);
}

}  // namespace vmckpt
