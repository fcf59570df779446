// Which pages of a process have content of their own: what its page tables say, without looking at what they do not cover. A
// reservation of 16 TiB (sanitizers, JVMs, databases) costs what is in it, not what it is wide.
//
// Linux 6.7 answers in runs (PAGEMAP_SCAN). Before that there are only the entries of /proc/PID/pagemap, 8 bytes a page: mappings
// of which smaps says that nothing is in them are left out, others are read whole.
//
// Guard regions (madvise(2), MADV_GUARD_INSTALL, Linux 6.13) live in page tables, too. They are shown by pagemap's bit 58 (Linux
// 6.14), and by PAGEMAP_SCAN (6.16). On 6.13 they look like swapped pages, which cannot be read: the dump says so then.
//
// Sources: Documentation/admin-guide/mm/pagemap.rst, Documentation/filesystems/proc.rst (smaps).
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include <sys/types.h>

#include "core/fd.h"
#include "core/result.h"

namespace vmckpt {

struct PageSpan {
  enum class Kind {
    kOwn,    // anonymous pages, in memory or swapped
    kZero,   // the zero page: only read so far
    kGuard,  // guard region
  };
  uint64_t start = 0;
  uint64_t end = 0;
  Kind kind = Kind::kOwn;
};

class PageScanner {
 public:
  enum class Method { kBest, kEntries };  // kEntries: as on kernels before 6.7
  static Result<PageScanner> open(pid_t pid, Method method = Method::kBest);

  using Take = std::function<Result<void>(const PageSpan&)>;
  // Calls `take` for the spans within [start, end) in rising order; what is between them is absent, or a mapped file's own page.
  // Neighbouring spans may be of one kind.
  Result<void> scan(uint64_t start, uint64_t end, const Take& take);

 private:
  struct Resident {
    uint64_t start;
    uint64_t end;
    bool empty;
  };

  Result<void> scan_runs(uint64_t start, uint64_t end, const Take& take);
  Result<void> scan_entries(uint64_t start, uint64_t end, const Take& take);
  Result<void> find_empty_mappings();

  pid_t pid_ = 0;
  Fd pagemap_;
  bool runs_ = true;         // PAGEMAP_SCAN is there
  bool names_guards_ = true;  // and tells guards from swapped pages
  std::vector<Resident> mappings_;  // for scan_entries, sorted
  std::vector<uint64_t> window_;
};

// Whether this kernel has guard regions.
bool host_has_guard_regions();

}  // namespace vmckpt
