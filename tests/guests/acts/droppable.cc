// Memory mapped with MAP_DROPPABLE (Linux 6.11; glibc 2.41 keeps the state of getrandom in it): after a restart it is there, of
// the same kind, and empty or as it was. The kernel may take its content at any time.

#include "act.h"

constexpr int kDroppable = 0x08;  // MAP_DROPPABLE (include/uapi/linux/mman.h)
constexpr size_t kBytes = 64 * 4096;

int main(int argc, char** argv) {
  act::begin(argc, argv);
  auto* memory = static_cast<char*>(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, kDroppable | MAP_ANONYMOUS, -1, 0));
  if (memory == MAP_FAILED) act::skip("MAP_DROPPABLE (Linux 6.11)");
  uint64_t seed = act::random_u64();
  act::fill(memory, kBytes, seed);
  auto* read_only = static_cast<char*>(MUST(mmap(nullptr, kBytes, PROT_READ, kDroppable | MAP_ANONYMOUS, -1, 0)));
  // Beside ordinary memory, into which it must not be merged.
  auto* neighbour = static_cast<char*>(
      MUST(mmap(memory - kBytes, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
  act::fill(neighbour, kBytes, seed + 1);

  act::intermission();

  std::vector<uint64_t> expected(kBytes / 8);
  act::fill(expected.data(), kBytes, seed);
  for (size_t page = 0; page < kBytes / 4096; ++page) {
    const char* start = memory + page * 4096;
    static const char zeros[4096] = {};
    const bool kept = memcmp(start, expected.data() + page * 512, 4096) == 0, empty = memcmp(start, zeros, 4096) == 0;
    act::expect("page " + std::to_string(page) + " is as it was, or empty", kept || empty);
  }
  act::expect("it may still be dropped", act::has_vm_flag(memory, "dp"));
  act::expect("so may what can be read only", act::has_vm_flag(read_only, "dp"));
  act::expect_equal("permissions", std::string("r--p"), act::permissions_at(read_only));
  act::expect_filled("ordinary memory beside it", neighbour, kBytes, seed + 1);
  act::expect("which is not of that kind", !act::has_vm_flag(neighbour, "dp"));
  act::fill(memory, kBytes, seed + 2);
  act::expect_equal("first word that is written now", expected.size() != 0, true);
  act::expect_equal("a child finds it empty", 0, act::in_child([&] { return memory[0] != 0 || memory[kBytes - 1] != 0; }));
  return act::finish();
}
