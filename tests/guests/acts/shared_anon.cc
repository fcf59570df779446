// Shared anonymous memory and /dev/zero mapped shared: the content survives, the two mappings of one region (by
// mremap(2) of size 0) are still one memory, parts of it may have permissions of their own, and children share it.

#include "act.h"

constexpr size_t kBytes = 1 << 20;

static void check_twins(const std::string& name, char* one, char* other, uint64_t seed) {
  act::expect_filled(name, one, kBytes, seed);
  act::expect_filled(name + ", seen twice", other, kBytes, seed);
  one[4097] = 'w';
  act::expect_equal(name + ": a write is seen in the twin", 'w', other[4097]);
  act::expect_equal(name + ": a child's write", 0, act::in_child([&] {
    other[9999] = 'c';
    return 0;
  }));
  act::expect_equal(name + ": is seen by the parent", 'c', one[9999]);
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  uint64_t seed = act::random_u64();
  auto map = [](int fd, int flags) {
    return static_cast<char*>(MUST(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, flags, fd, 0)));
  };
  auto twin_of = [](char* region) { return static_cast<char*>(MUST(mremap(region, 0, kBytes, MREMAP_MAYMOVE))); };

  char* anonymous = map(-1, MAP_SHARED | MAP_ANONYMOUS);
  char* anonymous_twin = twin_of(anonymous);
  int zero = MUST(open("/dev/zero", O_RDWR | O_CLOEXEC));
  char* device = map(zero, MAP_SHARED);
  close(zero);
  char* device_twin = twin_of(device);
  char* divided = map(-1, MAP_SHARED | MAP_ANONYMOUS);
  act::fill(anonymous, kBytes, seed);
  act::fill(device, kBytes, seed + 1);
  act::fill(divided, kBytes / 2, seed + 2);  // the second half is never touched
  MUST(mprotect(divided, kBytes / 4, PROT_READ));
  MUST(munmap(divided + kBytes / 4, 4096));
  // What the program itself may not read.
  char* write_only = map(-1, MAP_SHARED | MAP_ANONYMOUS);
  act::fill(write_only, kBytes, seed + 3);
  MUST(mprotect(write_only, kBytes, PROT_WRITE));
  MUST(mprotect(write_only + 4096, 4096, PROT_NONE));

  act::intermission();

  act::expect_equal("permissions of memory that is only written", std::string("-w-s"), act::permissions_at(write_only));
  act::expect_equal("permissions of a part that is not used", std::string("---s"), act::permissions_at(write_only + 4096));
  MUST(mprotect(write_only, kBytes, PROT_READ));
  act::expect_filled("memory that is only written", write_only, kBytes, seed + 3);

  check_twins("shared anonymous memory", anonymous, anonymous_twin, seed);
  check_twins("/dev/zero mapped shared", device, device_twin, seed + 1);
  act::expect_equal("permissions of the first part", std::string("r--s"), act::permissions_at(divided));
  act::expect_equal("permissions of the last part", std::string("rw-s"), act::permissions_at(divided + kBytes / 2));
  act::expect_equal("nothing in the hole", 0u, act::map_line_at(divided + kBytes / 4).start);
  act::expect_filled("first part", divided, kBytes / 4, seed + 2);
  act::expect_zero("untouched half", divided + kBytes / 2, kBytes / 2);
  return act::finish();
}
