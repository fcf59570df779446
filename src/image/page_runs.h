// From a buffer of pages to runs of the image: zero pages cost nothing, neighbouring pages become one run that restart can map.
#pragma once

#include <cstdint>

#include "core/result.h"
#include "image/writer.h"

namespace vmckpt {

// Writes and records the pages in `buffer` (at most kMaxRecordBytes) that are not zero; returns their bytes. Gaps of up to 16
// zero pages stay inside a run as holes of the file: a mapping less at restart is worth more than the hole costs.
Result<uint64_t> write_runs(const uint8_t* buffer, uint64_t bytes, uint64_t object, uint64_t address, ImageWriter& writer);

// Exactly the pages that `wanted` marks, zero ones too, and none besides: where something else than zeros lies under them
// (modified pages of a mapped file).
Result<uint64_t> write_marked_runs(const uint8_t* buffer, uint64_t bytes, const bool* wanted, uint64_t object,
                                   uint64_t address, ImageWriter& writer);

}  // namespace vmckpt
