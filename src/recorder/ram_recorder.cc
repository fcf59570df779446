// The memory part of libvmckpt.so: keeps account of large anonymous mappings, and makes memory that a restart mapped from the
// image behave as anonymous memory (ram_ledger.h). The same rules as in recorder.cc; no lock is held across a system call.
//
//   discard (MADV_DONTNEED, MADV_FREE ...)   fresh anonymous memory is mapped over it, with the same protection and advice
//   mremap that moves or grows               it is made anonymous first, by copying what is not zero
//   mprotect, madvise, mlock                 are noted, for the two above
//   munmap, mmap over it                     it is forgotten
//
// Programs that were never restarted, and those whose memory was read, pay for a look at two counters.
#include <cstdarg>
#include <cstddef>

#include <linux/mman.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "core/page.h"
#include "recorder/ram_ledger.h"
#include "recorder/recorder.h"

// Newer than Debian 12's headers.
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#endif

namespace vmckpt {

alignas(4096) static RamLedger g_ram;

void open_ram_ledger() {
  g_ram.magic = kRamLedgerMagic;
  g_ram.self = reinterpret_cast<uint64_t>(&g_ram);
  g_ram.bytes = sizeof g_ram;
}

namespace {

// Each discard that is not next to the last one may split a mapping in three, and vm.max_map_count is 65,530, of which restart
// has taken up to 20,000 (restart/memory_plan.cc). Beyond these, what is discarded is filled with zeros.
constexpr uint32_t kMostSmallDiscards = 8'000, kMostLargeDiscards = 8'000;
constexpr uint64_t kSmallDiscardBytes = 2u << 20;

uint64_t page_up(uint64_t value) { return (value + kPageBytes - 1) & ~(kPageBytes - 1); }

// Held for some hundred instructions. A handler that interrupts its own thread in there goes on without it.
class RamLock {
 public:
  RamLock() {
    const uint64_t self = reinterpret_cast<uint64_t>(__builtin_thread_pointer());
    // Long enough for a holder that waits for its processor; one that is never seen again must not stop us for good.
    for (uint32_t tries = 0; tries < 100'000'000; ++tries) {
      uint64_t nobody = 0;
      held_ = __atomic_compare_exchange_n(&g_ram.owner, &nobody, self, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
      if (held_ || nobody == self) return;
      __builtin_ia32_pause();
    }
  }
  ~RamLock() {
    if (held_) __atomic_store_n(&g_ram.owner, 0, __ATOMIC_RELEASE);
  }

 private:
  bool held_ = false;
};

bool knows_ranges() { return __atomic_load_n(&g_ram.ranges_used, __ATOMIC_RELAXED) != 0; }
bool knows_images() { return __atomic_load_n(&g_ram.images, __ATOMIC_RELAXED) != 0; }

bool overlaps(const RamRange& range, uint64_t start, uint64_t end) { return range.start < end && start < range.end; }

void count_images() {
  uint32_t images = 0;
  for (uint32_t i = 0; i < g_ram.ranges_used; ++i) images += g_ram.ranges[i].state == RamState::kImage;
  __atomic_store_n(&g_ram.images, images, __ATOMIC_RELAXED);
}

void add_locked(const RamRange& range) {
  if (range.start >= range.end || g_ram.ranges_used == kRamRanges) return;  // the caller has looked for room
  for (uint32_t i = 0; i < g_ram.ranges_used; ++i) {
    RamRange& known = g_ram.ranges[i];
    const bool alike = known.state == range.state && known.protection == range.protection && known.advice == range.advice;
    if (alike && known.end == range.start) { known.end = range.end; return; }
    if (alike && known.start == range.end) { known.start = range.start; return; }
  }
  g_ram.ranges[g_ram.ranges_used++] = range;
}

// Cuts [start, end) out of what is known. Where a hole in the middle finds no room, all of a range that was only seen is
// forgotten.
void cut_locked(uint64_t start, uint64_t end) {
  for (uint32_t i = 0; i < g_ram.ranges_used;) {
    const RamRange range = g_ram.ranges[i];
    if (!overlaps(range, start, end)) {
      ++i;
      continue;
    }
    g_ram.ranges[i] = g_ram.ranges[--g_ram.ranges_used];
    RamRange below = range, above = range;
    below.end = start;
    above.start = end;
    const uint32_t pieces = (below.start < below.end) + (above.start < above.end);
    if (g_ram.ranges_used + pieces > kRamRanges) continue;
    // They lie outside of [start, end): appended, they are met again and passed over.
    if (below.start < below.end) g_ram.ranges[g_ram.ranges_used++] = below;
    if (above.start < above.end) g_ram.ranges[g_ram.ranges_used++] = above;
  }
}

void set_range(uint64_t start, uint64_t end, RamState state) {
  LedgerUpdate update;
  RamLock lock;
  cut_locked(start, end);
  if (state != RamState::kNone) add_locked({start, end, state, 0, 0, 0});
  count_images();
}

// The part of [at, end) that begins at `at` and lies in one range, or in none (state kNone).
RamRange piece_at(uint64_t at, uint64_t end) {
  RamLock lock;
  RamRange piece{at, end, RamState::kNone, 0, 0, 0};
  for (uint32_t i = 0; i < g_ram.ranges_used; ++i) {
    const RamRange& range = g_ram.ranges[i];
    if (range.start <= at && at < range.end) {
      piece = range;
      piece.start = at;
      piece.end = range.end < end ? range.end : end;
      return piece;
    }
    if (range.start > at && range.start < piece.end) piece.end = range.start;
  }
  return piece;
}

bool touches_image(uint64_t start, uint64_t end) {
  if (!knows_images()) return false;
  RamLock lock;
  for (uint32_t i = 0; i < g_ram.ranges_used; ++i) {
    if (g_ram.ranges[i].state == RamState::kImage && overlaps(g_ram.ranges[i], start, end)) return true;
  }
  return false;
}

bool is_covered(uint64_t start, uint64_t end) {
  while (start < end) {
    const RamRange piece = piece_at(start, end);
    if (piece.state == RamState::kNone) return false;
    start = piece.end;
  }
  return true;
}

// Whether [start, end) can be cut out with room for its pieces; the kernel answers ENOMEM when it has no room for mappings.
bool has_room() { return g_ram.ranges_used + 4 <= kRamRanges; }

// ---- making good ---------------------------------------------------------------------------------------------------

long raw_mmap(uint64_t address, uint64_t bytes, uint32_t protection, int flags) {
  return raw_call(SYS_mmap, static_cast<long>(address), static_cast<long>(bytes), static_cast<long>(protection),
                  MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
}

long raw_madvise(uint64_t address, uint64_t bytes, int advice) {
  return raw_call(SYS_madvise, static_cast<long>(address), static_cast<long>(bytes), advice);
}

void advise_again(const RamRange& piece) {
  static constexpr struct {
    uint32_t bit;
    int advice;
  } kAdvice[] = {{kRamDontFork, MADV_DONTFORK}, {kRamDontDump, MADV_DONTDUMP},   {kRamHuge, MADV_HUGEPAGE},
                 {kRamNoHuge, MADV_NOHUGEPAGE}, {kRamMergeable, MADV_MERGEABLE}};
  for (const auto& [bit, advice] : kAdvice) {
    if (piece.advice & bit) raw_madvise(piece.start, piece.end - piece.start, advice);
  }
  if (piece.advice & kRamLocked) {
    raw_call(SYS_mlock2, static_cast<long>(piece.start), static_cast<long>(piece.end - piece.start), MLOCK_ONFAULT);
  }
}

// A system call filter that came later may not know the calls that it takes.
bool may_call() { return g_ledger.filters_used == g_ram.filters_checked; }

// Pages one by one, as balloons discard them, fray the mapping; those next to the last one do not.
bool may_split(const RamRange& piece) {
  static uint64_t last_start, last_end;
  const uint64_t before = __atomic_exchange_n(&last_start, piece.start, __ATOMIC_RELAXED);
  const uint64_t behind = __atomic_exchange_n(&last_end, piece.end, __ATOMIC_RELAXED);
  if (piece.end == before || piece.start == behind) return true;
  const bool small = piece.end - piece.start < kSmallDiscardBytes;
  uint32_t& count = small ? g_ram.small_discards : g_ram.large_discards;
  return __atomic_fetch_add(&count, 1, __ATOMIC_RELAXED) < (small ? kMostSmallDiscards : kMostLargeDiscards);
}

// The content goes, the memory stays what it is to the program.
long discard(const RamRange& piece) {
  const uint64_t bytes = piece.end - piece.start;
  if (may_call() && may_split(piece)) {
    const int flags = MAP_FIXED | (piece.advice & kRamNoReserve ? MAP_NORESERVE : 0);
    if (raw_mmap(piece.start, bytes, piece.protection, flags) >= 0) {
      advise_again(piece);
      return 0;
    }
  }
  // Zeros in place: the program sees the same, though nothing is given back.
  if (!(piece.protection & PROT_WRITE)) return -ENOMEM;
  void* to = reinterpret_cast<void*>(piece.start);
  uint64_t count = bytes;
  asm volatile("rep stosb" : "+D"(to), "+c"(count) : "a"(0) : "memory");
  return 0;
}

bool is_zero(const uint64_t* page) {
  for (size_t i = 0; i < kPageBytes / sizeof *page; ++i) {
    if (page[i] != 0) return false;
  }
  return true;
}

// A copy is made aside and takes the place of the old pages at once.
long make_piece_anonymous(const RamRange& piece) {
  const uint64_t bytes = piece.end - piece.start;
  if (!may_call()) return -ENOMEM;
  const int flags = piece.advice & kRamNoReserve ? MAP_NORESERVE : 0;
  const long copy = raw_mmap(0, bytes, PROT_READ | PROT_WRITE, flags);
  if (copy < 0) return -ENOMEM;
  if (piece.advice & kRamHuge) raw_madvise(static_cast<uint64_t>(copy), bytes, MADV_HUGEPAGE);
  if (!(piece.protection & PROT_READ))
    raw_call(SYS_mprotect, static_cast<long>(piece.start), static_cast<long>(bytes), PROT_READ);
  for (uint64_t at = 0; at < bytes; at += kPageBytes) {
    const auto* from = reinterpret_cast<const uint64_t*>(piece.start + at);
    if (!is_zero(from)) __builtin_memcpy(reinterpret_cast<void*>(static_cast<uint64_t>(copy) + at), from, kPageBytes);
  }
  if (piece.protection != (PROT_READ | PROT_WRITE)) raw_call(SYS_mprotect, copy, static_cast<long>(bytes), piece.protection);
  const long moved = raw_call(SYS_mremap, copy, static_cast<long>(bytes), static_cast<long>(bytes), MREMAP_MAYMOVE | MREMAP_FIXED,
                              static_cast<long>(piece.start));
  if (moved < 0) {
    raw_call(SYS_munmap, copy, static_cast<long>(bytes));
    return -ENOMEM;
  }
  advise_again(piece);
  set_range(piece.start, piece.end, RamState::kSeen);
  return 0;
}

template <class Action>
long for_image_pieces(uint64_t start, uint64_t end, Action action) {
  while (start < end) {
    const RamRange piece = piece_at(start, end);
    if (piece.state == RamState::kImage) {
      if (!has_room()) return -ENOMEM;
      if (const long result = action(piece); result < 0) return result;
    }
    start = piece.end;
  }
  return 0;
}

long discard_all(uint64_t start, uint64_t end, int advice) {
  long outcome = 0;
  while (start < end) {
    const RamRange piece = piece_at(start, end);
    long result;
    if (piece.state != RamState::kImage) {
      result = raw_madvise(start, piece.end - start, advice);
    } else if ((piece.advice & kRamLocked) && advice != MADV_DONTNEED_LOCKED) {
      result = -EINVAL;
    } else {
      result = discard(piece);
    }
    // As in the kernel: a hole is told at the end, anything else at once.
    if (result == -ENOMEM) outcome = result;
    else if (result < 0) return result;
    start = piece.end;
  }
  return outcome;
}

// Notes what a call has changed of image-backed ranges.
template <class Change>
void change_ranges(uint64_t start, uint64_t end, Change change) {
  RamLock lock;
  // Each known range is looked at once; what is cut goes to the end of the list, outside of [start, end) or changed already.
  const uint32_t known = g_ram.ranges_used;
  for (uint32_t i = 0; i < known; ++i) {
    RamRange& range = g_ram.ranges[i];
    if (range.state != RamState::kImage || !overlaps(range, start, end)) continue;
    const RamRange whole = range;
    range.start = whole.start < start ? start : whole.start;
    range.end = whole.end > end ? end : whole.end;
    change(range);
    RamRange below = whole, above = whole;
    below.end = range.start;
    above.start = range.end;
    if (below.start < below.end && g_ram.ranges_used < kRamRanges) g_ram.ranges[g_ram.ranges_used++] = below;
    if (above.start < above.end && g_ram.ranges_used < kRamRanges) g_ram.ranges[g_ram.ranges_used++] = above;
  }
}

struct AdviceChange {
  int advice;
  uint32_t set;
  uint32_t clear;
};
constexpr AdviceChange kAdviceChanges[] = {
    {MADV_DONTFORK, kRamDontFork, 0},        {MADV_DOFORK, 0, kRamDontFork},
    {MADV_DONTDUMP, kRamDontDump, 0},        {MADV_DODUMP, 0, kRamDontDump},
    {MADV_HUGEPAGE, kRamHuge, kRamNoHuge},   {MADV_NOHUGEPAGE, kRamNoHuge, kRamHuge},
    {MADV_MERGEABLE, kRamMergeable, 0},      {MADV_UNMERGEABLE, 0, kRamMergeable},
};

long advise_image(uint64_t start, uint64_t end, int advice) {
  auto real = [&] { return raw_madvise(start, end - start, advice); };
  auto anonymous = [](const RamRange& piece) { return make_piece_anonymous(piece); };
  switch (advice) {
    case MADV_DONTNEED:
    case MADV_DONTNEED_LOCKED:
    case MADV_FREE: return discard_all(start, end, advice);
    case MADV_REMOVE: return -EINVAL;  // of private memory
    case MADV_WIPEONFORK:
      if (const long result = for_image_pieces(start, end, anonymous); result < 0) return result;
      return real();
    case MADV_GUARD_INSTALL: {
      // What it covers is discarded.
      auto fresh = [](const RamRange& piece) {
        if (const long result = discard(piece); result < 0) return result;
        set_range(piece.start, piece.end, RamState::kSeen);
        return 0L;
      };
      if (const long result = for_image_pieces(start, end, fresh); result < 0) return result;
      return real();
    }
    default: break;
  }
  for (const AdviceChange& row : kAdviceChanges) {
    if (row.advice != advice) continue;
    if (!has_room()) return -ENOMEM;
    const long result = real();
    if (result >= 0) {
      change_ranges(start, end, [&](RamRange& range) { range.advice = (range.advice & ~row.clear) | row.set; });
    }
    return result;
  }
  return real();
}

bool changes_content(int advice) {
  return advice == MADV_DONTNEED || advice == MADV_DONTNEED_LOCKED || advice == MADV_FREE || advice == MADV_GUARD_INSTALL;
}

long lock_memory(long number, uint64_t address, uint64_t bytes, long flags, bool locked) {
  const uint64_t start = address & ~(kPageBytes - 1), end = page_up(address + bytes);
  if (touches_image(start, end) && !has_room()) return -ENOMEM;
  const long result = raw_call(number, static_cast<long>(address), static_cast<long>(bytes), flags);
  // What a checkpoint has read of mappings before the freeze may be out of date.
  __atomic_add_fetch(&g_ledger.madvise_generation, 1, __ATOMIC_RELEASE);
  if (result >= 0 && touches_image(start, end)) {
    LedgerUpdate update;
    change_ranges(start, end, [&](RamRange& range) {
      range.advice = locked ? range.advice | kRamLocked : range.advice & ~static_cast<uint32_t>(kRamLocked);
    });
  }
  return result;
}

}  // namespace

// A child has no memory that was not to be forked, and no thread that holds the lock.
void forget_ram_lock() {
  __atomic_store_n(&g_ram.owner, 0, __ATOMIC_RELEASE);
  for (uint32_t i = 0; i < g_ram.ranges_used;) {
    if (g_ram.ranges[i].state == RamState::kImage && (g_ram.ranges[i].advice & kRamDontFork)) {
      g_ram.ranges[i] = g_ram.ranges[--g_ram.ranges_used];
    } else {
      ++i;
    }
  }
  count_images();
}

void note_lock_of_all(bool locked) {
  __atomic_add_fetch(&g_ledger.madvise_generation, 1, __ATOMIC_RELEASE);
  if (!knows_images()) return;
  LedgerUpdate update;
  change_ranges(0, ~uint64_t{0}, [&](RamRange& range) {
    range.advice = locked ? range.advice | kRamLocked : range.advice & ~static_cast<uint32_t>(kRamLocked);
  });
}

void note_ram_mapping(long address, uint64_t bytes, int flags) {
  if (address < 0 && address >= -4095) return;
  const bool anonymous = (flags & MAP_ANONYMOUS) && (flags & MAP_TYPE) == MAP_PRIVATE && !(flags & MAP_GROWSDOWN);
  if (!knows_ranges() && !(anonymous && bytes >= kRamRangeBytes)) return;
  const uint64_t start = static_cast<uint64_t>(address), end = start + page_up(bytes);
  const bool seen = anonymous && (bytes >= kRamRangeBytes || is_covered(start, end));
  set_range(start, end, seen ? RamState::kSeen : RamState::kNone);
}

long ram_madvise(uint64_t address, uint64_t bytes, int advice) {
  const uint64_t end = page_up(address + bytes);
  if (address % kPageBytes != 0 || end <= address) return raw_madvise(address, bytes, advice);
  if (!touches_image(address, end)) {
    const long result = raw_madvise(address, bytes, advice);
    // Looked at again: between the two a checkpoint may lie, and behind it another life, in which an image backs the range.
    if (result < 0 || !changes_content(advice) || !touches_image(address, end)) return result;
  }
  LedgerUpdate update;
  return advise_image(address, end, advice);
}

bool ram_has_room_for_mapping(uint64_t address, uint64_t bytes, int flags) {
  return !(flags & MAP_FIXED) || !touches_image(address, page_up(address + bytes)) || has_room();
}

long ram_munmap(uint64_t address, uint64_t bytes) {
  const uint64_t end = page_up(address + bytes);
  if (touches_image(address, end) && !has_room()) return -ENOMEM;
  const long result = raw_call(SYS_munmap, static_cast<long>(address), static_cast<long>(bytes));
  if (result >= 0 && knows_ranges()) set_range(address, end, RamState::kNone);
  return result;
}

long ram_mprotect(long number, uint64_t address, uint64_t bytes, long protection, long key) {
  const uint64_t end = page_up(address + bytes);
  const bool image = touches_image(address, end);
  if (image && !has_room()) return -ENOMEM;
  const long result = raw_call(number, static_cast<long>(address), static_cast<long>(bytes), protection, key);
  if (result < 0 || !image) return result;
  LedgerUpdate update;
  change_ranges(address, end, [&](RamRange& range) { range.protection = static_cast<uint32_t>(protection) & 7; });
  return result;
}

long ram_mremap(uint64_t old, uint64_t bytes, uint64_t wanted, int flags, uint64_t to) {
  auto real = [&] {
    return raw_call(SYS_mremap, static_cast<long>(old), static_cast<long>(bytes), static_cast<long>(wanted), flags,
                    static_cast<long>(to));
  };
  if (!knows_ranges()) return real();
  const uint64_t old_end = old + page_up(bytes), new_bytes = page_up(wanted);
  const bool fixed = (flags & MREMAP_FIXED) != 0, stays = (flags & MREMAP_DONTUNMAP) != 0;
  const bool only_shrinks = new_bytes <= page_up(bytes) && !fixed && !stays;
  if ((touches_image(old, old_end) || (fixed && touches_image(to, to + new_bytes))) && !has_room()) return -ENOMEM;
  if (!only_shrinks && touches_image(old, old_end)) {
    LedgerUpdate update;
    const long made = for_image_pieces(old, old_end, [](const RamRange& piece) { return make_piece_anonymous(piece); });
    if (made < 0) return made;
  }
  const bool covered = bytes != 0 && is_covered(old, old_end);
  const long result = real();
  if (result < 0 && result >= -4095) return result;
  const uint64_t start = static_cast<uint64_t>(result);
  if (only_shrinks && start == old) {
    set_range(old + new_bytes, old_end, RamState::kNone);
    return result;
  }
  if (start != old && bytes != 0 && !stays) set_range(old, old_end, RamState::kNone);
  set_range(start, start + new_bytes, covered ? RamState::kSeen : RamState::kNone);
  return result;
}

long ram_mlock(uint64_t address, uint64_t bytes) { return lock_memory(SYS_mlock, address, bytes, 0, true); }
long ram_mlock2(uint64_t address, uint64_t bytes, unsigned int flags) {
  return lock_memory(SYS_mlock2, address, bytes, flags, true);
}
long ram_munlock(uint64_t address, uint64_t bytes) { return lock_memory(SYS_munlock, address, bytes, 0, false); }

long ram_process_madvise(long pidfd, const iovec* parts, uint64_t count, int advice, unsigned long flags) {
  bool image = false;
  // A bad list is for the kernel to find.
  for (uint64_t i = 0; knows_images() && changes_content(advice) && count <= 1024 && i < count && !image; ++i) {
    const uint64_t start = reinterpret_cast<uint64_t>(parts[i].iov_base);
    image = touches_image(start, page_up(start + parts[i].iov_len));
  }
  auto real = [&](const iovec* list, uint64_t length) {
    return raw_call(SYS_process_madvise, pidfd, reinterpret_cast<long>(list), static_cast<long>(length), advice,
                    static_cast<long>(flags));
  };
  // Such advice is for one's own memory only (Linux 6.13): a list of nothing tells whether this is.
  if (!image || real(parts, 0) < 0) return real(parts, count);
  long done = 0;
  for (uint64_t i = 0; i < count; ++i) {
    const long result = ram_madvise(reinterpret_cast<uint64_t>(parts[i].iov_base), parts[i].iov_len, advice);
    if (result < 0) return done != 0 ? done : result;
    done += static_cast<long>(parts[i].iov_len);
  }
  return done;
}

}  // namespace vmckpt

using namespace vmckpt;

#define WRAPPER extern "C" __attribute__((visibility("default")))

static uint64_t number_of(const void* address) { return reinterpret_cast<uint64_t>(address); }

WRAPPER int madvise(void* address, size_t bytes, int advice) noexcept {
  const long result = ram_madvise(number_of(address), bytes, advice);
  __atomic_add_fetch(&g_ledger.madvise_generation, 1, __ATOMIC_RELEASE);
  return static_cast<int>(libc_result(result));
}

WRAPPER int munmap(void* address, size_t bytes) noexcept {
  return static_cast<int>(libc_result(ram_munmap(number_of(address), bytes)));
}

WRAPPER int mprotect(void* address, size_t bytes, int protection) noexcept {
  return static_cast<int>(libc_result(ram_mprotect(SYS_mprotect, number_of(address), bytes, protection, 0)));
}

WRAPPER int pkey_mprotect(void* address, size_t bytes, int protection, int key) noexcept {
  if (key == -1) return mprotect(address, bytes, protection);  // as libc does
  return static_cast<int>(libc_result(ram_mprotect(SYS_pkey_mprotect, number_of(address), bytes, protection, key)));
}

WRAPPER void* mremap(void* old, size_t bytes, size_t wanted, int flags, ...) noexcept {
  va_list list;
  va_start(list, flags);
  void* to = flags & (MREMAP_FIXED | MREMAP_DONTUNMAP) ? va_arg(list, void*) : nullptr;
  va_end(list);
  return reinterpret_cast<void*>(libc_result(ram_mremap(number_of(old), bytes, wanted, flags, number_of(to))));
}

WRAPPER int mlock(const void* address, size_t bytes) noexcept {
  return static_cast<int>(libc_result(ram_mlock(number_of(address), bytes)));
}

WRAPPER int mlock2(const void* address, size_t bytes, unsigned int flags) noexcept {
  // As libc does: without flags it is mlock.
  return flags == 0 ? mlock(address, bytes) : static_cast<int>(libc_result(ram_mlock2(number_of(address), bytes, flags)));
}

WRAPPER int munlock(const void* address, size_t bytes) noexcept {
  return static_cast<int>(libc_result(ram_munlock(number_of(address), bytes)));
}

WRAPPER ssize_t process_madvise(int pidfd, const iovec* parts, size_t count, int advice, unsigned int flags) noexcept {
  const long result = ram_process_madvise(pidfd, parts, count, advice, flags);
  __atomic_add_fetch(&g_ledger.madvise_generation, 1, __ATOMIC_RELEASE);
  return libc_result(result);
}

// The same calls made through syscall(2).
namespace vmckpt {
bool ram_call(long number, const long (&a)[6], long* result) {
  const auto u = [&](int i) { return static_cast<uint64_t>(a[i]); };
  switch (number) {
    case SYS_mmap:
      if (!ram_has_room_for_mapping(u(0), u(1), static_cast<int>(a[3]))) {
        *result = -ENOMEM;
        return true;
      }
      *result = raw_call(SYS_mmap, a[0], a[1], a[2], a[3], a[4], a[5]);
      note_ram_mapping(*result, u(1), static_cast<int>(a[3]));
      return true;
    case SYS_madvise: *result = ram_madvise(u(0), u(1), static_cast<int>(a[2])); return true;
    case SYS_munmap: *result = ram_munmap(u(0), u(1)); return true;
    case SYS_mprotect: *result = ram_mprotect(SYS_mprotect, u(0), u(1), a[2], 0); return true;
    case SYS_pkey_mprotect: *result = ram_mprotect(SYS_pkey_mprotect, u(0), u(1), a[2], a[3]); return true;
    case SYS_mremap: *result = ram_mremap(u(0), u(1), u(2), static_cast<int>(a[3]), u(4)); return true;
    case SYS_mlock: *result = ram_mlock(u(0), u(1)); return true;
    case SYS_mlock2: *result = ram_mlock2(u(0), u(1), static_cast<unsigned int>(a[2])); return true;
    case SYS_munlock: *result = ram_munlock(u(0), u(1)); return true;
    case SYS_process_madvise:
      *result = ram_process_madvise(a[0], reinterpret_cast<const iovec*>(a[1]), u(2), static_cast<int>(a[3]),
                                    static_cast<unsigned long>(a[4]));
      return true;
    default: return false;
  }
}
}  // namespace vmckpt
