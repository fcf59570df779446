#include "modules/played/operations.h"
#include "player/code.h"

namespace vmckpt {

// A fault that the kernel answers with a larger state for this thread (Documentation/arch/x86/xstate.rst).
PLAYER_CODE int64_t use_tiles(TapeCall* call) {
  asm volatile(
      "ldtilecfg (%0)\n\t"
      "tilezero %%tmm0\n\t"
      "tilerelease"
      :
      : "r"(call->args[0])
      : "memory");
  return 0;
}

}  // namespace vmckpt
