// What the recorder knows about large memory of the program, so that restart may map guest RAM from the image instead of reading
// it.
//
// Memory that an image backs is not anonymous, however much it looks so: what is discarded comes back with the image's content,
// and it cannot grow. The recorder makes good the difference in the calls that it sees (ram_recorder.cc). It vouches for a range
// when it has seen the range made: by mmap(2) through libc. What libc maps for itself (malloc, stacks) it does not see, and the
// calls of libc itself that discard or move that neither, so such memory is never mapped from an image.
//
// Plain data of fixed layout in libvmckpt.so's memory, like the ledger (ledger.h), at the start of a page. The checkpoint saves
// it with the memory; restart finds it there by its head, decides (restart/guest_ram.h) and writes it anew.
#pragma once

#include <stdint.h>

namespace vmckpt {

constexpr uint32_t kRamRanges = 256;
constexpr uint64_t kRamRangeBytes = 16u << 20;  // smaller mappings are read quickly and need no vouching

enum class RamState : uint32_t {
  kNone = 0,
  kSeen = 1,   // anonymous; the recorder has seen it made and will see what becomes of it
  kImage = 2,  // mapped from an image: discards must be made good
};

enum RamAdvice : uint32_t {
  kRamDontFork = 1,
  kRamDontDump = 2,
  kRamHuge = 4,
  kRamNoHuge = 8,
  kRamMergeable = 16,
  kRamLocked = 32,
  kRamNoReserve = 64,
};

struct RamRange {
  uint64_t start;
  uint64_t end;
  RamState state;
  uint32_t protection;  // of image-backed ranges, as of now
  uint32_t advice;      // the same; RamAdvice
  uint32_t reserved;
};

constexpr uint64_t kRamLedgerMagic = 0x314d41524b434d56ull;

struct RamLedger {
  uint64_t magic;
  uint64_t self;   // own address: tells a copy from the one in use
  uint32_t bytes;  // sizeof(RamLedger): another version's is another size
  uint32_t ranges_used;
  uint64_t owner;            // of the lock: its thread pointer; 0: nobody
  uint32_t images;           // how many of them are image-backed
  uint32_t filters_checked;  // seccomp filters (Ledger::filters_used) that are known to allow what making good takes
  uint32_t small_discards;   // that have split a mapping
  uint32_t large_discards;
  RamRange ranges[kRamRanges];
};

}  // namespace vmckpt
