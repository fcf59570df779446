#include "restart/guest_ram.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include <sys/mman.h>
#include <sys/syscall.h>

#include "core/kvm_api.h"
#include "core/page.h"
#include "image/one_process.h"
#include "modules/kvm.h"
#include "modules/seccomp.h"
#include "recorder/ledger.h"

namespace vmckpt {
namespace {

constexpr uint32_t kMostRanges = kRamRanges / 4;  // the rest is for what the program makes of them

// The process's memory as the image has it; false where the image has none.
bool read_saved(const ImageReader& image, uint64_t address, void* to, size_t bytes) {
  const auto read = image.pages().read(0, address, to, bytes);
  return read.ok() && *read;
}

// In the same library's memory as the ledger, a few pages of which were ever touched.
bool find_ram_ledger(const ImageReader& image, uint64_t ledger_address, RamLedger* saved) {
  constexpr uint64_t kNearBytes = 64u << 20;
  for (const PageRun& run : image.pages().runs_of(0)) {
    const uint64_t nearest = ledger_address > kNearBytes ? (ledger_address - kNearBytes) / kPageBytes * kPageBytes : 0;
    const uint64_t end = std::min(run.address + run.bytes, ledger_address + kNearBytes);
    for (uint64_t at = std::max(run.address, nearest); at < end; at += kPageBytes) {
      RamLedger head{};
      if (!read_saved(image, at, &head, offsetof(RamLedger, owner))) return false;
      if (head.magic != kRamLedgerMagic || head.self != at || head.bytes != sizeof head) continue;
      return read_saved(image, head.self, saved, sizeof *saved) && saved->ranges_used != 0 && saved->ranges_used <= kRamRanges;
    }
  }
  return false;
}

bool has_advice(const pb::Mapping& mapping, const char* flag) {
  return std::find(mapping.advice().begin(), mapping.advice().end(), flag) != mapping.advice().end();
}

uint32_t advice_of(const pb::Mapping& mapping) {
  static constexpr struct {
    const char* flag;
    RamAdvice bit;
  } kBits[] = {{"dc", kRamDontFork}, {"dd", kRamDontDump},  {"hg", kRamHuge},
               {"nh", kRamNoHuge},   {"mg", kRamMergeable}, {"nr", kRamNoReserve}};
  uint32_t bits = 0;
  for (const auto& [flag, bit] : kBits) bits |= has_advice(mapping, flag) ? bit : 0u;
  return bits;
}

std::vector<std::pair<uint64_t, uint64_t>> memory_slots(const pb::Kvm& kvm) {
  std::vector<std::pair<uint64_t, uint64_t>> slots;
  for (const pb::KvmRecord& record : kvm.records()) {
    if (record.request() != static_cast<uint32_t>(KVM_SET_USER_MEMORY_REGION) && record.request() != 0x40a0ae49 /* ..._REGION2 */)
      continue;
    kvm_userspace_memory_region slot{};
    std::memcpy(&slot, record.payload().data(), std::min(sizeof slot, record.payload().size()));
    slots.emplace_back(slot.userspace_addr, slot.userspace_addr + slot.memory_size);
  }
  return slots;
}

// What the recorder calls in place of a discard.
bool filters_allow(const pb::Image& image) {
  TapeDraft calls;
  constexpr uint64_t kAnywhere = 0x7f0000000000, kBytes = kPageBytes, kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
  for (uint64_t flags :
       {kFlags, kFlags | MAP_NORESERVE, kFlags & ~uint64_t{MAP_FIXED}, (kFlags & ~uint64_t{MAP_FIXED}) | MAP_NORESERVE}) {
    calls.call(SYS_mmap, {flags & MAP_FIXED ? kAnywhere : 0, kBytes, PROT_READ | PROT_WRITE, flags, ~uint64_t{0}, 0});
  }
  calls.call(SYS_mprotect, {kAnywhere, kBytes, PROT_READ});
  calls.call(SYS_mremap, {kAnywhere, kBytes, kBytes, MREMAP_MAYMOVE | MREMAP_FIXED, kAnywhere});
  calls.call(SYS_munmap, {kAnywhere, kBytes});
  calls.call(SYS_mlock2, {kAnywhere, kBytes, MLOCK_ONFAULT});
  for (int advice : {MADV_DONTNEED, MADV_DONTFORK, MADV_DONTDUMP, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_MERGEABLE}) {
    calls.call(SYS_madvise, {kAnywhere, kBytes, static_cast<uint64_t>(advice)});
  }
  const auto& threads = one_process(image).process.threads();
  return std::all_of(threads.begin(), threads.end(), [&](const pb::Thread& thread) {
    return check_tape_against_filters(thread, calls, TapeNeeds::kEveryCall).ok();
  });
}

bool covers(const std::vector<RamRange>& ranges, uint64_t start, uint64_t end) {  // `ranges` sorted
  for (const RamRange& range : ranges) {
    if (range.start > start) return false;
    if (range.end > start) start = range.end;
    if (start >= end) return true;
  }
  return false;
}

}  // namespace

GuestRam::GuestRam(const ImageReader& image) {
  const pb::Image& metadata = image.metadata();
  const uint64_t ledger_address = metadata.target().ledger_address();
  Ledger head{};
  if (ledger_address == 0 || !read_saved(image, ledger_address, &head, offsetof(Ledger, filters))) return;
  if (head.magic0 != kLedgerMagic0 || head.version != kLedgerVersion || head.bytes != sizeof(Ledger)) return;
  RamLedger saved{};
  if (!find_ram_ledger(image, ledger_address, &saved)) return;
  address_ = saved.self;
  std::vector<RamRange> seen(saved.ranges, saved.ranges + saved.ranges_used);
  std::sort(seen.begin(), seen.end(), [](const RamRange& a, const RamRange& b) { return a.start < b.start; });

  ledger_.magic = kRamLedgerMagic;
  ledger_.self = address_;
  ledger_.bytes = sizeof ledger_;
  ledger_.filters_checked = head.filters_used;
  auto note = [&](const RamRange& range) {
    if (ledger_.ranges_used < kMostRanges) ledger_.ranges[ledger_.ranges_used++] = range;
  };
  if (filters_allow(metadata)) {
    const auto slots = memory_slots(kvm_of(metadata));
    for (const pb::Mapping& mapping : one_process(metadata).memory.mappings()) {
      const uint64_t start = mapping.start(), end = mapping.end();
      if (mapping.kind() != pb::Mapping::ANONYMOUS || end - start < kRamRangeBytes ||
          mapping.protection() != (PROT_READ | PROT_WRITE))
        continue;
      if (has_advice(mapping, "gd") || has_advice(mapping, "wf") || has_advice(mapping, "lo")) continue;
      const bool is_slot = std::any_of(slots.begin(), slots.end(),
                                       [&](const auto& slot) { return slot.first < end && start < slot.second; });
      if (!is_slot && !has_advice(mapping, "dc")) continue;
      if (!covers(seen, start, end) || ledger_.ranges_used == kMostRanges) continue;
      mapped_.emplace_back(start, end);
      note({start, end, RamState::kImage, mapping.protection(), advice_of(mapping), 0});
      ++ledger_.images;
    }
  }
  // What else was seen stays so, around those: a range that finds no room is not vouched for next time.
  for (const RamRange& range : seen) {
    uint64_t at = range.start;
    for (const auto& [start, end] : mapped_) {
      if (end <= at || start >= range.end) continue;
      if (start > at) note({at, start, RamState::kSeen, 0, 0, 0});
      at = end;
    }
    if (at < range.end) note({at, range.end, RamState::kSeen, 0, 0, 0});
  }
}

bool GuestRam::is_mapped(const pb::Mapping& mapping) const {
  return std::find(mapped_.begin(), mapped_.end(), std::pair<uint64_t, uint64_t>(mapping.start(), mapping.end())) !=
         mapped_.end();
}

bool GuestRam::holds(uint64_t address) const {
  return std::any_of(mapped_.begin(), mapped_.end(),
                     [&](const auto& range) { return range.first <= address && address < range.second; });
}

void GuestRam::draft_ledger(TapeDraft& tape) const {
  if (address_ != 0) tape.call(kOpCopyBytes, {address_, tape.data_of(ledger_), sizeof ledger_});
}

}  // namespace vmckpt
