// Where pages go at a checkpoint. What reads pages (memory/page_source.h) knows nothing of how they are stored, and the reverse;
// between them stands one loop (memory/page_copy.h).
#pragma once

#include <bitset>
#include <cstdint>

#include "core/result.h"
#include "vmckpt/image_format.h"

namespace vmckpt {

constexpr size_t kMaxPiecePages = kMaxRecordBytes / kImagePageBytes;

// Pages of one object on their way into an image.
struct PagePiece {
  uint64_t object = 0;   // as in a PageRecord
  uint64_t address = 0;  // of the first page
  uint64_t bytes = 0;    // whole pages, at most kMaxRecordBytes
  // Exactly the wanted pages are to come back, those of zeros too, and none besides: something else than zeros lies under them (a
  // mapped file), or they must not be touched (a guard region). Without it pages of zeros may be left out or be added.
  bool exact = false;
  std::bitset<kMaxPiecePages> wanted;

  size_t pages() const { return bytes / kImagePageBytes; }
  // One past the last page of the span of wanted, or of not wanted, pages that begins with `page`.
  size_t end_of_span(size_t page) const {
    size_t end = page + 1;
    while (end < pages() && wanted[end] == wanted[page]) ++end;
    return end;
  }
};

class PageSink {
 public:
  virtual ~PageSink() = default;
  // `content` is the piece's, zeros where a page is not wanted, and good until this returns. Returns how many bytes were written.
  virtual Result<uint64_t> put(const PagePiece& piece, const uint8_t* content) = 0;
  // How many calls of put() there may be at the same time. One: pieces come in the order in which they were found.
  virtual size_t most_threads() const { return 1; }
};

}  // namespace vmckpt
