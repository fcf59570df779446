// The program break: its content, its place, and that it grows (and shrinks) where it left off.

#include "act.h"

constexpr intptr_t kStep = 1 << 20;

static char* grow(intptr_t bytes) {
  void* old = sbrk(bytes);
  return static_cast<char*>(old == reinterpret_cast<void*>(-1) ? nullptr : old);
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  uint64_t seed = act::random_u64();
  char* first = grow(kStep);
  act::expect("sbrk before", first != nullptr);
  first = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(first) + 7) & ~uintptr_t{7});
  act::fill(first, kStep - 8, seed);
  char* end = grow(0);

  act::intermission();

  act::expect_equal("program break", end, grow(0));
  char* second = grow(kStep);
  if (act::expect_equal("start of the growth", end, second)) {
    act::fill(first, 2 * kStep - 8, seed + 1);
    act::expect_filled("both parts", first, 2 * kStep - 8, seed + 1);
    act::expect_equal("name of the mapping", std::string("[heap]"), act::map_line_at(second + kStep - 1).name);
  }
  for (int round = 0; round < 20; round++) act::expect("sbrk goes on", grow(kStep) != nullptr);
  act::expect("sbrk shrinks", grow(-20 * kStep) != nullptr);
  act::expect_equal("break after shrinking", end + kStep, grow(0));

  std::vector<char*> blocks;  // malloc's main arena lives there too
  for (int i = 0; i < 1000; i++) blocks.push_back(new char[3000]);
  for (char* block : blocks) delete[] block;
  return act::finish();
}
