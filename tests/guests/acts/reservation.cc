// 16 TiB of address space that is only reserved, as sanitizers, JVMs and databases do, with a few pages in it far apart.

#include "act.h"

constexpr size_t kBytes = size_t{16} << 40, kPage = 4096;

int main(int argc, char** argv) {
  act::begin(argc, argv);
  auto* start = static_cast<char*>(
      mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (start == MAP_FAILED) act::skip("16 TiB of address space (ulimit -v, vm.overcommit_memory)");
  auto* untouched = static_cast<char*>(
      MUST(mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));
  uint64_t seed = act::random_u64();
  const size_t offsets[] = {0, kPage * 511, (size_t{1} << 30) - kPage, size_t{1} << 30, size_t{5} << 40, kBytes - kPage};
  for (size_t offset : offsets) act::fill(start + offset, kPage, seed + offset);

  act::intermission();

  for (size_t offset : offsets)
    act::expect_filled("page at offset " + std::to_string(offset), start + offset, kPage, seed + offset);
  act::expect_zero("page between them", start + (size_t{3} << 40), kPage);
  act::expect_equal("permissions", std::string("rw-p"), act::permissions_at(start + (size_t{7} << 40)));
  act::expect_equal("permissions of the other reservation", std::string("---p"), act::permissions_at(untouched));
  MUST(mprotect(untouched + (size_t{9} << 40), kPage, PROT_READ | PROT_WRITE));
  act::fill(untouched + (size_t{9} << 40), kPage, seed);
  return act::finish();
}
