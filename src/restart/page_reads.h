// Page data that restart reads into the new process's memory, by all processors at once.
//
// Anonymous memory must be anonymous again: a mapping of the image in its place would show the image where the program expects
// zeros (MADV_DONTNEED), could not grow (mremap) and had no huge pages. So it is read, and since reading is mostly the making of
// pages, which the kernel does in the faulting thread, helper threads read along: they are made when the memory is mapped, take
// groups of runs from one list, and are gone before the target's own threads are made. Where none can be made the leader reads
// alone.
#pragma once

#include <cstdint>
#include <vector>

#include <sys/types.h>

#include "image/page_index.h"
#include "tracer/tape_draft.h"

namespace vmckpt {

class PageReads {
 public:
  void add(const PageRun& run);
  uint64_t bytes() const { return bytes_; }

  // `helper_numbers`: thread ids that are free now and that the target does not need; one helper for each, at most.
  void draft(int image_fd, const std::vector<pid_t>& helper_numbers, TapeDraft& tape) const;

 private:
  std::vector<ReadItem> items_;
  uint64_t bytes_ = 0;
};

// As many as there are processors besides the leader's; none of `taken`, which are the target's own.
std::vector<pid_t> choose_helper_numbers(const std::vector<pid_t>& taken);

}  // namespace vmckpt
