// Memory that is all zeros reads as zeros afterwards, and costs nothing in the image (the test looks at its size):
// 4 GiB never touched, 128 MiB touched by reading, 128 MiB written with zeros, 64 MiB written and given back.

#include "act.h"

constexpr size_t kMiB = 1 << 20;

static char* map(size_t bytes) {
  return static_cast<char*>(MUST(
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  char *absent = map(4096 * kMiB), *read_only = map(128 * kMiB);
  char *written = map(128 * kMiB), *given_back = map(64 * kMiB);
  act::expect_zero("read", read_only, 128 * kMiB);
  memset(written, 0, 128 * kMiB);
  memset(given_back, 0xff, 64 * kMiB);
  MUST(madvise(given_back, 64 * kMiB, MADV_DONTNEED));
  uint64_t seed = act::random_u64();
  for (size_t at = 0; at < 128 * kMiB; at += 16 * kMiB) act::fill(written + at, 4096, seed + at);  // a few islands

  act::intermission();

  for (size_t at = 0; at < 4096 * kMiB; at += 64 * kMiB) act::expect_zero("absent", absent + at, 4096);
  act::expect_zero("read before", read_only, 128 * kMiB);
  act::expect_zero("given back", given_back, 64 * kMiB);
  for (size_t at = 0; at < 128 * kMiB; at += 16 * kMiB) {
    act::expect_filled("island", written + at, 4096, seed + at);
    act::expect_zero("written with zeros", written + at + 4096, 16 * kMiB - 4096);
  }
  return act::finish();
}
