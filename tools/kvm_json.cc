#include "kvm_json.h"

#include <cstring>

#include "core/kvm_api.h"
#include "recorder/kvm_calls.h"

namespace vmckpt {
namespace {

std::string hex(uint64_t value) { return fmt::format("{:#x}", value); }

// The bytes of a saved structure; zeros where the image has fewer.
template <class T>
T read_as(const std::string& bytes, size_t offset = 0) {
  T value{};
  if (offset < bytes.size()) std::memcpy(&value, bytes.data() + offset, std::min(sizeof value, bytes.size() - offset));
  return value;
}

Json slot_json(const pb::KvmRecord& record) {
  const auto slot = read_as<kvm_userspace_memory_region>(record.payload());
  return {{"slot", slot.slot & 0xffff}, {"address_space", slot.slot >> 16}, {"guest_phys_addr", hex(slot.guest_phys_addr)},
          {"memory_size", slot.memory_size}, {"userspace_addr", hex(slot.userspace_addr)},
          {"read_only", (slot.flags & KVM_MEM_READONLY) != 0}, {"dirty_log", (slot.flags & KVM_MEM_LOG_DIRTY_PAGES) != 0}};
}

Json route_json(const kvm_irq_routing_entry& route) {
  Json json = {{"gsi", route.gsi}};
  if (route.type == KVM_IRQ_ROUTING_IRQCHIP) {
    static constexpr const char* kChips[] = {"PIC master", "PIC slave", "IOAPIC"};
    json["to"] = route.u.irqchip.irqchip < std::size(kChips) ? kChips[route.u.irqchip.irqchip] : "?";
    json["pin"] = route.u.irqchip.pin;
  } else if (route.type == KVM_IRQ_ROUTING_MSI) {
    json["to"] = "MSI";
    json["address"] = hex(uint64_t{route.u.msi.address_hi} << 32 | route.u.msi.address_lo);
    json["data"] = hex(route.u.msi.data);
  } else {
    json["to"] = fmt::format("type {}", route.type);
  }
  return json;
}

Json routes_json(const pb::KvmRecord& record) {
  Json routes = Json::array();
  const std::string& bytes = record.payload();
  for (size_t at = sizeof(kvm_irq_routing); at + sizeof(kvm_irq_routing_entry) <= bytes.size();
       at += sizeof(kvm_irq_routing_entry)) {
    routes.push_back(route_json(read_as<kvm_irq_routing_entry>(bytes, at)));
  }
  return routes;
}

Json irqfd_json(const pb::KvmRecord& record) {
  const auto irqfd = read_as<kvm_irqfd>(record.payload());
  Json json = {{"gsi", irqfd.gsi}, {"eventfd", record.events_size() > 0 ? record.events(0) : -1}};
  if (record.events_size() > 1 && record.events(1) >= 0) json["resample"] = record.events(1);
  return json;
}

Json ioeventfd_json(const pb::KvmRecord& record) {
  const auto io = read_as<kvm_ioeventfd>(record.payload());
  Json json = {{"address", hex(io.addr)}, {"bytes", io.len}, {"port", (io.flags & KVM_IOEVENTFD_FLAG_PIO) != 0},
               {"eventfd", record.events_size() > 0 ? record.events(0) : -1}};
  if (io.flags & KVM_IOEVENTFD_FLAG_DATAMATCH) json["value"] = hex(io.datamatch);
  return json;
}

Json zone_json(const pb::KvmRecord& record) {
  const auto zone = read_as<kvm_coalesced_mmio_zone>(record.payload());
  return {{"address", hex(zone.addr)}, {"bytes", zone.size}, {"port", zone.pio != 0}};
}

Json capability_json(const pb::KvmRecord& record) {
  const auto cap = read_as<kvm_enable_cap>(record.payload());
  return {{"capability", cap.cap}, {"argument", hex(cap.args[0])}};
}

Json registers_json(const kvm_regs& regs) {
  return {{"rax", hex(regs.rax)}, {"rbx", hex(regs.rbx)}, {"rcx", hex(regs.rcx)}, {"rdx", hex(regs.rdx)},
          {"rsi", hex(regs.rsi)}, {"rdi", hex(regs.rdi)}, {"rsp", hex(regs.rsp)}, {"rbp", hex(regs.rbp)},
          {"r8", hex(regs.r8)},   {"r9", hex(regs.r9)},   {"r10", hex(regs.r10)}, {"r11", hex(regs.r11)},
          {"r12", hex(regs.r12)}, {"r13", hex(regs.r13)}, {"r14", hex(regs.r14)}, {"r15", hex(regs.r15)},
          {"rip", hex(regs.rip)}, {"rflags", hex(regs.rflags)}};
}

Json segment_json(const kvm_segment& segment) {
  return {{"selector", hex(segment.selector)}, {"base", hex(segment.base)}, {"limit", hex(segment.limit)}, {"dpl", segment.dpl}};
}

// kvm_sregs2 begins as kvm_sregs does, up to and with apic_base.
Json special_registers_json(const kvm_sregs& sregs) {
  return {{"cr0", hex(sregs.cr0)},   {"cr2", hex(sregs.cr2)},   {"cr3", hex(sregs.cr3)},
          {"cr4", hex(sregs.cr4)},   {"cr8", hex(sregs.cr8)},   {"efer", hex(sregs.efer)},
          {"cs", segment_json(sregs.cs)}, {"ds", segment_json(sregs.ds)}, {"ss", segment_json(sregs.ss)},
          {"fs", segment_json(sregs.fs)}, {"gs", segment_json(sregs.gs)}, {"tr", segment_json(sregs.tr)},
          {"gdt", hex(sregs.gdt.base)}, {"idt", hex(sregs.idt.base)}, {"apic_base", hex(sregs.apic_base)}};
}

const char* mp_state_text(uint32_t state) {
  switch (state) {
    case KVM_MP_STATE_RUNNABLE: return "runnable";
    case KVM_MP_STATE_UNINITIALIZED: return "uninitialized (waits for INIT)";
    case KVM_MP_STATE_INIT_RECEIVED: return "waits for SIPI";
    case KVM_MP_STATE_HALTED: return "halted";
    case KVM_MP_STATE_SIPI_RECEIVED: return "SIPI received";
    default: return "?";
  }
}

Json msrs_json(const std::string& bytes) {
  Json msrs = Json::object();
  for (size_t at = 0; at + sizeof(kvm_msr_entry) <= bytes.size(); at += sizeof(kvm_msr_entry)) {
    const auto entry = read_as<kvm_msr_entry>(bytes, at);
    msrs[hex(entry.index)] = hex(entry.data);
  }
  return msrs;
}

Json vcpu_json(const pb::KvmObject& object) {
  Json json = {{"id", object.number()}};
  if (!object.has_vcpu()) {
    json["state"] = "closed by the VMM";
    return json;
  }
  const pb::KvmVcpuState& state = object.vcpu();
  json["state"] = mp_state_text(read_as<kvm_mp_state>(state.mp_state()).mp_state);
  json["registers"] = registers_json(read_as<kvm_regs>(state.regs()));
  json["special_registers"] = special_registers_json(read_as<kvm_sregs>(state.sregs2().empty() ? state.sregs() : state.sregs2()));
  const auto events = read_as<kvm_vcpu_events>(state.events());
  json["pending"] = {{"exception", events.exception.pending != 0}, {"nmi", events.nmi.pending != 0},
                     {"nmi_masked", events.nmi.masked != 0}, {"interrupt", events.interrupt.injected != 0}};
  json["msrs"] = msrs_json(state.msrs());
  json["xsave_bytes"] = state.xsave().size();
  json["local_apic"] = !state.lapic().empty();
  json["tsc_khz"] = state.tsc_khz();
  json["kvm_run"] = hex(object.run_address());
  return json;
}

Json vm_json(const pb::Kvm& kvm, const pb::KvmObject& vm) {
  Json json = {{"type", vm.number()}, {"irqchip", "none"}, {"pit", !vm.vm().pit().empty()}};
  for (const char* list :
       {"slots", "routes", "irqfds", "ioeventfds", "coalesced_zones", "capabilities", "other_calls", "vcpus"}) {
    json[list] = Json::array();
  }
  json["clock_ns"] = read_as<kvm_clock_data>(vm.vm().clock()).clock;
  for (const pb::KvmRecord& record : kvm.records()) {
    if (record.object() != vm.id()) continue;
    switch (record.request()) {
      case KVM_SET_USER_MEMORY_REGION:
      case KVM_SET_USER_MEMORY_REGION2: json["slots"].push_back(slot_json(record)); break;
      case KVM_SET_GSI_ROUTING: json["routes"] = routes_json(record); break;
      case KVM_IRQFD: json["irqfds"].push_back(irqfd_json(record)); break;
      case KVM_IOEVENTFD: json["ioeventfds"].push_back(ioeventfd_json(record)); break;
      case KVM_REGISTER_COALESCED_MMIO: json["coalesced_zones"].push_back(zone_json(record)); break;
      case KVM_CREATE_IRQCHIP: json["irqchip"] = "in-kernel"; break;
      case KVM_ENABLE_CAP:
        if (read_as<kvm_enable_cap>(record.payload()).cap == KVM_CAP_SPLIT_IRQCHIP) json["irqchip"] = "split";
        json["capabilities"].push_back(capability_json(record));
        break;
      default:
        if (const KvmCall* call = find_kvm_call(record.request())) json["other_calls"].push_back(call->name);
    }
  }
  for (const pb::KvmObject& object : kvm.objects()) {
    if (object.kind() == pb::KvmObject::VCPU && object.parent() == vm.id()) json["vcpus"].push_back(vcpu_json(object));
  }
  return json;
}

}  // namespace

Json kvm_to_json(const pb::Kvm& kvm) {
  Json vms = Json::array();
  for (const pb::KvmObject& object : kvm.objects()) {
    if (object.kind() == pb::KvmObject::VM) vms.push_back(vm_json(kvm, object));
  }
  return vms;
}

}  // namespace vmckpt
