#include "modules/played/operations.h"
#include "player/code.h"

namespace vmckpt {

PLAYER_CODE int64_t subtract_tsc(TapeCall* call) {
  uint32_t low, high;
  asm volatile("lfence\n\trdtsc" : "=a"(low), "=d"(high) : : "memory");
  const uint64_t now = static_cast<uint64_t>(high) << 32 | low;
  auto* words = reinterpret_cast<uint64_t*>(call->args[0]);
  for (uint64_t i = 0; i < call->args[1]; ++i) words[i] -= now;
  return 0;
}

}  // namespace vmckpt
