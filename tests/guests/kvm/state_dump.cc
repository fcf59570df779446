// SPDX-License-Identifier: Apache-2.0

#include "state_dump.h"

namespace tiny {
namespace {

std::string hex_of(const void* data, size_t bytes) {
  static const char digits[] = "0123456789abcdef";
  std::string text;
  for (size_t n = 0; n < bytes; n++) {
    uint8_t byte = static_cast<const uint8_t*>(data)[n];
    text += {digits[byte >> 4], digits[byte & 15]};
  }
  return text;
}

class Object {
 public:
  void add_raw(const std::string& name, const std::string& value) {
    text_ += (text_.empty() ? "\"" : ",\n \"") + name + "\": " + value;
  }
  void add(const std::string& name, const void* data, size_t bytes) {
    add_raw(name, "\"" + hex_of(data, bytes) + "\"");
  }
  // The answer of a KVM_GET_ ioctl that fills a `T`.
  template <typename T>
  void add_answer(const std::string& name, int fd, unsigned long request, T value = {}) {
    if (ioctl(fd, request, &value) >= 0) add(name, &value, sizeof value);
  }
  std::string text() const { return "{" + text_ + "}"; }

 private:
  std::string text_;
};

std::vector<uint32_t> msr_indices(int kvm) {
  kvm_msr_list probe = {};
  ioctl(kvm, KVM_GET_MSR_INDEX_LIST, &probe);  // E2BIG, and how many there are
  std::vector<uint32_t> list(probe.nmsrs + 1);
  list[0] = probe.nmsrs;
  MUST_IOCTL(kvm, KVM_GET_MSR_INDEX_LIST, reinterpret_cast<kvm_msr_list*>(list.data()));
  return {list.begin() + 1, list.end()};
}

std::string dump_msrs(const Machine& machine, int vcpu) {
  Object msrs;
  for (uint32_t index : msr_indices(machine.kvm())) {
    struct {
      kvm_msrs head;
      kvm_msr_entry entry;
    } one{};
    one.head.nmsrs = 1;
    one.entry.index = index;
    if (ioctl(vcpu, KVM_GET_MSRS, &one) != 1) continue;
    char name[16];
    std::snprintf(name, sizeof name, "%x", index);
    msrs.add(name, &one.entry.data, sizeof one.entry.data);
  }
  return msrs.text();
}

std::string dump_vcpu(const Machine& machine, int vcpu) {
  Object state;
  state.add_answer<kvm_regs>("regs", vcpu, KVM_GET_REGS);
  state.add_answer<kvm_sregs>("sregs", vcpu, KVM_GET_SREGS);
  state.add_answer<kvm_sregs2>("sregs2", vcpu, KVM_GET_SREGS2);
  state.add_answer<kvm_fpu>("fpu", vcpu, KVM_GET_FPU);
  int xsave_bytes = ioctl(machine.vm(), KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2);
  if (xsave_bytes > 0) {
    std::vector<uint64_t> xsave(static_cast<size_t>(xsave_bytes) / 8);
    if (ioctl(vcpu, KVM_GET_XSAVE2, xsave.data()) >= 0) state.add("xsave2", xsave.data(), xsave.size() * 8);
  } else {
    state.add_answer<kvm_xsave>("xsave", vcpu, KVM_GET_XSAVE);
  }
  state.add_answer<kvm_xcrs>("xcrs", vcpu, KVM_GET_XCRS);
  state.add_answer<kvm_debugregs>("debugregs", vcpu, KVM_GET_DEBUGREGS);
  state.add_answer<kvm_lapic_state>("lapic", vcpu, KVM_GET_LAPIC);
  state.add_answer<kvm_mp_state>("mp_state", vcpu, KVM_GET_MP_STATE);
  state.add_answer<kvm_vcpu_events>("vcpu_events", vcpu, KVM_GET_VCPU_EVENTS);
  state.add_raw("msrs", dump_msrs(machine, vcpu));
  return state.text();
}

}  // namespace

std::string dump_state(const Machine& machine, const std::vector<int>& vcpus) {
  Object state;
  for (uint32_t chip : {KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC}) {
    kvm_irqchip argument = {};
    argument.chip_id = chip;
    state.add_answer("irqchip" + std::to_string(chip), machine.vm(), KVM_GET_IRQCHIP, argument);
  }
  state.add_answer<kvm_pit_state2>("pit2", machine.vm(), KVM_GET_PIT2);
  state.add_answer<kvm_clock_data>("clock", machine.vm(), KVM_GET_CLOCK);
  std::string list;
  for (int vcpu : vcpus) list += (list.empty() ? "" : ", ") + dump_vcpu(machine, vcpu);
  state.add_raw("vcpus", "[" + list + "]");
  return state.text() + "\n";
}

}  // namespace tiny
