// Writes the pages of a process that does not change (a snapshot child, or the stopped target itself) into an image: absent
// and zero pages cost nothing, neighbouring pages become runs that restart can map.
#pragma once

#include <vector>

#include "core/result.h"
#include "image/writer.h"
#include "memory/address_space.h"
#include "memory/page_copy.h"

namespace vmckpt {

// May run in a thread of its own: touches only `source`'s memory and the writer. Returns the guard regions within the ranges.
Result<std::vector<GuardRegion>> dump_pages(pid_t source, const std::vector<DumpRange>& ranges, ImageWriter& writer,
                                            DumpProgress& progress);

}  // namespace vmckpt
