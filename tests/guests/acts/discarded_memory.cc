// Anonymous memory that is given back: it reads as zeros and can be used again. What of a region was not given back stays.
// Allocators, garbage collectors and balloons count on that.

#include "act.h"

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif

constexpr size_t kPage = 4096;
constexpr size_t kBytes = 4 << 20;

struct Region {
  char* start;
  uint64_t seed;
};

static Region make_region(size_t bytes = kBytes, int protection = PROT_READ | PROT_WRITE) {
  Region region{static_cast<char*>(MUST(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))),
                act::random_u64()};
  act::fill(region.start, bytes, region.seed);
  if (protection != (PROT_READ | PROT_WRITE)) MUST(mprotect(region.start, bytes, protection));
  return region;
}

static void expect_fresh(const char* what, char* start, size_t bytes) {
  act::expect_zero(what, start, bytes);
  act::fill(start, bytes, 7);
  act::expect_filled(std::string(what) + ", written anew", start, bytes, 7);
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  Region whole = make_region(), middle = make_region(), pages = make_region(), read_only = make_region(kBytes, PROT_READ);
  Region freed = make_region(), kept = make_region(), removed = make_region(), locked = make_region(), collapsed = make_region();
  // MAP_SHARED memory is given back with MADV_REMOVE.
  auto* shared = static_cast<char*>(MUST(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)));
  act::fill(shared, kBytes, 3);
  MUST(mlock(locked.start, 8 * kPage));

  act::intermission();

  MUST(madvise(whole.start, kBytes, MADV_DONTNEED));
  expect_fresh("DONTNEED of a region", whole.start, kBytes);

  MUST(madvise(middle.start + kBytes / 4, kBytes / 2, MADV_DONTNEED));
  act::expect_filled("before the discarded part", middle.start, kBytes / 4, middle.seed);
  expect_fresh("DONTNEED of a part", middle.start + kBytes / 4, kBytes / 2);
  std::vector<char> expected(kBytes);
  act::fill(expected.data(), kBytes, middle.seed);
  act::expect("behind the discarded part", memcmp(expected.data() + kBytes / 4 * 3, middle.start + kBytes / 4 * 3, kBytes / 4) == 0);

  act::fill(expected.data(), kBytes, pages.seed);
  for (size_t at = 0; at < kBytes; at += 4 * kPage) MUST(madvise(pages.start + at, kPage, MADV_DONTNEED));
  for (size_t at = 0; at < kBytes; at += kPage) {
    if (at % (4 * kPage) == 0) act::expect_zero("every fourth page", pages.start + at, kPage);
    else act::expect("the pages between", memcmp(expected.data() + at, pages.start + at, kPage) == 0);
  }
  act::expect_equal("mappings of a region of which pages were discarded", kBytes / kPage, [&] {
    const act::MapLine line = act::map_line_at(pages.start);
    return (std::min<size_t>(line.end, reinterpret_cast<uintptr_t>(pages.start) + kBytes) - reinterpret_cast<uintptr_t>(pages.start)) / kPage;
  }());

  MUST(madvise(read_only.start, kBytes, MADV_DONTNEED));
  act::expect_zero("DONTNEED of read-only memory", read_only.start, kBytes);
  MUST(mprotect(read_only.start, kBytes, PROT_READ | PROT_WRITE));
  expect_fresh("made writable", read_only.start, kBytes);

  // After MADV_FREE a page is what it was or zero, and stays what is written to it.
  if (madvise(freed.start, kBytes, MADV_FREE) != 0) act::fail("MADV_FREE", "success", strerror(errno));
  act::fill(expected.data(), kBytes, freed.seed);
  for (size_t at = 0; at < kBytes; at += kPage) {
    static const char kZeros[kPage] = {};
    act::expect("a page after MADV_FREE", memcmp(freed.start + at, expected.data() + at, kPage) == 0 ||
                                              memcmp(freed.start + at, kZeros, kPage) == 0);
  }
  act::fill(freed.start, kBytes, 11);
  act::expect_filled("written after MADV_FREE", freed.start, kBytes, 11);

  act::expect_errno("MADV_REMOVE of private memory", EINVAL, madvise(removed.start, kBytes, MADV_REMOVE));
  act::expect_filled("content after the refused MADV_REMOVE", removed.start, kBytes, removed.seed);
  MUST(madvise(shared, kBytes / 2, MADV_REMOVE));
  expect_fresh("MADV_REMOVE of shared memory", shared, kBytes / 2);

  act::expect_errno("MADV_DONTNEED of locked memory", EINVAL, madvise(locked.start, 8 * kPage, MADV_DONTNEED));
  act::expect_filled("locked memory", locked.start, kBytes, locked.seed);
  if (madvise(locked.start, 8 * kPage, MADV_DONTNEED_LOCKED) == 0) {  // Linux 5.18
    expect_fresh("MADV_DONTNEED_LOCKED", locked.start, 8 * kPage);
  }

  MUST(madvise(collapsed.start, kBytes, MADV_WIPEONFORK));
  act::expect_equal("a child's view of memory that is wiped on fork", 0, act::in_child([&] {
    for (size_t i = 0; i < kBytes; ++i) if (collapsed.start[i] != 0) return 1;
    return 0;
  }));
  act::expect_filled("the parent's", collapsed.start, kBytes, collapsed.seed);

  act::expect_filled("memory that was left alone", kept.start, kBytes, kept.seed);
  MUST(munmap(kept.start, kBytes));
  auto* again = static_cast<char*>(MUST(mmap(kept.start, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0)));
  expect_fresh("mapped anew in the same place", again, kBytes);
  return act::finish();
}
