#include "modules/played/aio.h"

#include "modules/played/operations.h"
#include "player/code.h"

namespace vmckpt {
namespace {

PLAYER_CODE int64_t submit_requests(AioRingOrder* order, uint32_t count, bool take) {
  while (count > 0) {
    const uint64_t batch = count < kAioBatch ? count : kAioBatch;
    const int64_t submitted = system_call(SYS_io_submit, order->address, batch, reinterpret_cast<uint64_t>(order->requests));
    if (submitted <= 0) return submitted == 0 ? -kErrorIo : submitted;
    const auto done = static_cast<uint64_t>(submitted);
    if (take) {
      const auto room = reinterpret_cast<uint64_t>(order->scratch);
      const int64_t taken = system_call(SYS_io_getevents, order->address, done, done, room, 0);
      if (taken != submitted) return taken < 0 ? taken : -kErrorIo;
    }
    count -= static_cast<uint32_t>(done);
  }
  return 0;
}

}  // namespace

// The kernel counts a ring's positions and slots by itself, so it is brought to where it was by requests that end at once: as
// many as the program had taken events for (modulo the ring), and as many as wait to be taken. Then these get their old
// content.
PLAYER_CODE int64_t make_aio_ring(TapeCall* call) {
  constexpr uint64_t kMayMoveToFixed = 3;  // MREMAP_MAYMOVE | MREMAP_FIXED
  auto* order = reinterpret_cast<AioRingOrder*>(call->args[0]);
  order->context = 0;
  int64_t result = system_call(SYS_io_setup, order->wanted, reinterpret_cast<uint64_t>(&order->context));
  if (is_error(result)) return result;
  if (reinterpret_cast<volatile AioRingHeader*>(order->context)->slots != order->slots) return -kErrorInvalid;
  result = system_call(SYS_mremap, order->context, order->bytes, order->bytes, kMayMoveToFixed, order->address);
  if (is_error(result)) return result;
  result = submit_requests(order, order->head, true);
  if (result != 0) return result;
  result = submit_requests(order, order->pending, false);
  if (result != 0) return result;
  constexpr uint32_t kEventWords = kAioEventBytes / sizeof(uint64_t);
  auto* ring = reinterpret_cast<volatile uint64_t*>(order->address + kAioRingHeaderBytes);
  auto* event = reinterpret_cast<volatile uint64_t*>(order->events);
  for (uint32_t i = 0; i < order->pending; ++i) {
    const uint64_t slot = (uint64_t{order->head} + i) % order->slots;
    for (uint32_t word = 0; word < kEventWords; ++word) ring[slot * kEventWords + word] = event[i * kEventWords + word];
  }
  auto* header = reinterpret_cast<volatile AioRingHeader*>(order->address);
  const uint32_t tail = static_cast<uint32_t>((uint64_t{order->head} + order->pending) % order->slots);
  return header->head == order->head && header->tail == tail ? 0 : -kErrorIo;
}

}  // namespace vmckpt
