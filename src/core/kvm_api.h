// <linux/kvm.h> with the structure sizes that the kernel has. Debian 12's header declares flexible arrays by a macro that puts an
// empty structure before them, which has no size in C but one byte in C++: ioctl numbers, which hold the size, would be wrong.
#pragma once

#include <linux/stddef.h>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpedantic"
#undef __DECLARE_FLEX_ARRAY
#define __DECLARE_FLEX_ARRAY(type, name) type name[0]
#include <linux/kvm.h>
#pragma GCC diagnostic pop

// Gone from the header of Linux 6.12 and later (with device assignment by KVM itself); kernels that have it are still in use.
#ifndef KVM_ASSIGN_PCI_DEVICE
#define KVM_ASSIGN_PCI_DEVICE _IOC(_IOC_READ, KVMIO, 0x69, 64)  // struct kvm_assigned_pci_dev
#endif

static_assert(sizeof(kvm_msr_list) == 4 && sizeof(kvm_msrs) == 8 && sizeof(kvm_cpuid2) == 8 && sizeof(kvm_irq_routing) == 8);
static_assert(sizeof(kvm_signal_mask) == 4 && sizeof(kvm_pmu_event_filter) == 32 && sizeof(kvm_nested_state) == 128);
