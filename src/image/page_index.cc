#include "image/page_index.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <tuple>

#include <fcntl.h>

#include <xxhash.h>

namespace vmckpt {
namespace {

PageIndex::Size size_of_records(std::span<const PageRecord> records) {
  PageIndex::Size size;
  size.records = records.size();
  for (const PageRecord& record : records) {
    if (record.kind == PageKind::kData) size.bytes += record.bytes;
    size.stored_bytes += record.stored_bytes;
  }
  return size;
}

}  // namespace

std::vector<const PageRecord*> in_stored_order(std::span<const PageRecord> records) {
  std::vector<const PageRecord*> ordered;
  for (const PageRecord& record : records) {
    if (record.kind == PageKind::kData) ordered.push_back(&record);
  }
  auto place = [](const PageRecord* record) {
    return std::tuple(record->store, record->offset, record->object, record->address);
  };
  std::sort(ordered.begin(), ordered.end(), [&](auto* one, auto* other) { return place(one) < place(other); });
  return ordered;
}

std::span<const PageRecord> PageIndex::records_of(uint64_t object) const {
  struct ByObject {
    bool operator()(const PageRecord& record, uint64_t wanted) const { return record.object < wanted; }
    bool operator()(uint64_t wanted, const PageRecord& record) const { return wanted < record.object; }
  };
  const auto [first, last] = std::equal_range(records_.begin(), records_.end(), object, ByObject());
  return {first, last};
}

PageIndex::Size PageIndex::size() const { return size_of_records(records_); }

PageIndex::Size PageIndex::size_of(uint64_t object, uint64_t start, uint64_t end) const {
  auto before = [](const PageRecord& record, uint64_t wanted) { return record.address < wanted; };
  const std::span<const PageRecord> records = records_of(object);
  const auto first = std::lower_bound(records.begin(), records.end(), start, before);
  return size_of_records({first, std::lower_bound(first, records.end(), end, before)});
}

std::vector<PageRun> PageIndex::runs_of(uint64_t object) const {
  std::vector<PageRun> runs;
  for (const PageRecord& record : records_of(object)) {
    if (record.kind == PageKind::kAbsent) continue;
    const bool zero = record.kind == PageKind::kZero;
    if (!runs.empty() && runs.back().address + runs.back().bytes == record.address && runs.back().zero == zero &&
        (zero || runs.back().file_offset + runs.back().bytes == record.offset)) {
      runs.back().bytes += record.bytes;
    } else {
      runs.push_back({record.address, record.bytes, record.offset, zero});
    }
  }
  return runs;
}

// `from` is an offset in the pages' content, as all that follows.
Result<void> PageIndex::read_stored(const PageRecord& record, uint64_t from, void* to, uint64_t bytes) const {
  if (record.kind != PageKind::kData) {
    std::memset(to, 0, bytes);
    return {};
  }
  return pread_exactly(file_.get(), to, bytes, record.offset + from, path_);
}

Result<bool> PageIndex::read(uint64_t object, uint64_t address, void* to, uint64_t bytes) const {
  auto* const at = static_cast<uint8_t*>(to);
  const uint64_t end = address + bytes;
  const std::span<const PageRecord> records = records_of(object);
  auto next = std::upper_bound(records.begin(), records.end(), address, [](uint64_t wanted, const PageRecord& record) {
    return wanted < record.address + record.bytes;
  });
  bool any = false;
  uint64_t done = address;  // what is below it has its content
  for (; next != records.end() && next->address < end; ++next) {
    if (next->kind == PageKind::kAbsent) continue;
    const uint64_t from = std::max(address, next->address), to_end = std::min(end, next->address + next->bytes);
    std::memset(at + (done - address), 0, from - done);
    VMCKPT_TRY(read_stored(*next, from - next->address, at + (from - address), to_end - from));
    done = to_end;
    any = true;
  }
  std::memset(at + (done - address), 0, end - done);
  return any;
}

Result<void> PageIndex::read_all(uint64_t object, const Take& take) const {
  const std::span<const PageRecord> records = records_of(object);
  if (records.empty()) return {};
  auto buffer = std::make_unique_for_overwrite<uint8_t[]>(kMaxRecordBytes);
  for (const PageRecord& record : records) {
    if (record.kind == PageKind::kAbsent) continue;
    VMCKPT_TRY(read_stored(record, 0, buffer.get(), record.bytes));
    VMCKPT_TRY(take(record.address, buffer.get(), record.bytes));
  }
  return {};
}

Result<void> PageIndex::verify() const {
  ::posix_fadvise(file_.get(), 0, 0, POSIX_FADV_SEQUENTIAL);
  auto buffer = std::make_unique_for_overwrite<uint8_t[]>(kMaxRecordBytes);
  uint64_t verified_up_to = 0;
  for (const PageRecord* next : in_stored_order(records_)) {
    const PageRecord& record = *next;
    if (record.offset < verified_up_to) continue;  // the same as the one before: check_records()
    verified_up_to = record.offset + record.stored_bytes;
    VMCKPT_TRY(pread_exactly(file_.get(), buffer.get(), record.stored_bytes, record.offset, path_));
    if (XXH3_64bits(buffer.get(), record.stored_bytes) == record.stored_xxh3) continue;
    const std::string owner = record.object == 0 ? "memory" : fmt::format("captured file {}", record.object);
    return error(fmt::format("image {} is damaged: the checksum of {} {:#x}-{:#x} ({} bytes at file offset {}) is wrong", path_,
                             owner, record.address, record.address + record.bytes, record.stored_bytes, record.offset),
                 "use another image of this target");
  }
  return {};
}

}  // namespace vmckpt
