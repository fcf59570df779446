// 256 MiB of random data, every byte of which is checked; while the checkpoint is taken a thread rewrites a part of it
// so that every block is always whole: stamped at its start and its end with the same number.

#include <atomic>
#include <thread>

#include "act.h"

constexpr size_t kBytes = 256 << 20;
constexpr size_t kBlockBytes = 64 * 1024;
constexpr size_t kLiveBlocks = 64;

struct Block {
  std::atomic<uint64_t> begun;
  uint64_t body[kBlockBytes / 8 - 2];
  std::atomic<uint64_t> done;
};
static_assert(sizeof(Block) == kBlockBytes);

int main(int argc, char** argv) {
  act::begin(argc, argv);
  uint64_t seed = act::random_u64();
  void* region = MUST(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  act::fill(region, kBytes, seed);

  void* live = MUST(
      mmap(nullptr, kLiveBlocks * kBlockBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  auto* blocks = static_cast<Block*>(live);
  std::atomic<bool> over{false};
  std::atomic<uint64_t> rounds{0};
  std::thread writer([&] {
    for (uint64_t round = 1; !over; rounds = round++) {
      for (size_t i = 0; i < kLiveBlocks; i++) {
        // The block is whole between rounds: a reader in the same process checks what the last round left.
        act::expect_equal("block number of the round before", round - 1, blocks[i].done.load());
        if (round > 1) act::expect_filled("block of the round before", blocks[i].body, sizeof(Block::body), round - 1);
        blocks[i].begun = round;
        act::fill(blocks[i].body, sizeof blocks[i].body, round);
        blocks[i].done = round;
      }
      if (act::failures != 0) return;
    }
  });
  while (rounds < 2) act::sleep_ms(1);

  act::intermission();

  uint64_t seen = rounds;
  act::eventually("the writer goes on", [&] { return rounds > seen || act::failures != 0; });
  over = true;
  writer.join();
  act::expect_filled("random data", region, kBytes, seed);
  return act::finish();
}
