// Every ioctl of KVM that a VMM may use on x86, one row each: what the recorder does with it. What can be read back at the
// checkpoint is not written down; what cannot is replayed at restart in its old order. An ioctl that has no row makes the next
// checkpoint refuse with its number. Source: Documentation/virt/kvm/api.rst, include/uapi/linux/kvm.h.
#pragma once

#include <stdint.h>

#include "core/kvm_api.h"

namespace vmckpt {

enum class KvmAction : uint8_t {
  kIgnore,      // reads, or changes what a checkpoint reads back, or is over when it returns
  kRecord,      // written down; `payload` and `key` say how
  kUnregister,  // takes back what another request registered
  kCreate,      // makes a descriptor
  kRun,
  kRefuse,      // state that no module saves: the next checkpoint refuses
};

// What a record carries.
enum class KvmPayload : uint8_t {
  kValue,    // the argument itself
  kFixed,    // the structure whose size the request tells
  kCpuid,    // kvm_cpuid2
  kRouting,  // kvm_irq_routing
  kSigmask,  // kvm_signal_mask
  kPmu,      // kvm_pmu_event_filter
  kMsrFilter,  // kvm_msr_filter, and behind it the bitmaps that its ranges point to, one after another
};

// Which earlier record a new one takes the place of.
enum class KvmKey : uint8_t {
  kObject,      // the same request on the same object
  kArgument,    // ... with the same argument
  kSlot,        // ... with the same memory slot; a slot of no bytes is gone
  kCapability,  // ... of the same capability
  kIrqfd,       // ... of the same eventfd and interrupt line; takes itself back by a flag
  kIoeventfd,   // ... of the same address, length, value and eventfd; takes itself back by a flag
  kZone,        // ... of the same coalesced I/O range
};

struct KvmCall {
  uint32_t request;
  const char* name;
  KvmAction action;
  KvmPayload payload;
  KvmKey key;
};

#define VMCKPT_IGNORE(name) {static_cast<uint32_t>(name), #name, KvmAction::kIgnore, KvmPayload::kValue, KvmKey::kObject}
#define VMCKPT_RECORD(name, payload, key) \
  {static_cast<uint32_t>(name), #name, KvmAction::kRecord, KvmPayload::payload, KvmKey::key}
#define VMCKPT_REFUSE(name) {static_cast<uint32_t>(name), #name, KvmAction::kRefuse, KvmPayload::kValue, KvmKey::kObject}
#define VMCKPT_ROW(name, action, payload, key) \
  {static_cast<uint32_t>(name), #name, KvmAction::action, KvmPayload::payload, KvmKey::key}

// Newer than Debian 12's header.
#ifndef KVM_SET_USER_MEMORY_REGION2
struct kvm_userspace_memory_region2 {
  uint32_t slot, flags;
  uint64_t guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset;
  uint32_t guest_memfd, pad1;
  uint64_t pad2[14];
};
#define KVM_SET_USER_MEMORY_REGION2 _IOW(KVMIO, 0x49, struct kvm_userspace_memory_region2)
#define KVM_MEM_GUEST_MEMFD (1UL << 2)
#endif
#ifndef KVM_SET_MEMORY_ATTRIBUTES
struct kvm_memory_attributes {
  uint64_t address, size, attributes, flags;
};
#define KVM_SET_MEMORY_ATTRIBUTES _IOW(KVMIO, 0xd2, struct kvm_memory_attributes)
#endif
#ifndef KVM_CREATE_GUEST_MEMFD
struct kvm_create_guest_memfd {
  uint64_t size, flags, reserved[6];
};
#define KVM_CREATE_GUEST_MEMFD _IOWR(KVMIO, 0xd4, struct kvm_create_guest_memfd)
#endif

inline constexpr KvmCall kKvmCalls[] = {
    VMCKPT_ROW(KVM_RUN, kRun, kValue, kObject),
    // what makes descriptors
    VMCKPT_ROW(KVM_CREATE_VM, kCreate, kValue, kObject),
    VMCKPT_ROW(KVM_CREATE_VCPU, kCreate, kValue, kObject),
    VMCKPT_ROW(KVM_GET_STATS_FD, kCreate, kValue, kObject),
    VMCKPT_REFUSE(KVM_CREATE_DEVICE),  // but for its test (recorder)
    VMCKPT_REFUSE(KVM_CREATE_GUEST_MEMFD),
    // configuration of a VM
    VMCKPT_RECORD(KVM_SET_USER_MEMORY_REGION, kFixed, kSlot),
    VMCKPT_RECORD(KVM_SET_USER_MEMORY_REGION2, kFixed, kSlot),
    VMCKPT_RECORD(KVM_ENABLE_CAP, kFixed, kCapability),  // of vCPUs too
    VMCKPT_RECORD(KVM_SET_TSS_ADDR, kValue, kObject),
    VMCKPT_RECORD(KVM_SET_IDENTITY_MAP_ADDR, kFixed, kObject),
    VMCKPT_RECORD(KVM_CREATE_IRQCHIP, kValue, kObject),
    VMCKPT_RECORD(KVM_CREATE_PIT, kValue, kObject),
    VMCKPT_RECORD(KVM_CREATE_PIT2, kFixed, kObject),
    VMCKPT_RECORD(KVM_REINJECT_CONTROL, kFixed, kObject),
    VMCKPT_RECORD(KVM_SET_BOOT_CPU_ID, kValue, kObject),
    VMCKPT_RECORD(KVM_SET_NR_MMU_PAGES, kValue, kObject),
    VMCKPT_RECORD(KVM_SET_GSI_ROUTING, kRouting, kObject),
    VMCKPT_RECORD(KVM_IRQFD, kFixed, kIrqfd),
    VMCKPT_RECORD(KVM_IOEVENTFD, kFixed, kIoeventfd),
    VMCKPT_RECORD(KVM_REGISTER_COALESCED_MMIO, kFixed, kZone),
    VMCKPT_ROW(KVM_UNREGISTER_COALESCED_MMIO, kUnregister, kFixed, kZone),
    VMCKPT_RECORD(KVM_SET_PMU_EVENT_FILTER, kPmu, kObject),
    VMCKPT_RECORD(KVM_X86_SET_MSR_FILTER, kMsrFilter, kObject),
    VMCKPT_REFUSE(KVM_XEN_HVM_CONFIG),
    VMCKPT_REFUSE(KVM_XEN_HVM_SET_ATTR),
    VMCKPT_REFUSE(KVM_HYPERV_EVENTFD),
    VMCKPT_REFUSE(KVM_MEMORY_ENCRYPT_OP),
    VMCKPT_REFUSE(KVM_SET_MEMORY_ATTRIBUTES),
    VMCKPT_REFUSE(KVM_ASSIGN_PCI_DEVICE),
    // configuration of a vCPU
    VMCKPT_RECORD(KVM_SET_CPUID2, kCpuid, kObject),
    VMCKPT_REFUSE(KVM_SET_CPUID),
    VMCKPT_RECORD(KVM_SET_SIGNAL_MASK, kSigmask, kObject),
    VMCKPT_RECORD(KVM_X86_SETUP_MCE, kFixed, kObject),
    VMCKPT_RECORD(KVM_TPR_ACCESS_REPORTING, kFixed, kObject),
    VMCKPT_RECORD(KVM_SET_VAPIC_ADDR, kFixed, kObject),
    VMCKPT_RECORD(KVM_SET_TSC_KHZ, kValue, kObject),  // of VMs too
    VMCKPT_RECORD(KVM_SET_GUEST_DEBUG, kFixed, kObject),
    VMCKPT_REFUSE(KVM_XEN_VCPU_SET_ATTR),
    // state that a checkpoint reads back
    VMCKPT_IGNORE(KVM_GET_REGS), VMCKPT_IGNORE(KVM_SET_REGS),
    VMCKPT_IGNORE(KVM_GET_SREGS), VMCKPT_IGNORE(KVM_SET_SREGS),
    VMCKPT_IGNORE(KVM_GET_SREGS2), VMCKPT_IGNORE(KVM_SET_SREGS2),
    VMCKPT_IGNORE(KVM_GET_FPU), VMCKPT_IGNORE(KVM_SET_FPU),
    VMCKPT_IGNORE(KVM_GET_XSAVE), VMCKPT_IGNORE(KVM_GET_XSAVE2), VMCKPT_IGNORE(KVM_SET_XSAVE),
    VMCKPT_IGNORE(KVM_GET_XCRS), VMCKPT_IGNORE(KVM_SET_XCRS),
    VMCKPT_IGNORE(KVM_GET_LAPIC), VMCKPT_IGNORE(KVM_SET_LAPIC),
    VMCKPT_IGNORE(KVM_GET_MSRS), VMCKPT_IGNORE(KVM_SET_MSRS),
    VMCKPT_IGNORE(KVM_GET_VCPU_EVENTS), VMCKPT_IGNORE(KVM_SET_VCPU_EVENTS),
    VMCKPT_IGNORE(KVM_GET_DEBUGREGS), VMCKPT_IGNORE(KVM_SET_DEBUGREGS),
    VMCKPT_IGNORE(KVM_GET_MP_STATE), VMCKPT_IGNORE(KVM_SET_MP_STATE),
    VMCKPT_IGNORE(KVM_GET_NESTED_STATE), VMCKPT_IGNORE(KVM_SET_NESTED_STATE),
    VMCKPT_IGNORE(KVM_GET_IRQCHIP), VMCKPT_IGNORE(KVM_SET_IRQCHIP),
    VMCKPT_IGNORE(KVM_GET_PIT), VMCKPT_IGNORE(KVM_SET_PIT),
    VMCKPT_IGNORE(KVM_GET_PIT2), VMCKPT_IGNORE(KVM_SET_PIT2),
    VMCKPT_IGNORE(KVM_GET_CLOCK), VMCKPT_IGNORE(KVM_SET_CLOCK),
    VMCKPT_IGNORE(KVM_GET_ONE_REG), VMCKPT_IGNORE(KVM_SET_ONE_REG), VMCKPT_IGNORE(KVM_GET_REG_LIST),
    // what only reads
    VMCKPT_IGNORE(KVM_GET_API_VERSION), VMCKPT_IGNORE(KVM_CHECK_EXTENSION), VMCKPT_IGNORE(KVM_GET_VCPU_MMAP_SIZE),
    VMCKPT_IGNORE(KVM_GET_SUPPORTED_CPUID), VMCKPT_IGNORE(KVM_GET_EMULATED_CPUID), VMCKPT_IGNORE(KVM_GET_CPUID2),
    VMCKPT_IGNORE(KVM_GET_SUPPORTED_HV_CPUID), VMCKPT_IGNORE(KVM_GET_MSR_INDEX_LIST),
    VMCKPT_IGNORE(KVM_GET_MSR_FEATURE_INDEX_LIST), VMCKPT_IGNORE(KVM_X86_GET_MCE_CAP_SUPPORTED),
    VMCKPT_IGNORE(KVM_GET_TSC_KHZ), VMCKPT_IGNORE(KVM_TRANSLATE), VMCKPT_IGNORE(KVM_GET_NR_MMU_PAGES),
    VMCKPT_IGNORE(KVM_HAS_DEVICE_ATTR), VMCKPT_IGNORE(KVM_GET_DEVICE_ATTR), VMCKPT_IGNORE(KVM_GET_DIRTY_LOG),
    VMCKPT_IGNORE(KVM_CLEAR_DIRTY_LOG),
    // what acts once, on state that is read back
    VMCKPT_IGNORE(KVM_IRQ_LINE), VMCKPT_IGNORE(KVM_IRQ_LINE_STATUS), VMCKPT_IGNORE(KVM_SIGNAL_MSI),
    VMCKPT_IGNORE(KVM_INTERRUPT), VMCKPT_IGNORE(KVM_NMI), VMCKPT_IGNORE(KVM_SMI), VMCKPT_IGNORE(KVM_X86_SET_MCE),
    VMCKPT_IGNORE(KVM_KVMCLOCK_CTRL),
    VMCKPT_IGNORE(KVM_SET_DEVICE_ATTR),  // of vCPUs: the TSC's offset, which is read back; VMs have none on x86
};

#undef VMCKPT_IGNORE
#undef VMCKPT_RECORD
#undef VMCKPT_REFUSE
#undef VMCKPT_ROW

// Capabilities that bring state which no module saves.
inline constexpr struct {
  uint32_t number;
  const char* name;
} kRefusedCapabilities[] = {
    {KVM_CAP_DIRTY_LOG_RING, "KVM_CAP_DIRTY_LOG_RING"},
    {223, "KVM_CAP_DIRTY_LOG_RING_ACQ_REL"},
    {KVM_CAP_XEN_HVM, "KVM_CAP_XEN_HVM"},
    {KVM_CAP_HYPERV_ENLIGHTENED_VMCS, "KVM_CAP_HYPERV_ENLIGHTENED_VMCS"},
    {KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, "KVM_CAP_VM_COPY_ENC_CONTEXT_FROM"},
    {KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, "KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM"},
};

// Each call of these adds to those before (arch/x86/kvm/x86.c, kvm_vm_ioctl_enable_cap); of others the last one counts.
constexpr bool adds_to_earlier_calls(uint32_t capability) {
  return capability == KVM_CAP_X86_DISABLE_EXITS || capability == KVM_CAP_DISABLE_QUIRKS || capability == KVM_CAP_DISABLE_QUIRKS2;
}
constexpr bool replaces(const kvm_enable_cap& earlier, const kvm_enable_cap& now) {
  return earlier.cap == now.cap && (!adds_to_earlier_calls(now.cap) || earlier.args[0] == now.args[0]);
}

constexpr uint32_t msr_bitmap_bytes(const kvm_msr_filter_range& range) { return range.nmsrs / 8 + (range.nmsrs % 8 != 0); }

constexpr const KvmCall* find_kvm_call(uint32_t request) {
  for (const KvmCall& call : kKvmCalls) {
    if (call.request == request) return &call;
  }
  return nullptr;
}

}  // namespace vmckpt
