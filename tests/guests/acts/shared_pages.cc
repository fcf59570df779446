// What the kernel shares and merges: forks made after the intermission see the content of then, each writer gets a copy of its
// own, KSM takes the memory, huge pages can be had, and every page is private again to who writes it.

#include <sys/prctl.h>

#include "act.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

constexpr size_t kPage = 4096;
constexpr size_t kHugePage = 2 << 20;
constexpr size_t kBytes = 4 << 20;

static char* make_region(uint64_t seed) {
  auto* block = static_cast<char*>(
      MUST(mmap(nullptr, kBytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
  auto* region = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(block) + kHugePage - 1) & ~(kHugePage - 1));
  act::fill(region, kBytes, seed);
  return region;
}

static size_t bytes_of(const void* address, const std::string& key) {
  unsigned long start = 0, end = 0;
  bool inside = false;
  for (const std::string& line : act::lines_of(act::file_text("/proc/self/smaps"))) {
    if (std::sscanf(line.c_str(), "%lx-%lx ", &start, &end) == 2) {
      inside = start <= reinterpret_cast<uintptr_t>(address) && reinterpret_cast<uintptr_t>(address) < end;
    } else if (inside && line.rfind(key + ":", 0) == 0) {
      return std::strtoul(line.c_str() + key.size() + 1, nullptr, 10) << 10;
    }
  }
  return 0;
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  uint64_t seed = act::random_u64();
  char *forked = make_region(seed), *merged = make_region(seed + 1), *huge = make_region(seed + 2),
       *populated = make_region(seed + 3), *collapsed = make_region(seed + 4);
  const bool has_huge = madvise(huge, kBytes, MADV_HUGEPAGE) == 0;
  memset(huge, 0, kBytes);
  MUST(madvise(huge, kBytes, MADV_DONTNEED));
  act::fill(huge, kBytes, seed + 2);  // now in huge pages, where the kernel had some
  const bool was_huge = bytes_of(huge, "AnonHugePages") >= kBytes;

  act::intermission();

  act::expect_equal("a child's view", 0, act::in_child([&] {
    const bool same = act::expect_filled("content in a child", forked, kBytes, seed);
    act::fill(forked, kBytes, 1);
    return same && act::in_child([&] { return act::expect_filled("content in a grandchild", forked, kBytes, 1) ? 0 : 1; }) == 0
               ? 0
               : 1;
  }));
  act::expect_filled("the parent's view", forked, kBytes, seed);
  act::fill(forked, kBytes, 2);
  act::expect_filled("written by the parent", forked, kBytes, 2);
  act::expect_equal("all of it is anonymous", kBytes, std::min(kBytes, bytes_of(forked, "Anonymous")));

  if (madvise(merged, kBytes, MADV_MERGEABLE) == 0) {
    act::expect("memory that may be merged", act::has_vm_flag(merged, "mg"));
    act::expect_filled("its content", merged, kBytes, seed + 1);
    MUST(madvise(merged, kBytes, MADV_UNMERGEABLE));
  }
  act::expect_filled("content that was mergeable", merged, kBytes, seed + 1);

  act::expect_filled("content in huge pages", huge, kBytes, seed + 2);
  // The kernel may have run out of huge pages; most of one region must be there.
  if (has_huge && was_huge) act::expect("huge pages where they were", bytes_of(huge, "AnonHugePages") >= kHugePage);

  MUST(mprotect(populated, kBytes / 2, PROT_READ));
  MUST(madvise(populated, kBytes / 2, MADV_DONTNEED));
  if (madvise(populated, kBytes / 2, MADV_POPULATE_READ) == 0) act::expect_zero("populated for reading", populated, kBytes / 2);
  MUST(mprotect(populated, kBytes / 2, PROT_READ | PROT_WRITE));
  if (madvise(populated, kBytes / 2, MADV_POPULATE_WRITE) == 0) act::expect_zero("populated for writing", populated, kBytes / 2);
  MUST(mlock(populated, 16 * kPage));
  act::expect_zero("locked", populated, 16 * kPage);

  (void)madvise(collapsed, kBytes, MADV_COLLAPSE);  // Linux 6.1, and where there are huge pages
  act::expect_filled("content that was collapsed into huge pages", collapsed, kBytes, seed + 4);
  return act::finish();
}
