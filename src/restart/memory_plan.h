// From the image's mappings and page index to the calls that make the address space again.
//
// A long run of pages is mapped from the image, MAP_PRIVATE: it costs nothing until it is touched. A short one is read into
// place: a mapping each would fray the address space, slow down the next fork, and count against vm.max_map_count.
#pragma once

#include <cstdint>
#include <functional>

#include "core/result.h"
#include "image/memory.pb.h"
#include "image/reader.h"
#include "tracer/tape_draft.h"

namespace vmckpt {

// A descriptor for a mapping's file, open in the new process as the mapping needs it.
using FileForMapping = std::function<Result<int>(const pb::Mapping&)>;

Result<void> plan_memory(const pb::AddressSpace& space, const ImageReader& image, const FileForMapping& file, TapeDraft& tape);

// PR_SET_MM_MAP: brk, stack, arguments, environment, auxiliary vector and /proc/PID/exe. `executable_fd` -1: not to be had.
void plan_layout(const pb::AddressSpace& space, int executable_fd, TapeDraft& tape);

}  // namespace vmckpt
