// The operations that modules have the player play, where system calls alone do not do. Each is a function under the rules of
// player/code.h, in a file of this folder that is named for the module.
#pragma once

#include "player/tape.h"

// OPERATION(number, function): the numbers are counted up from kOpFirstOfModules, and mean something in one run only.
#define VMCKPT_PLAYED_OPERATIONS(OPERATION)                                                            \
  /* KVM_SET_MSRS {fd, kvm_msrs*, 0, 0, 0, index of the MSR that was refused} */                       \
  OPERATION(kOpSetMsrs, set_msrs)                                                                      \
  /* takes the processor's time stamp counter, read once, from {array of 8-byte words, how many} */    \
  OPERATION(kOpSubtractTsc, subtract_tsc)                                                              \
  /* {AioRingOrder*}: a context of Linux AIO with its ring where it was */                             \
  OPERATION(kOpMakeAioRing, make_aio_ring)                                                             \
  /* touch AMX: the kernel makes room for the thread's tile registers; {tile configuration, 64 bytes} */ \
  OPERATION(kOpUseTiles, use_tiles)

namespace vmckpt {

enum PlayedOperation : int64_t {
  kBeforePlayedOperations = kOpFirstOfModules - 1,
#define VMCKPT_NUMBER(number, function) number,
  VMCKPT_PLAYED_OPERATIONS(VMCKPT_NUMBER)
#undef VMCKPT_NUMBER
};

#define VMCKPT_FUNCTION(number, function) __attribute__((visibility("hidden"))) int64_t function(TapeCall* call);
VMCKPT_PLAYED_OPERATIONS(VMCKPT_FUNCTION)
#undef VMCKPT_FUNCTION

}  // namespace vmckpt
