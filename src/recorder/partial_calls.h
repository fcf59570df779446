// Calls that a freeze has cut short, and the code that goes on with them.
//
// A call that has moved part of its data when its thread is stopped (write(2) to a pipe that is full, recv(2) with MSG_WAITALL)
// comes back with that part: for the kernel a stop is a signal. A program sees a short count that no handler of its own is the
// reason of. So the supervisor notes here what has been done, and lets the thread make the call for the rest at `begin`, from
// where it comes out behind its own call with the whole count. It is data and code of the target, so it holds wherever the thread
// goes on: after a checkpoint, after one that was refused, after a restart, and when the supervisor is killed.
#pragma once

#include <stdint.h>

namespace vmckpt {

constexpr uint32_t kPartialCalls = 64;         // at the same time, of all threads
constexpr uint32_t kPartialCallSegments = 16;  // struct iovec of the rest of one call

struct PartialCall {
  uint64_t done;                   // bytes that the call has moved up to now
  uint64_t rip, rbx, rsi, rdx, r10;  // as the program has them behind its call
  uint64_t in_use;                 // set by the supervisor, cleared by the thread when it leaves
  uint64_t header[7];              // struct msghdr of the rest
  uint64_t segments[kPartialCallSegments][2];
};

struct PartialCallTable {
  uint64_t begin;    // rbx: a PartialCall, other registers: the call for the rest
  uint64_t returns;  // behind its system call instruction
  PartialCall calls[kPartialCalls];
};

}  // namespace vmckpt
