// Linux AIO. Kernel object: struct kioctx (fs/aio.c), a context of a process's memory, with a ring of ended requests mapped into
// it; the ring's address is the context's name. Made by io_setup(2), used by io_submit(2), io_getevents(2), io_pgetevents(2) and
// by reading the ring.
//
// Saved: each ring's address, slots and position, and the events in it that the program has not taken. Requests in flight cannot
// be saved: the kernel reads and writes the program's memory for them. So when all threads have stopped, the checkpoint waits
// until every request has ended, and is refused when one does not (IOCB_CMD_POLL may wait for ever, a disk may hang).
//
// Whether one is in flight: the kernel moves the ring's tail by one for each request that ends, and lets no more requests be in
// flight or wait to be taken than the ring has slots, less one. So with the number of requests submitted since io_setup, which
// the recorder counts,
//
//     in flight = (submitted - tail) modulo slots
//
// exactly. The count is exact since launch's filter lets no other io_submit through than the recorder's
// (recorder/aio_recorder.cc). Without that filter (--allow-io-uring) nobody knows, and the checkpoint is refused.
//
// Restored: by the player (kOpMakeAioRing), when the target's memory is mapped: io_setup for a ring of the same size, mremap to
// its old address, whereby the kernel renames the context (aio_ring_mremap, Linux 3.19), then requests that end at once until the
// kernel's own position and count of free slots are what they were. eventfds that requests named need nothing: no request holds
// one any more.
#pragma once

#include <string>
#include <vector>

#include "core/result.h"
#include "image/memory.pb.h"
#include "modules/aio.pb.h"
#include "recorder/ledger.h"
#include "tracer/stopped_world.h"
#include "tracer/tape_draft.h"

namespace vmckpt {

// Until no request is in flight. The target is stopped meanwhile.
Result<void> wait_for_aio(const StoppedWorld& world, const Ledger& ledger, const Waiting& waiting);

// Whether each ring of an image fits to its mapping and to itself.
Result<void> check_aio_rings(const pb::AddressSpace& space);

// For the rings among the mappings that were saved. `counted`: launch's filter is in force.
Result<void> save_aio(const StoppedWorld& world, const Ledger& ledger, bool counted, pb::AddressSpace* saved);

}  // namespace vmckpt
