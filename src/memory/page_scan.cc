#include "memory/page_scan.h"

#include <algorithm>
#include <array>
#include <cerrno>

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "core/page.h"
#include "core/proc.h"
#include "memory/maps.h"
#include "vmckpt/image_format.h"

namespace vmckpt {
namespace {


// /proc/PID/pagemap entries.
constexpr uint64_t kPresent = uint64_t{1} << 63, kSwapped = uint64_t{1} << 62, kFilePage = uint64_t{1} << 61,
                   kGuardRegion = uint64_t{1} << 58;

// PAGEMAP_SCAN, which the headers of Debian 12 lack (include/uapi/linux/fs.h).
constexpr uint64_t kIsFile = 1u << 2, kIsPresent = 1u << 3, kIsSwapped = 1u << 4, kIsZeroPage = 1u << 5, kIsGuard = 1u << 8;
struct ScanRegion {
  uint64_t start;
  uint64_t end;
  uint64_t categories;
};
struct ScanArgument {
  uint64_t size;
  uint64_t flags;
  uint64_t start;
  uint64_t end;
  uint64_t walk_end;
  uint64_t regions;
  uint64_t regions_room;
  uint64_t max_pages;
  uint64_t category_inverted;
  uint64_t category_mask;
  uint64_t category_anyof_mask;
  uint64_t return_mask;
};
static_assert(sizeof(ScanArgument) == 96 && sizeof(ScanRegion) == 24);
constexpr unsigned long kPagemapScan = _IOWR('f', 16, ScanArgument);

constexpr uint64_t kWindowPages = 65536;  // entries read at once: 256 MiB of memory

}  // namespace

Result<PageScanner> PageScanner::open(pid_t pid, Method method) {
  PageScanner scanner;
  scanner.pid_ = pid;
  scanner.pagemap_ = VMCKPT_TRY(open_file(fmt::format("/proc/{}/pagemap", pid), O_RDONLY));
  scanner.runs_ = method == Method::kBest;
  return scanner;
}

Result<void> PageScanner::scan(uint64_t start, uint64_t end, const Take& take) {
  return runs_ ? scan_runs(start, end, take) : scan_entries(start, end, take);
}

Result<void> PageScanner::scan_runs(uint64_t start, uint64_t end, const Take& take) {
  std::array<ScanRegion, 512> regions;
  while (start < end) {
    ScanArgument argument{};
    argument.size = sizeof argument;
    argument.start = start;
    argument.end = end;
    argument.regions = reinterpret_cast<uint64_t>(regions.data());
    argument.regions_room = regions.size();
    // Not a mapped file's own page, and one of the others.
    argument.category_inverted = argument.category_mask = kIsFile;
    argument.category_anyof_mask = kIsPresent | kIsSwapped;
    argument.return_mask = kIsPresent | kIsSwapped | kIsZeroPage | (names_guards_ ? kIsGuard : 0);
    const int found = ::ioctl(pagemap_.get(), kPagemapScan, &argument);
    if (found < 0 && errno == EINTR) continue;
    if (found < 0 && errno == EINVAL && names_guards_) {
      names_guards_ = false;
      continue;
    }
    if (found < 0 && (errno == ENOTTY || errno == EINVAL)) {
      runs_ = false;
      return scan_entries(start, end, take);
    }
    if (found < 0) return errno_error(fmt::format("look through the page tables of process {}", pid_));
    for (int i = 0; i < found; ++i) {
      const ScanRegion& region = regions[static_cast<size_t>(i)];
      if (!names_guards_ && (region.categories & kIsSwapped)) {
        VMCKPT_TRY(scan_entries(region.start, region.end, take));
        continue;
      }
      const bool guard = (region.categories & kIsGuard) != 0, zero = (region.categories & kIsZeroPage) != 0;
      VMCKPT_TRY(take({region.start, region.end,
                       guard  ? PageSpan::Kind::kGuard
                       : zero ? PageSpan::Kind::kZero
                              : PageSpan::Kind::kOwn}));
    }
    if (argument.walk_end <= start)
      return error(fmt::format("process {}'s page tables were not looked through beyond {:#x}", pid_, start));
    start = argument.walk_end;
  }
  return {};
}

Result<void> PageScanner::scan_entries(uint64_t start, uint64_t end, const Take& take) {
  if (!runs_ && mappings_.empty()) VMCKPT_TRY(find_empty_mappings());
  auto mapping = std::lower_bound(mappings_.begin(), mappings_.end(), start,
                                  [](const Resident& one, uint64_t at) { return one.end <= at; });
  PageSpan span{};
  auto flush = [&]() -> Result<void> {
    if (span.start == span.end) return {};
    const PageSpan whole = span;
    span = {};
    return take(whole);
  };
  for (uint64_t at = start; at < end;) {
    while (mapping != mappings_.end() && mapping->end <= at) ++mapping;
    uint64_t stop = end;
    if (mapping != mappings_.end() && at < mapping->start) {
      stop = std::min(end, mapping->start);
    } else if (mapping != mappings_.end()) {
      stop = std::min(end, mapping->end);
      if (mapping->empty) {
        at = stop;
        continue;
      }
    }
    const uint64_t pages = std::min((stop - at) / kPageBytes, kWindowPages);
    window_.resize(pages);
    VMCKPT_TRY(
        pread_exactly(pagemap_.get(), window_.data(), pages * sizeof(uint64_t), at / kPageBytes * sizeof(uint64_t), "pagemap"));
    for (uint64_t i = 0; i < pages; ++i, at += kPageBytes) {
      const uint64_t entry = window_[i];
      const bool guard = (entry & kGuardRegion) != 0;
      if ((entry & (kPresent | kSwapped)) == 0 || ((entry & kFilePage) != 0 && !guard)) continue;
      const PageSpan::Kind kind = guard ? PageSpan::Kind::kGuard : PageSpan::Kind::kOwn;
      if (span.end != at || span.kind != kind) {
        VMCKPT_TRY(flush());
        span = {at, at, kind};
      }
      span.end = at + kPageBytes;
    }
  }
  return flush();
}

// The zero page is not counted as resident, and does not have to be.
Result<void> PageScanner::find_empty_mappings() {
  for (const MappingUse& use : VMCKPT_TRY(read_mapping_uses(pid_)))
    mappings_.push_back({use.start, use.end, use.resident_kb + use.swapped_kb == 0});
  return {};
}

bool host_has_guard_regions() {
  constexpr int kGuardInstall = 102;  // MADV_GUARD_INSTALL (include/uapi/asm-generic/mman-common.h)
  void* page = ::mmap(nullptr, kPageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) return false;
  const bool has = ::madvise(page, kPageBytes, kGuardInstall) == 0;
  ::munmap(page, kPageBytes);
  return has;
}

}  // namespace vmckpt
