// The state of a VM and of a vCPU that KVM tells: each ioctl that reads stands beside the one that writes. The order of reading
// and of writing is that of QEMU's and of the kernel's own test (tools/testing/selftests/kvm/x86/state_test.c), with a reason
// where it matters.
#include <algorithm>
#include <cstring>

#include <sys/syscall.h>

#include "modules/kvm.h"
#include "modules/played/kvm_msrs.h"
#include "modules/played/operations.h"

namespace vmckpt {
namespace {

constexpr int kIrqchips = 3;  // PIC master, PIC slave, IOAPIC
constexpr uint32_t kMsrTsc = 0x10;

uint64_t number(int fd) { return static_cast<uint64_t>(fd); }

// A question is a room that one ioctl fills.
TapeWord ask_into(KvmQuestions& questions, uint64_t request, const TapeWord& room, const char* name, TapeDraft& tape) {
  tape.call(SYS_ioctl, {number(questions.fd), request, room}, true, fmt::format("{} of descriptor {}", name, questions.fd));
  questions.rooms.push_back(room);
  return room;
}

std::string bytes_at(const TapeDraft& tape, const TapeWord& room, size_t bytes) {
  return std::string(static_cast<const char*>(tape.contents(room)), bytes);
}

void put(uint64_t request, const char* name, const std::string& state, int fd, TapeDraft& tape) {
  if (state.empty()) return;
  tape.call(SYS_ioctl, {number(fd), request, tape.data(state.data(), state.size())}, true,
            fmt::format("{} of descriptor {}", name, fd));
}

// kvm_device_attr that points to the offset's room.
TapeWord tsc_offset_attribute(const TapeWord& offset_room, TapeDraft& tape) {
  kvm_device_attr attribute{};
  attribute.group = KVM_VCPU_TSC_CTRL;
  attribute.attr = KVM_VCPU_TSC_OFFSET;
  const TapeWord room = tape.data_of(attribute);
  tape.point(room, offsetof(kvm_device_attr, addr), offset_room);
  return room;
}

// kvm_one_reg that points to the room of the guest's shadow stack pointer (KVM_X86_REG_KVM(KVM_REG_GUEST_SSP), Linux 6.18), which
// is no MSR: what MSR_IA32_PL3_SSP and its kin hold is loaded into it by the processor.
TapeWord shadow_stack_register(const TapeWord& value_room, TapeDraft& tape) {
  constexpr uint64_t kRegisterOfKvm = 3, kGuestSsp = 0;
  kvm_one_reg reg{};
  reg.id = KVM_REG_X86 | KVM_REG_SIZE_U64 | kRegisterOfKvm << 32 | kGuestSsp;
  const TapeWord room = tape.data_of(reg);
  tape.point(room, offsetof(kvm_one_reg, addr), value_room);
  return room;
}

template <class T>
std::string text_of(const T& value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}

}  // namespace

bool is_fresh(const pb::KvmVcpuState& state, const kvm_msr_entry& saved) {
  uint64_t fresh = 0;
  for (size_t at = 0; at + sizeof(kvm_msr_entry) <= state.fresh_msrs().size(); at += sizeof(kvm_msr_entry)) {
    kvm_msr_entry entry;
    std::memcpy(&entry, state.fresh_msrs().data() + at, sizeof entry);
    if (entry.index == saved.index) fresh = entry.data;
  }
  return saved.data == fresh;
}

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
}

// The PIT runs as soon as it is set. A tick that it raised before the local APICs are set would be lost with their old state, and
// where it waits for the guest to acknowledge a tick before it raises the next (reinjection), none would ever come again
// (arch/x86/kvm/i8254.c, pit_do_work). QEMU sets it last, too.
void plan_pit(const pb::KvmVmState& state, int fd, TapeDraft& tape) { put(KVM_SET_PIT2, "KVM_SET_PIT2", state.pit(), fd, tape); }

// ---- a vCPU ----------------------------------------------------------------------------------------------------------

namespace {

void ask_msrs(TapeDraft& tape, KvmQuestions& questions) {
  auto ask = [&](const std::vector<uint32_t>& indices) {
    const std::string list = msr_list(indices);
    const TapeWord room = tape.data(list.data(), list.size());
    questions.msr_answers.push_back({tape.call(SYS_ioctl, {number(questions.fd), KVM_GET_MSRS, room}), room});
  };
  if (!questions.msrs_one_by_one) return ask(questions.msrs);
  for (uint32_t index : questions.msrs) ask({index});
}

bool take_msrs(const KvmQuestions& questions, const TapeDraft& tape, pb::KvmVcpuState* saved) {
  std::string msrs;
  for (const auto& [call, room] : questions.msr_answers) {
    const int64_t read = std::max<int64_t>(tape.result(call), 0);
    if (!questions.msrs_one_by_one && static_cast<size_t>(read) < questions.msrs.size()) return false;
    msrs += bytes_at(tape, room + sizeof(kvm_msrs), static_cast<size_t>(read) * sizeof(kvm_msr_entry));
  }
  saved->set_msrs(std::move(msrs));
  return true;
}

}  // namespace

