#include "modules/played/operations.h"

#include "player/code.h"

namespace vmckpt {

// Compared one after another: a table of functions would have to be relocated wherever the code is copied to.
PLAYER_CODE int64_t play_for_module(TapeCall* call) {
#define VMCKPT_PLAY(number_, function) \
  if (call->number == number_) return function(call);
  VMCKPT_PLAYED_OPERATIONS(VMCKPT_PLAY)
#undef VMCKPT_PLAY
  return -kErrorNoCall;
}

}  // namespace vmckpt
