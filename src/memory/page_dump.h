// Writes the pages of a process that does not change (a snapshot child, or the stopped target itself) into an image: absent
// and zero pages cost nothing, neighbouring pages become runs that restart can map.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "core/result.h"
#include "image/writer.h"
#include "memory/address_space.h"

namespace vmckpt {

struct DumpProgress {
  std::atomic<uint64_t> bytes_done{0};   // of address space looked at
  std::atomic<uint64_t> bytes_saved{0};  // page data written
  std::atomic<bool> cancelled{false};    // set from outside: the dump ends with an error soon
};

// May run in a thread of its own: touches only `source`'s memory and the writer. Returns the guard regions within the ranges.
Result<std::vector<GuardRegion>> dump_pages(pid_t source, const std::vector<DumpRange>& ranges, ImageWriter& writer,
                                            DumpProgress& progress);

}  // namespace vmckpt
