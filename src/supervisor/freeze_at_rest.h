// The freeze of a checkpoint: every thread stopped at a moment at which what the recorder writes down is whole, and every vCPU at
// rest.
#pragma once

#include "core/remote_addr.h"
#include "core/result.h"
#include "core/waiting.h"
#include "modules/module.h"
#include "tracer/stopped_world.h"

namespace vmckpt {

// Lets the target run on for a moment, and stops it again, until it is so. Reads the ledger.
Result<StoppedWorld> freeze_at_rest(StateSave& state, RemoteAddr ledger_address, const Waiting& waiting);

}  // namespace vmckpt
