// mremap(2) in all its forms, and what stands on it: memory grows, shrinks and moves with its content, and what is new is zero.

#include "act.h"

constexpr size_t kPage = 4096;
constexpr size_t kBytes = 4 << 20;

struct Region {
  char* start;
  uint64_t seed;
};

static char* map_bytes(size_t bytes, int protection = PROT_READ | PROT_WRITE) {
  return static_cast<char*>(MUST(mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
}

// In the middle of room that nobody else has.
static Region make_region(size_t room_behind = 0) {
  Region region{map_bytes(kBytes + room_behind), act::random_u64()};
  if (room_behind != 0) MUST(munmap(region.start + kBytes, room_behind));
  act::fill(region.start, kBytes, region.seed);
  return region;
}

static char* remap(char* old, size_t bytes, size_t wanted, int flags, char* to = nullptr) {
  void* got = mremap(old, bytes, wanted, flags, to);
  if (got == MAP_FAILED) {
    act::fail("mremap", "success", strerror(errno));
    std::exit(act::finish());
  }
  return static_cast<char*>(got);
}

static void expect_grown(const char* what, char* start, uint64_t seed, size_t bytes) {
  act::expect_filled(std::string(what) + ": content", start, kBytes, seed);
  act::expect_zero(std::string(what) + ": what is new", start + kBytes, bytes - kBytes);
  act::fill(start, bytes, seed + 1);
  act::expect_filled(std::string(what) + ": written", start, bytes, seed + 1);
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  Region in_place = make_region(4 * kBytes), grown = make_region(), shrunk = make_region(), moved = make_region(), fixed = make_region(),
         over = make_region(), left = make_region(), advised = make_region();
  MUST(madvise(advised.start, kBytes, MADV_DONTFORK));
  constexpr size_t kSmall = 64 << 20, kBig = 256 << 20;
  uint64_t seed = act::random_u64();
  auto* block = static_cast<char*>(malloc(kSmall));
  act::fill(block, kSmall, seed);

  act::intermission();

  // Something else may have taken the room behind it; then it does not grow there.
  if (mremap(in_place.start, kBytes, 2 * kBytes, 0) != MAP_FAILED) {
    expect_grown("grown in place", in_place.start, in_place.seed, 2 * kBytes);
  } else {
    act::expect_equal("why it does not grow in place", ENOMEM, errno);
  }

  expect_grown("grown", remap(grown.start, kBytes, 4 * kBytes, MREMAP_MAYMOVE), grown.seed, 4 * kBytes);

  act::expect_equal("shrunk", shrunk.start, remap(shrunk.start, kBytes, kBytes / 2, 0));
  act::expect_filled("content of what shrank", shrunk.start, kBytes / 2, shrunk.seed);
  act::expect_equal("nothing is left of the rest", 0u, act::map_line_at(shrunk.start + kBytes / 2).start);
  char* regrown = remap(shrunk.start, kBytes / 2, kBytes, MREMAP_MAYMOVE);
  act::expect_filled("content of what shrank and grew", regrown, kBytes / 2, shrunk.seed);
  act::expect_zero("what came back", regrown + kBytes / 2, kBytes / 2);

  char* target = map_bytes(2 * kBytes);
  act::expect_equal("moved", target, remap(moved.start, kBytes, kBytes, MREMAP_MAYMOVE | MREMAP_FIXED, target));
  act::expect_filled("content of what moved", target, kBytes, moved.seed);
  act::expect_equal("nothing is left behind", 0u, act::map_line_at(moved.start).start);

  char* bigger = map_bytes(2 * kBytes);
  act::expect_equal("moved and grown", bigger, remap(fixed.start, kBytes, 2 * kBytes, MREMAP_MAYMOVE | MREMAP_FIXED, bigger));
  expect_grown("moved and grown", bigger, fixed.seed, 2 * kBytes);

  // Over memory that has content of its own.
  char* first = map_bytes(kBytes);
  act::fill(first, kBytes, 5);
  remap(first, kBytes, kBytes, MREMAP_MAYMOVE | MREMAP_FIXED, over.start);
  act::expect_filled("moved over another region", over.start, kBytes, 5);
  MUST(madvise(over.start, kBytes, MADV_DONTNEED));
  act::expect_zero("given back there", over.start, kBytes);

  if (void* got = mremap(left.start, kBytes, kBytes, MREMAP_MAYMOVE | MREMAP_DONTUNMAP); got != MAP_FAILED) {  // Linux 5.7
    act::expect_filled("moved with DONTUNMAP", got, kBytes, left.seed);
    act::expect_zero("what is left in the old place", left.start, kBytes);
    act::fill(left.start, kBytes, 9);
    act::expect_filled("the old place, written", left.start, kBytes, 9);
  } else if (errno != EINVAL) {
    act::fail("MREMAP_DONTUNMAP", "success", strerror(errno));
  }

  char* kept_advice = remap(advised.start, kBytes, 2 * kBytes, MREMAP_MAYMOVE);
  act::expect("advice after growing", act::has_vm_flag(kept_advice, "dc") && act::has_vm_flag(kept_advice + 2 * kBytes - kPage, "dc"));
  expect_grown("grown with advice", kept_advice, advised.seed, 2 * kBytes);

  block = static_cast<char*>(MUST(realloc(block, kBig)));
  act::expect_filled("a block's content after realloc", block, kSmall, seed);
  memset(block + kSmall, 1, kBig - kSmall);
  block = static_cast<char*>(MUST(realloc(block, kSmall / 2)));
  act::expect_filled("a block's content after it shrank", block, kSmall / 2, seed);
  free(block);
  return act::finish();
}
