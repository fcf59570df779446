// A region of transparent huge pages: content, advice, and that it can be split and grown afterwards.

#include "act.h"

constexpr size_t kHugePage = 2 << 20;
constexpr size_t kBytes = 8 * kHugePage;

int main(int argc, char** argv) {
  act::begin(argc, argv);
  uint64_t seed = act::random_u64();
  auto* block = static_cast<char*>(
      MUST(mmap(nullptr, kBytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
  auto* region = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(block) + kHugePage - 1) & ~(kHugePage - 1));
  if (madvise(region, kBytes, MADV_HUGEPAGE) != 0) act::skip("this kernel has no transparent huge pages");
  act::fill(region, kBytes / 2, seed);  // the second half stays empty

  act::intermission();

  act::expect_filled("content", region, kBytes / 2, seed);
  act::expect_zero("empty half", region + kBytes / 2, kBytes / 2);
  act::expect("advice", act::has_vm_flag(region, "hg"));
  MUST(mprotect(region + kHugePage + 4096, 4096, PROT_NONE));
  MUST(munmap(region + 3 * kHugePage, 4096));
  act::expect_filled("first huge page after splitting the second", region, kHugePage, seed);
  act::fill(region + kBytes / 2, kBytes / 2, seed + 1);
  act::expect_filled("written after restart", region + kBytes / 2, kBytes / 2, seed + 1);
  return act::finish();
}
