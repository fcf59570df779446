// What kOpMakeAioRing is told, and a ring's layout.
#pragma once

#include <stdint.h>

#include <linux/aio_abi.h>

namespace vmckpt {

// The beginning of a ring (struct aio_ring, fs/aio.c); events follow. `head` and `tail` count them.
struct AioRingHeader {
  uint32_t id, slots, head, tail, magic, compatible, incompatible, header_bytes;
};
constexpr uint64_t kAioRingHeaderBytes = sizeof(AioRingHeader), kAioEventBytes = sizeof(io_event);
static_assert(kAioRingHeaderBytes == 32 && kAioEventBytes == 32);

// A context of Linux AIO, to be made again.
constexpr uint32_t kAioBatch = 16;
struct AioRingOrder {
  uint64_t address;  // of the ring, which is also the context's name
  uint64_t bytes;
  uint32_t wanted;   // what io_setup must be asked for, to get `slots`
  uint32_t slots;
  uint32_t head;     // the next event that the program will take
  uint32_t pending;  // events from there on, which it has not taken yet
  uint64_t events;   // address of these
  uint64_t context;  // room for io_setup's answer
  iocb request;      // one that ends at once
  uint64_t requests[kAioBatch];  // addresses, all of that one
  io_event scratch[kAioBatch];   // room for as many events
};

}  // namespace vmckpt
