// The one loop that brings pages from a source to a sink.
#pragma once

#include <atomic>
#include <cstdint>

#include "image/page_sink.h"
#include "memory/page_source.h"

namespace vmckpt {

struct DumpProgress {
  std::atomic<uint64_t> bytes_done{0};   // of address space looked at
  std::atomic<uint64_t> bytes_saved{0};  // page data written
  std::atomic<bool> cancelled{false};    // set from outside: the copy ends with an error soon
};

// Reads in the caller's thread; as soon as there is more than a little, the sink has threads of its own meanwhile, one or as many
// as it can use.
Result<void> copy_pages(PageSource& source, PageSink& sink, DumpProgress& progress);

}  // namespace vmckpt
