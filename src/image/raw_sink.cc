#include "image/raw_sink.h"

#include <cstring>

#include <fcntl.h>

#include <xxhash.h>

#include "core/page.h"

namespace vmckpt {
namespace {

constexpr size_t kMaxGapPages = 16;
constexpr uint64_t kFlushBytes = 32u << 20;

bool is_zero_page(const uint8_t* page) {
  uint64_t first;
  std::memcpy(&first, page, sizeof first);
  return first == 0 && std::memcmp(page, page + sizeof first, kPageBytes - sizeof first) == 0;
}

// One run: reserved as a whole, its zero pages left as holes. Returns the bytes written.
Result<uint64_t> write_run(const PagePiece& piece, const uint8_t* content, const std::bitset<kMaxPiecePages>& zero, size_t start,
                           size_t end, ImageWriter& writer) {
  const uint64_t run_bytes = (end - start) * kPageBytes;
  const uint64_t file_offset = writer.reserve_pages(run_bytes);
  uint64_t written_bytes = 0;
  for (size_t i = start; i < end;) {
    if (zero[i]) {
      ++i;
      continue;
    }
    size_t span_end = i;
    while (span_end < end && !zero[span_end]) ++span_end;
    const uint64_t span_bytes = (span_end - i) * kPageBytes;
    VMCKPT_TRY(writer.write_pages(content + i * kPageBytes, span_bytes, file_offset + (i - start) * kPageBytes));
    written_bytes += span_bytes;
    i = span_end;
  }
  writer.add_record(plain_record(piece.object, piece.address + start * kPageBytes, run_bytes, file_offset,
                                 XXH3_64bits(content + start * kPageBytes, run_bytes)));
  return written_bytes;
}

// One past the last page of the run that begins with `start`.
size_t end_of_run(const PagePiece& piece, const std::bitset<kMaxPiecePages>& zero, size_t start) {
  if (piece.exact) return piece.end_of_span(start);
  size_t end = start + 1;
  for (size_t i = end; i < piece.pages() && i - end <= kMaxGapPages; ++i) {
    if (!zero[i]) end = i + 1;
  }
  return end;
}

}  // namespace

Result<uint64_t> RawSink::put(const PagePiece& piece, const uint8_t* content) {
  VMCKPT_CHECK(piece.bytes <= kMaxRecordBytes && piece.bytes % kPageBytes == 0);
  std::bitset<kMaxPiecePages> zero;
  for (size_t i = 0; i < piece.pages(); ++i) zero[i] = !piece.wanted[i] || is_zero_page(content + i * kPageBytes);
  uint64_t written_bytes = 0;
  for (size_t start = 0; start < piece.pages();) {
    if (piece.exact ? !piece.wanted[start] : zero[start]) {
      ++start;
      continue;
    }
    const size_t end = end_of_run(piece, zero, start);
    written_bytes += VMCKPT_TRY(write_run(piece, content, zero, start, end, writer_));
    start = end;
  }
  unflushed_bytes_ += written_bytes;
  if (writeback_ == Writeback::kEarly && unflushed_bytes_ >= kFlushBytes) {
    (void)::sync_file_range(writer_.fd(), 0, 0, SYNC_FILE_RANGE_WRITE);
    unflushed_bytes_ = 0;
  }
  return written_bytes;
}

}  // namespace vmckpt
