#include "image/page_runs.h"

#include <cstring>

#include <xxhash.h>

namespace vmckpt {
namespace {

constexpr uint64_t kPageBytes = kImagePageBytes;
constexpr size_t kMaxPages = kMaxRecordBytes / kPageBytes;
constexpr size_t kMaxGapPages = 16;

bool is_zero_page(const uint8_t* page) {
  uint64_t first;
  std::memcpy(&first, page, sizeof first);
  return first == 0 && std::memcmp(page, page + sizeof first, kPageBytes - sizeof first) == 0;
}

struct Pages {
  const uint8_t* buffer;
  uint64_t object;
  uint64_t address;  // of the first page
  const bool* zero;
};

// One run: reserved as a whole, its zero pages left as holes. Returns the bytes written.
Result<uint64_t> write_run(const Pages& pages, size_t start, size_t end, ImageWriter& writer) {
  const uint64_t run_bytes = (end - start) * kPageBytes;
  const uint64_t file_offset = writer.reserve_pages(run_bytes);
  uint64_t written_bytes = 0;
  for (size_t i = start; i < end;) {
    if (pages.zero[i]) {
      ++i;
      continue;
    }
    size_t span_end = i;
    while (span_end < end && !pages.zero[span_end]) ++span_end;
    const uint64_t span_bytes = (span_end - i) * kPageBytes;
    VMCKPT_TRY(writer.write_pages(pages.buffer + i * kPageBytes, span_bytes, file_offset + (i - start) * kPageBytes));
    written_bytes += span_bytes;
    i = span_end;
  }
  writer.add_record(plain_record(pages.object, pages.address + start * kPageBytes, run_bytes, file_offset,
                                 XXH3_64bits(pages.buffer + start * kPageBytes, run_bytes)));
  return written_bytes;
}

}  // namespace

Result<uint64_t> write_runs(const uint8_t* buffer, uint64_t bytes, uint64_t object, uint64_t address, ImageWriter& writer) {
  VMCKPT_CHECK(bytes <= kMaxRecordBytes && bytes % kPageBytes == 0);
  const size_t count = bytes / kPageBytes;
  bool zero[kMaxPages];
  for (size_t i = 0; i < count; ++i) zero[i] = is_zero_page(buffer + i * kPageBytes);
  uint64_t written_bytes = 0;
  for (size_t start = 0; start < count;) {
    if (zero[start]) {
      ++start;
      continue;
    }
    size_t end = start + 1;  // one past the run's last page that is not zero
    for (size_t i = end; i < count && i - end <= kMaxGapPages; ++i) {
      if (!zero[i]) end = i + 1;
    }
    written_bytes += VMCKPT_TRY(write_run({buffer, object, address, zero}, start, end, writer));
    start = end;
  }
  return written_bytes;
}

Result<uint64_t> write_marked_runs(const uint8_t* buffer, uint64_t bytes, const bool* wanted, uint64_t object,
                                   uint64_t address, ImageWriter& writer) {
  VMCKPT_CHECK(bytes <= kMaxRecordBytes && bytes % kPageBytes == 0);
  const size_t count = bytes / kPageBytes;
  bool zero[kMaxPages];
  for (size_t i = 0; i < count; ++i) zero[i] = is_zero_page(buffer + i * kPageBytes);
  uint64_t written_bytes = 0;
  for (size_t start = 0; start < count;) {
    size_t end = start;
    while (end < count && wanted[end]) ++end;
    if (end > start) written_bytes += VMCKPT_TRY(write_run({buffer, object, address, zero}, start, end, writer));
    start = end + 1;
  }
  return written_bytes;
}

}  // namespace vmckpt
