// What belongs to the process as a whole and is no resource of its own: identity, names, directories, limits, prctl settings.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/result.h"
#include "image/image.pb.h"
#include "memory/file_access.h"
#include "modules/process.pb.h"
#include "tracer/stopped_world.h"
#include "tracer/tape_draft.h"

namespace vmckpt {

inline const pb::ProcessState& state_of(const pb::Process& process) { return process.GetExtension(pb::process_state); }

}  // namespace vmckpt
