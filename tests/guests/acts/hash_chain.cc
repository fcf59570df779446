// A multi-threaded program under load whose whole history can be verified: each thread computes a chain of hashes from
// a random start, exchanges its head with a neighbour through a locked mailbox every thousand steps, and keeps the last
// links on the heap. In act three every chain is computed again from its start and its mail; the heads must agree.
// Prints the number of steps in the end. The first argument is the number of threads.

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

#include "act.h"

constexpr uint64_t kStepsPerLetter = 1000;

struct Chain {
  uint64_t start = 0, head = 0, steps = 0;
  std::vector<uint64_t> letters;                     // what was mixed in, in order
  std::vector<std::unique_ptr<uint64_t>> recent;     // a ring of heap blocks
  std::mutex mutex;
  std::condition_variable arrived;
  std::vector<uint64_t> mailbox;
};

static std::atomic<bool> over{false};

static uint64_t step(uint64_t head) {
  uint64_t seed = head ^ 0x5bf0'3635'dcd1'a2f7;
  return act::next_word(seed) + (head << 7 | head >> 57);
}

static void run(Chain& self, Chain& neighbour) {
  self.recent.resize(64);
  while (!over) {
    for (uint64_t i = 0; i < kStepsPerLetter; i++) {
      self.head = step(self.head);
      self.steps++;
      if (i % 100 == 0) self.recent[self.steps / 100 % 64] = std::make_unique<uint64_t>(self.head);
    }
    {
      std::lock_guard hold(neighbour.mutex);
      neighbour.mailbox.push_back(self.head);
    }
    neighbour.arrived.notify_one();
    std::unique_lock hold(self.mutex);
    self.arrived.wait_for(hold, std::chrono::milliseconds(1), [&] { return !self.mailbox.empty(); });
    uint64_t letter = 0;
    if (!self.mailbox.empty()) {
      letter = self.mailbox.back();
      self.mailbox.clear();
    }
    self.letters.push_back(letter);
    self.head ^= letter;
  }
}

static void verify(const std::string& name, const Chain& chain) {
  uint64_t head = chain.start, steps = 0;
  for (uint64_t letter : chain.letters) {
    for (uint64_t i = 0; i < kStepsPerLetter; i++) head = step(head);
    steps += kStepsPerLetter;
    head ^= letter;
  }
  act::expect_equal(name + ": steps", steps, chain.steps);
  act::expect_equal(name + ": head", head, chain.head);
  for (auto& link : chain.recent) act::expect(name + ": recent link", link == nullptr || *link != 0);
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  size_t count = act::args.empty() ? 4 : std::stoul(act::args[0]);
  std::vector<std::unique_ptr<Chain>> chains;
  for (size_t i = 0; i < count; i++) {
    chains.push_back(std::make_unique<Chain>());
    chains.back()->start = chains.back()->head = act::random_u64();
  }
  std::vector<std::thread> threads;
  for (size_t i = 0; i < count; i++) {
    threads.emplace_back(run, std::ref(*chains[i]), std::ref(*chains[(i + 1) % count]));
  }

  act::intermission();

  act::sleep_ms(50);  // more steps after the checkpoint
  over = true;
  for (std::thread& thread : threads) thread.join();
  uint64_t steps = 0;
  for (size_t i = 0; i < count; i++) {
    verify("chain " + std::to_string(i), *chains[i]);
    steps += chains[i]->steps;
  }
  std::printf("steps %lu\n", steps);
  return act::finish();
}
