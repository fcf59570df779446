// mremap(2) in all its forms, and what stands on it: memory grows, shrinks and moves with its content, and what is new is zero.
// With the argument "guest-ram" the regions are what a VMM would have for its guest, which a restart may map from the image.

#include "act.h"

constexpr size_t kPage = 4096;
static size_t bytes_each = 4 << 20;
static bool guest_ram = false;

struct Region {
  char* start;
  uint64_t seed;
};

static char* map_bytes(size_t bytes, int protection = PROT_READ | PROT_WRITE) {
  return static_cast<char*>(MUST(mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
}

// In the middle of room that nobody else has.
static Region make_region(size_t room_behind = 0) {
  Region region{map_bytes(bytes_each + room_behind), act::random_u64()};
  if (room_behind != 0) MUST(munmap(region.start + bytes_each, room_behind));
  if (guest_ram) MUST(madvise(region.start, bytes_each, MADV_DONTFORK));
  act::fill(region.start, bytes_each, region.seed);
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
  act::expect_filled(std::string(what) + ": content", start, bytes_each, seed);
  act::expect_zero(std::string(what) + ": what is new", start + bytes_each, bytes - bytes_each);
  act::fill(start, bytes, seed + 1);
  act::expect_filled(std::string(what) + ": written", start, bytes, seed + 1);
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  guest_ram = !act::args.empty();
  if (guest_ram) bytes_each = 16 << 20;
  Region in_place = make_region(4 * bytes_each), grown = make_region(), shrunk = make_region(), moved = make_region(),
         fixed = make_region(), over = make_region(), left = make_region(), advised = make_region();
  MUST(madvise(advised.start, bytes_each, MADV_DONTFORK));
  constexpr size_t kSmall = 64 << 20, kBig = 256 << 20;
  uint64_t seed = act::random_u64();
  auto* block = static_cast<char*>(malloc(kSmall));
  act::fill(block, kSmall, seed);

  act::intermission();

  // Something else may have taken the room behind it; then it does not grow there.
  if (mremap(in_place.start, bytes_each, 2 * bytes_each, 0) != MAP_FAILED) {
    expect_grown("grown in place", in_place.start, in_place.seed, 2 * bytes_each);
  } else {
    act::expect_equal("why it does not grow in place", ENOMEM, errno);
  }

  expect_grown("grown", remap(grown.start, bytes_each, 4 * bytes_each, MREMAP_MAYMOVE), grown.seed, 4 * bytes_each);

  act::expect_equal("shrunk", shrunk.start, remap(shrunk.start, bytes_each, bytes_each / 2, 0));
  act::expect_filled("content of what shrank", shrunk.start, bytes_each / 2, shrunk.seed);
  act::expect_equal("nothing is left of the rest", 0u, act::map_line_at(shrunk.start + bytes_each / 2).start);
  char* regrown = remap(shrunk.start, bytes_each / 2, bytes_each, MREMAP_MAYMOVE);
  act::expect_filled("content of what shrank and grew", regrown, bytes_each / 2, shrunk.seed);
  act::expect_zero("what came back", regrown + bytes_each / 2, bytes_each / 2);

  char* target = map_bytes(2 * bytes_each);
  act::expect_equal("moved", target, remap(moved.start, bytes_each, bytes_each, MREMAP_MAYMOVE | MREMAP_FIXED, target));
  act::expect_filled("content of what moved", target, bytes_each, moved.seed);
  act::expect_equal("nothing is left behind", 0u, act::map_line_at(moved.start).start);

  char* bigger = map_bytes(2 * bytes_each);
  act::expect_equal("moved and grown", bigger,
                    remap(fixed.start, bytes_each, 2 * bytes_each, MREMAP_MAYMOVE | MREMAP_FIXED, bigger));
  expect_grown("moved and grown", bigger, fixed.seed, 2 * bytes_each);

  // Over memory that has content of its own.
  char* first = map_bytes(bytes_each);
  act::fill(first, bytes_each, 5);
  remap(first, bytes_each, bytes_each, MREMAP_MAYMOVE | MREMAP_FIXED, over.start);
  act::expect_filled("moved over another region", over.start, bytes_each, 5);
  MUST(madvise(over.start, bytes_each, MADV_DONTNEED));
  act::expect_zero("given back there", over.start, bytes_each);

  if (void* got = mremap(left.start, bytes_each, bytes_each, MREMAP_MAYMOVE | MREMAP_DONTUNMAP);
      got != MAP_FAILED) {  // Linux 5.7
    act::expect_filled("moved with DONTUNMAP", got, bytes_each, left.seed);
    act::expect_zero("what is left in the old place", left.start, bytes_each);
    act::fill(left.start, bytes_each, 9);
    act::expect_filled("the old place, written", left.start, bytes_each, 9);
  } else if (errno != EINVAL) {
    act::fail("MREMAP_DONTUNMAP", "success", strerror(errno));
  }

  char* kept_advice = remap(advised.start, bytes_each, 2 * bytes_each, MREMAP_MAYMOVE);
  act::expect("advice after growing",
              act::has_vm_flag(kept_advice, "dc") && act::has_vm_flag(kept_advice + 2 * bytes_each - kPage, "dc"));
  expect_grown("grown with advice", kept_advice, advised.seed, 2 * bytes_each);

  block = static_cast<char*>(MUST(realloc(block, kBig)));
  act::expect_filled("a block's content after realloc", block, kSmall, seed);
  memset(block + kSmall, 1, kBig - kSmall);
  block = static_cast<char*>(MUST(realloc(block, kSmall / 2)));
  act::expect_filled("a block's content after it shrank", block, kSmall / 2, seed);
  free(block);
  return act::finish();
}
