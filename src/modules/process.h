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

// In the new process, before descriptors are rebuilt: directories, umask, personality, session and group.
Result<void> restore_process(const pb::Image& image, const FileAccess& access);
// From the supervisor, when all else is done: the new process itself might not be able to open its last files otherwise.
void restore_limits(const pb::Process& process, pid_t pid, std::vector<std::string>& notes);
// From the supervisor: its cgroups where they are and may be entered; they and another login uid are noted otherwise.
void restore_surroundings(const pb::Process& process, pid_t pid, std::vector<std::string>& notes);

}  // namespace vmckpt
