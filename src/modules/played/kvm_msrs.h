// What kOpSetMsrs is told beside the values.
#pragma once

#include <stdint.h>

namespace vmckpt {

// When an MSR that KVM does not take is no loss; stands in kvm_msr_entry.reserved.
enum MsrLoss : uint32_t {
  kMsrFresh = 1,   // where it cannot be read either: it had the value that a new vCPU has
  kMsrHidden = 2,  // always: the guest does not know of it
};

}  // namespace vmckpt