void ask_vcpu(int fd, bool has_lapic, const KvmHost& host, TapeDraft& tape, KvmQuestions& questions) {
  questions.fd = fd;
  // First: it makes a pending INIT or SIPI part of the state that the others show.
  ask_into(questions, KVM_GET_MP_STATE, tape.room(sizeof(kvm_mp_state)), "KVM_GET_MP_STATE", tape);
  // Then this, which may deliver what is pending into CR2 and DR6 (kvm_deliver_exception_payload).
  ask_into(questions, KVM_GET_VCPU_EVENTS, tape.room(sizeof(kvm_vcpu_events)), "KVM_GET_VCPU_EVENTS", tape);
  ask_into(questions, KVM_GET_REGS, tape.room(sizeof(kvm_regs)), "KVM_GET_REGS", tape);
  if (host.has_sregs2) {
    ask_into(questions, KVM_GET_SREGS2, tape.room(sizeof(kvm_sregs2)), "KVM_GET_SREGS2", tape);
  } else {
    ask_into(questions, KVM_GET_SREGS, tape.room(sizeof(kvm_sregs)), "KVM_GET_SREGS", tape);
  }
  ask_into(questions, host.has_xsave2 ? KVM_GET_XSAVE2 : KVM_GET_XSAVE, tape.room(host.xsave_bytes), "KVM_GET_XSAVE", tape);
  ask_into(questions, KVM_GET_XCRS, tape.room(sizeof(kvm_xcrs)), "KVM_GET_XCRS", tape);
  ask_into(questions, KVM_GET_DEBUGREGS, tape.room(sizeof(kvm_debugregs)), "KVM_GET_DEBUGREGS", tape);
  ask_msrs(tape, questions);
  questions.tsc_khz = tape.call(SYS_ioctl, {number(fd), KVM_GET_TSC_KHZ, 0});
  if (has_lapic) ask_into(questions, KVM_GET_LAPIC, tape.room(sizeof(kvm_lapic_state)), "KVM_GET_LAPIC", tape);
  if (host.nested_bytes != 0) {
    std::string nested(host.nested_bytes, '\0');
    reinterpret_cast<kvm_nested_state*>(nested.data())->size = static_cast<uint32_t>(nested.size());
    ask_into(questions, KVM_GET_NESTED_STATE, tape.data(nested.data(), nested.size()), "KVM_GET_NESTED_STATE", tape);
  }
  if (host.has_tsc_offset) {
    questions.tsc_offset_room = tape.room(sizeof(uint64_t));
    questions.tsc_offset = tape.call(SYS_ioctl,
                                     {number(fd), KVM_GET_DEVICE_ATTR, tsc_offset_attribute(questions.tsc_offset_room, tape)});
  }
  if (host.has_one_reg && questions.has_shadow_stacks) {
    questions.ssp_room = tape.room(sizeof(uint64_t));
    questions.ssp = tape.call(SYS_ioctl, {number(fd), KVM_GET_ONE_REG, shadow_stack_register(questions.ssp_room, tape)});
  }
}

bool save_vcpu(const KvmQuestions& questions, const TapeDraft& tape, bool has_lapic, const KvmHost& host,
               pb::KvmVcpuState* saved) {
  if (!take_msrs(questions, tape, saved)) return false;
  size_t next = 0;
  auto take = [&](size_t bytes) { return bytes_at(tape, questions.rooms[next++], bytes); };
  saved->set_mp_state(take(sizeof(kvm_mp_state)));
  saved->set_events(take(sizeof(kvm_vcpu_events)));
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
  if (int64_t khz = tape.result(questions.tsc_khz); khz > 0) saved->set_tsc_khz(static_cast<uint32_t>(khz));
  if (has_lapic) saved->set_lapic(take(sizeof(kvm_lapic_state)));
  if (host.nested_bytes != 0) saved->set_nested(take(host.nested_bytes));
  if (host.has_tsc_offset && tape.succeeded(questions.tsc_offset)) {
    saved->set_tsc_offset(tape.as<int64_t>(questions.tsc_offset_room));
  }
  if (questions.ssp_room != 0 && tape.succeeded(questions.ssp)) {
    saved->set_shadow_stack_pointer(tape.as<uint64_t>(questions.ssp_room));
  }
  return true;
}

