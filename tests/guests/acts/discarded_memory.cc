// Anonymous memory that is given back: it reads as zeros and can be used again. What of a region was not given back stays.
// Allocators, garbage collectors and balloons count on that. With the argument "guest-ram" the regions are what a VMM would have
// for its guest, which a restart may map from the image.

#include "act.h"

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif

constexpr size_t kPage = 4096;
static size_t bytes_each = 4 << 20;
static bool guest_ram = false;

struct Region {
  char* start;
  uint64_t seed;
};

static Region make_region(size_t bytes = bytes_each, int protection = PROT_READ | PROT_WRITE) {
  Region region{static_cast<char*>(MUST(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))),
                act::random_u64()};
  if (guest_ram) MUST(madvise(region.start, bytes, MADV_DONTFORK));
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
  guest_ram = !act::args.empty();
  if (guest_ram) bytes_each = 16 << 20;
  Region whole = make_region(), middle = make_region(), pages = make_region(), read_only = make_region(bytes_each, PROT_READ);
  Region freed = make_region(), kept = make_region(), removed = make_region(), locked = make_region(), wiped = make_region();
  // MAP_SHARED memory is given back with MADV_REMOVE.
  auto* shared = static_cast<char*>(MUST(mmap(nullptr, bytes_each, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)));
  act::fill(shared, bytes_each, 3);
  if (!guest_ram) MUST(mlock(locked.start, 8 * kPage));

  act::intermission();

  if (guest_ram) MUST(mlock(locked.start, 8 * kPage));

  MUST(madvise(whole.start, bytes_each, MADV_DONTNEED));
  expect_fresh("DONTNEED of a region", whole.start, bytes_each);

  MUST(madvise(middle.start + bytes_each / 4, bytes_each / 2, MADV_DONTNEED));
  act::expect_filled("before the discarded part", middle.start, bytes_each / 4, middle.seed);
  expect_fresh("DONTNEED of a part", middle.start + bytes_each / 4, bytes_each / 2);
  std::vector<char> expected(bytes_each);
  act::fill(expected.data(), bytes_each, middle.seed);
  act::expect("behind the discarded part",
              memcmp(expected.data() + bytes_each / 4 * 3, middle.start + bytes_each / 4 * 3, bytes_each / 4) == 0);

  act::fill(expected.data(), bytes_each, pages.seed);
  for (size_t at = 0; at < bytes_each; at += 4 * kPage) MUST(madvise(pages.start + at, kPage, MADV_DONTNEED));
  for (size_t at = 0; at < bytes_each; at += kPage) {
    if (at % (4 * kPage) == 0) act::expect_zero("every fourth page", pages.start + at, kPage);
    else act::expect("the pages between", memcmp(expected.data() + at, pages.start + at, kPage) == 0);
  }
  if (guest_ram)
    act::expect("advice of what was discarded", act::has_vm_flag(pages.start, "dc") && act::has_vm_flag(whole.start, "dc"));

  MUST(madvise(read_only.start, bytes_each, MADV_DONTNEED));
  act::expect_zero("DONTNEED of read-only memory", read_only.start, bytes_each);
  MUST(mprotect(read_only.start, bytes_each, PROT_READ | PROT_WRITE));
  expect_fresh("made writable", read_only.start, bytes_each);

  // After MADV_FREE a page is what it was or zero, and stays what is written to it.
  if (madvise(freed.start, bytes_each, MADV_FREE) != 0) act::fail("MADV_FREE", "success", strerror(errno));
  act::fill(expected.data(), bytes_each, freed.seed);
  for (size_t at = 0; at < bytes_each; at += kPage) {
    static const char kZeros[kPage] = {};
    act::expect("a page after MADV_FREE", memcmp(freed.start + at, expected.data() + at, kPage) == 0 ||
                                              memcmp(freed.start + at, kZeros, kPage) == 0);
  }
  act::fill(freed.start, bytes_each, 11);
  act::expect_filled("written after MADV_FREE", freed.start, bytes_each, 11);

  act::expect_errno("MADV_REMOVE of private memory", EINVAL, madvise(removed.start, bytes_each, MADV_REMOVE));
  act::expect_filled("content after the refused MADV_REMOVE", removed.start, bytes_each, removed.seed);
  MUST(madvise(shared, bytes_each / 2, MADV_REMOVE));
  expect_fresh("MADV_REMOVE of shared memory", shared, bytes_each / 2);

  act::expect_errno("MADV_DONTNEED of locked memory", EINVAL, madvise(locked.start, 8 * kPage, MADV_DONTNEED));
  act::expect_filled("locked memory", locked.start, bytes_each, locked.seed);
  if (madvise(locked.start, 8 * kPage, MADV_DONTNEED_LOCKED) == 0) {  // Linux 5.18
    expect_fresh("MADV_DONTNEED_LOCKED", locked.start, 8 * kPage);
  }

  MUST(madvise(wiped.start, bytes_each, MADV_DOFORK));
  MUST(madvise(wiped.start, bytes_each, MADV_WIPEONFORK));
  act::expect_equal("a child's view of memory that is wiped on fork", 0, act::in_child([&] {
    for (size_t i = 0; i < bytes_each; ++i) if (wiped.start[i] != 0) return 1;
    return 0;
  }));
  act::expect_filled("the parent's", wiped.start, bytes_each, wiped.seed);

  // The same by a system call of the program's own making, as far as it goes through libc.
  act::fill(wiped.start, bytes_each, 4);
  MUST(syscall(SYS_madvise, wiped.start, bytes_each / 2, MADV_DONTNEED));
  act::expect_zero("DONTNEED by syscall(2)", wiped.start, bytes_each / 2);
  if (guest_ram) {
    MUST(syscall(SYS_madvise, kept.start + bytes_each / 2, bytes_each / 2, MADV_DONTNEED));
    act::expect_zero("DONTNEED by syscall(2) of a part", kept.start + bytes_each / 2, bytes_each / 2);
    act::fill(kept.start, bytes_each, kept.seed);
  }

  act::expect_filled("memory that was left alone", kept.start, bytes_each, kept.seed);
  MUST(munmap(kept.start, bytes_each));
  auto* again = static_cast<char*>(
      MUST(mmap(kept.start, bytes_each, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0)));
  expect_fresh("mapped anew in the same place", again, bytes_each);
  return act::finish();
}
