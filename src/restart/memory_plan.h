// From the image's mappings and page index to the calls that make the address space again.
//
// What was anonymous is anonymous again: its content is read into it (page_reads.h). Only guest RAM is mapped (guest_ram.h).
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include <sys/types.h>

#include "core/result.h"
#include "image/memory.pb.h"
#include "image/reader.h"
#include "restart/guest_ram.h"
#include "tracer/tape_draft.h"

namespace vmckpt {

// What mappings are of, in the new process.
struct MappingSources {
  std::function<Result<int>(const pb::Mapping&)> file;  // a descriptor, open as the mapping needs it
  std::function<int(const pb::Mapping&)> segment;       // the id of a System V segment, or -1
};

// `helper_numbers`: as choose_helper_numbers() gives them.
Result<void> plan_memory(const pb::AddressSpace& space, const ImageReader& image, const GuestRam& guest_ram,
                         const MappingSources& sources, const std::vector<pid_t>& helper_numbers, TapeDraft& tape);

// PR_SET_MM_MAP: brk, stack, arguments, environment, auxiliary vector and /proc/PID/exe. `executable_fd` -1: not to be had.
void plan_layout(const pb::AddressSpace& space, int executable_fd, TapeDraft& tape);

}  // namespace vmckpt
