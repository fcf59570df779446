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

// What mappings are of, in the new process.
struct MappingSources {
  std::function<Result<int>(const pb::Mapping&)> file;  // a descriptor, open as the mapping needs it
  std::function<int(const pb::Mapping&)> segment;       // the id of a System V segment, or -1
};

Result<void> plan_memory(const pb::AddressSpace& space, const ImageReader& image, const MappingSources& sources, TapeDraft& tape);

// PR_SET_MM_MAP: brk, stack, arguments, environment, auxiliary vector and /proc/PID/exe. `executable_fd` -1: not to be had.
void plan_layout(const pb::AddressSpace& space, int executable_fd, TapeDraft& tape);

}  // namespace vmckpt
