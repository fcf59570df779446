#include "modules/played/kvm_msrs.h"

#include "core/kvm_api.h"
#include "modules/played/operations.h"
#include "player/code.h"

namespace vmckpt {
namespace {

struct OneMsr {  // kvm_msrs
  uint32_t count;
  uint32_t reserved;
  kvm_msr_entry entry;
};

}  // namespace

// KVM stops at the first MSR that it refuses. That is no loss where the new vCPU has the value anyway: some that can be read can
// be written only with a capability or device that this VM lacks.
PLAYER_CODE int64_t set_msrs(TapeCall* call) {
  const auto* list = reinterpret_cast<const kvm_msrs*>(call->args[1]);
  for (uint32_t i = 0; i < list->nmsrs; ++i) {
    const kvm_msr_entry& wanted = list->entries[i];
    OneMsr one;
    one.count = 1;
    one.reserved = 0;
    one.entry.index = wanted.index;
    one.entry.reserved = 0;
    one.entry.data = wanted.data;
    if (system_call(SYS_ioctl, call->args[0], KVM_SET_MSRS, reinterpret_cast<uint64_t>(&one)) == 1) continue;
    one.entry.data = 0;
    const int64_t read = system_call(SYS_ioctl, call->args[0], KVM_GET_MSRS, reinterpret_cast<uint64_t>(&one));
    if (read == 1 && one.entry.data == wanted.data) continue;
    if (wanted.reserved == kMsrHidden || (wanted.reserved == kMsrFresh && read != 1)) continue;
    call->args[5] = wanted.index;
    return -kErrorInvalid;
  }
  return 0;
}

}  // namespace vmckpt