namespace {

// KVM reads as much as the largest guest's state takes, whatever the header says that there is.
std::string padded_xsave(std::string xsave) {
  if (!xsave.empty()) xsave.resize(std::max(xsave.size(), most_xsave_bytes()));
  return xsave;
}

bool in_system_management_mode(const std::string& events) {
  kvm_vcpu_events state{};
  std::memcpy(&state, events.data(), std::min(sizeof state, events.size()));
  return (state.flags & KVM_VCPUEVENT_VALID_SMM) != 0 && state.smi.smm != 0;
}

void put_msrs(const pb::KvmVcpuState& state, const std::string& cpuid, const TscPlan& tsc, int fd, TapeDraft& tape) {
  const std::string& entries = state.msrs();
  std::string list(sizeof(kvm_msrs), '\0');
  uint32_t count = 0;
  for (size_t at = 0; at + sizeof(kvm_msr_entry) <= entries.size(); at += sizeof(kvm_msr_entry)) {
    kvm_msr_entry entry;
    std::memcpy(&entry, entries.data() + at, sizeof entry);
    entry.reserved = !guest_may_see(cpuid, entry.index) ? uint32_t{kMsrHidden} : is_fresh(state, entry) ? uint32_t{kMsrFresh} : 0;
    if (entry.index == kMsrTsc) {
      if (tsc.by_offset) continue;
      entry.data = tsc.goes_on_at;
    }
    list += text_of(entry);
    ++count;
  }
  std::memcpy(list.data(), &count, sizeof count);
  tape.call(kOpSetMsrs, {number(fd), tape.data(list.data(), list.size())}, true,
            fmt::format("KVM_SET_MSRS of descriptor {}", fd));
}

}  // namespace

void plan_vcpu_state(const pb::KvmVcpuState& state, const std::string& cpuid, const TscPlan& tsc, const TapeWord& offset, int fd,
                     TapeDraft& tape) {
  // Before the TSC is set. Another host's guests run at another frequency, unless they are told.
  if (tsc.frequency != 0) {
    tape.call(SYS_ioctl, {number(fd), KVM_SET_TSC_KHZ, tsc.frequency}, false,
              fmt::format("KVM_SET_TSC_KHZ of descriptor {}", fd));
  }
  // The APIC's base and the paging mode say what the rest means.
  put(KVM_SET_SREGS2, "KVM_SET_SREGS2", state.sregs2(), fd, tape);
  put(KVM_SET_SREGS, "KVM_SET_SREGS", state.sregs(), fd, tape);
  // XCR0 allows the components that XSAVE brings.
  put(KVM_SET_XCRS, "KVM_SET_XCRS", state.xcrs(), fd, tape);
  put(KVM_SET_XSAVE, "KVM_SET_XSAVE", padded_xsave(state.xsave()), fd, tape);
  // The timer's mode before its deadline, which is an MSR.
  put(KVM_SET_LAPIC, "KVM_SET_LAPIC", state.lapic(), fd, tape);
  if (tsc.by_offset) {
    tape.call(SYS_ioctl, {number(fd), KVM_SET_DEVICE_ATTR, tsc_offset_attribute(offset, tape)}, true,
              fmt::format("set the TSC's offset of descriptor {}", fd));
  }
  put_msrs(state, cpuid, tsc, fd, tape);
  // CR4 and the MSRs that enable shadow stacks come before.
  if (state.has_shadow_stack_pointer()) {
    const TapeWord pointer = tape.data_of(state.shadow_stack_pointer());
    tape.call(SYS_ioctl, {number(fd), KVM_SET_ONE_REG, shadow_stack_register(pointer, tape)}, state.shadow_stack_pointer() != 0,
              fmt::format("set the shadow stack pointer of descriptor {}", fd));
  }
  // Nested state comes before events, as QEMU has it. But KVM takes what it says of system management mode only from a vCPU that
  // is in it (vmx_set_nested_state), which the events say; and a vCPU that enters or leaves it later loses its nested state
  // (kvm_vcpu_ioctl_x86_set_vcpu_events). Set twice they do no harm.
  if (!state.nested().empty() && in_system_management_mode(state.events())) {
    put(KVM_SET_VCPU_EVENTS, "KVM_SET_VCPU_EVENTS", state.events(), fd, tape);
  }
  put(KVM_SET_NESTED_STATE, "KVM_SET_NESTED_STATE", state.nested(), fd, tape);
  // Registers drop pending exceptions, so events come after them.
  put(KVM_SET_REGS, "KVM_SET_REGS", state.regs(), fd, tape);
  put(KVM_SET_VCPU_EVENTS, "KVM_SET_VCPU_EVENTS", state.events(), fd, tape);
  put(KVM_SET_DEBUGREGS, "KVM_SET_DEBUGREGS", state.debug_regs(), fd, tape);
  put(KVM_SET_MP_STATE, "KVM_SET_MP_STATE", state.mp_state(), fd, tape);
}

}  // namespace vmckpt
