// Built twice, with AddressSanitizer and with ThreadSanitizer: programs that keep a shadow of the whole address space in mappings
// of many TiB, and whose runtime wants to be there before everything else.

#include <memory>
#include <thread>

#include "act.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

int main(int argc, char** argv) {
  act::begin(argc, argv);
  uint64_t seed = act::random_u64();
  std::vector<std::unique_ptr<uint64_t[]>> blocks;
  for (int i = 0; i < 200; ++i) {
    blocks.push_back(std::make_unique<uint64_t[]>(1000));
    act::fill(blocks.back().get(), 8000, seed + static_cast<uint64_t>(i));
  }
  auto* freed = new char[100];
  const volatile auto stale = reinterpret_cast<uintptr_t>(freed);
  delete[] freed;
  std::thread([&] { act::fill(blocks[0].get(), 8000, seed); }).join();

  act::intermission();

  for (size_t i = 0; i < blocks.size(); ++i) act::expect_filled("block " + std::to_string(i), blocks[i].get(), 8000, seed + i);
#if defined(__SANITIZE_ADDRESS__)
  act::expect("the shadow knows what was freed", __asan_address_is_poisoned(reinterpret_cast<void*>(stale)));
  act::expect("and what was not", !__asan_address_is_poisoned(blocks[7].get()));
  act::expect("and where a block ends", __asan_address_is_poisoned(blocks[7].get() + 1000));
#else
  (void)stale;
#endif
  std::thread([&] { act::fill(blocks[1].get(), 8000, seed); }).join();
  blocks.clear();
  return act::finish();
}
