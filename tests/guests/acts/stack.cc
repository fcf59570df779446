// The main thread's stack keeps its deep frames and still grows down on demand, far below where it ended at the
// checkpoint.

#include "act.h"

constexpr size_t kFrameBytes = 16 * 1024;

[[gnu::noinline]] static uint64_t descend(int frames, uint64_t seed, bool rest_at_the_bottom) {
  alignas(8) volatile char frame[kFrameBytes];
  act::fill(const_cast<char*>(frame), kFrameBytes, seed);
  uint64_t below = 0;
  if (frames > 1) {
    below = descend(frames - 1, seed + 1, rest_at_the_bottom);
  } else if (rest_at_the_bottom) {
    act::intermission();
  }
  act::expect_filled("stack frame", const_cast<char*>(frame), kFrameBytes, seed);
  return below + static_cast<uint64_t>(static_cast<unsigned char>(frame[7]));
}

static size_t stack_bytes() {
  int here = 0;
  act::MapLine line = act::map_line_at(&here);
  return line.end - line.start;
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  uint64_t seed = act::random_u64();
  descend(32, seed, true);  // half a MiB

  act::expect_equal("name of the stack", std::string("[stack]"), act::map_line_at(&seed).name);
  size_t before = stack_bytes();
  descend(256, seed + 1000, false);  // 4 MiB
  act::expect("the stack has grown", stack_bytes() > before + (2 << 20));
  return act::finish();
}
