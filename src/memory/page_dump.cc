#include "memory/page_dump.h"

#include <algorithm>

#include "core/page.h"
#include "image/raw_sink.h"
#include "memory/page_scan.h"
#include "memory/page_source.h"
#include "memory/process_memory.h"

namespace vmckpt {
namespace {

constexpr uint64_t kPieceBytes = kMaxRecordBytes;

// Ranges of a process that stands still: what its page tables say is there.
class StillProcess : public PageSource {
 public:
  StillProcess(pid_t pid, PageScanner scanner, const std::vector<DumpRange>& ranges)
      : scanner_(std::move(scanner)), memory_(pid), ranges_(ranges) {}

  Result<void> expect_still_there() const { return memory_.expect_still_there(); }

  Result<void> find(const Take& take) override {
    for (const DumpRange& range : ranges_) VMCKPT_TRY(find_in(range, take));
    return {};
  }

  Result<void> read(const PagePiece& piece, uint8_t* content) override {
    using Memory = ProcessMemory;
    const auto readable = range_->readable ? Memory::Readable::kMaybe : Memory::Readable::kNo;
    const bool is_all = range_->pages == DumpRange::Pages::kAll;
    return memory_.read(piece, piece.address, content, readable,
                        is_all ? Memory::Unreadable::kZeros : Memory::Unreadable::kError);
  }

  uint64_t bytes_looked_at() const override { return looked_at_bytes_; }

  // Those that were met within the ranges.
  std::vector<GuardRegion> take_guards() { return std::move(guards_); }

 private:
  Result<void> find_in(const DumpRange& range, const Take& take) {
    take_ = &take;
    range_ = &range;
    looked_at_before_bytes_ = looked_at_bytes_;
    begin_piece(range.start);
    uint64_t next = range.start;  // below it, all is decided
    VMCKPT_TRY(scanner_.scan(range.start, range.end, [&](const PageSpan& span) -> Result<void> {
      const bool guard = span.kind == PageSpan::Kind::kGuard;
      if (guard) note_guard(span);
      if (range.pages == DumpRange::Pages::kGuards) return {};
      if (range.pages == DumpRange::Pages::kAll) VMCKPT_TRY(want(next, span.start));
      next = span.end;
      if (guard) return leave_out(span.start, span.end);
      // A page that was only read so far is zero, as is what lies under it, unless that is a file.
      if (span.kind == PageSpan::Kind::kZero && range.pages == DumpRange::Pages::kTouched) return {};
      return want(span.start, span.end);
    }));
    if (range.pages == DumpRange::Pages::kAll) VMCKPT_TRY(want(next, range.end));
    VMCKPT_TRY(end_piece());
    if (range.pages != DumpRange::Pages::kGuards) looked_at_bytes_ = looked_at_before_bytes_ + (range.end - range.start);
    return {};
  }

  void begin_piece(uint64_t address) {
    piece_ = {};
    piece_.address = address;
    piece_.bytes = std::min(range_->end, address / kPieceBytes * kPieceBytes + kPieceBytes) - address;
    piece_.exact = range_->pages == DumpRange::Pages::kModified;
  }

  uint64_t piece_end() const { return piece_.address + piece_.bytes; }

  // The piece that `address` is in becomes the present one.
  Result<void> go_to(uint64_t address) {
    if (address < piece_end()) return {};
    VMCKPT_TRY(end_piece());
    begin_piece(std::max(range_->start, address / kPieceBytes * kPieceBytes));
    return {};
  }

  Result<void> want(uint64_t start, uint64_t end) {
    while (start < end) {
      VMCKPT_TRY(go_to(start));
      const uint64_t stop = std::min(end, piece_end());
      for (; start < stop; start += kPageBytes) piece_.wanted.set((start - piece_.address) / kPageBytes);
    }
    return {};
  }

  // Pages that must not be covered by a run, not even as a gap of zeros between others.
  Result<void> leave_out(uint64_t start, uint64_t end) {
    if (start < piece_end()) piece_.exact = true;
    VMCKPT_TRY(go_to(end - kPageBytes));
    piece_.exact |= piece_.address < end;
    return {};
  }

  void note_guard(const PageSpan& span) {
    if (!guards_.empty() && guards_.back().end == span.start) guards_.back().end = span.end;
    else guards_.push_back({span.start, span.end});
  }

  Result<void> end_piece() {
    if (piece_.wanted.none()) return {};
    looked_at_bytes_ = looked_at_before_bytes_ + (piece_end() - range_->start);
    VMCKPT_TRY((*take_)(piece_));
    piece_.wanted.reset();
    return {};
  }

  PageScanner scanner_;
  ProcessMemory memory_;
  const std::vector<DumpRange>& ranges_;
  std::vector<GuardRegion> guards_;
  const Take* take_ = nullptr;
  const DumpRange* range_ = nullptr;
  uint64_t looked_at_bytes_ = 0;
  uint64_t looked_at_before_bytes_ = 0;  // the present range
  PagePiece piece_;  // that is being put together
};

}  // namespace

Result<std::vector<GuardRegion>> dump_pages(pid_t source, const std::vector<DumpRange>& ranges, ImageWriter& writer,
                                            DumpProgress& progress) {
  StillProcess process(source, VMCKPT_TRY(PageScanner::open(source)), ranges);
  RawSink sink(writer, RawSink::Writeback::kEarly);
  VMCKPT_TRY(copy_pages(process, sink, progress));
  // A scan of memory that has gone finds nothing, and no error: what was looked at is true if the memory is still there.
  VMCKPT_TRY(process.expect_still_there());
  return process.take_guards();
}

}  // namespace vmckpt
