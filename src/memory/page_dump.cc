#include "memory/page_dump.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

#include <fcntl.h>
#include <sys/uio.h>

#include "core/fd.h"
#include "image/page_runs.h"
#include "memory/page_scan.h"

namespace vmckpt {
namespace {

constexpr uint64_t kPageBytes = kImagePageBytes;
constexpr uint64_t kChunkBytes = kMaxRecordBytes;
constexpr size_t kChunkPages = kChunkBytes / kPageBytes;

// One chunk on its way from the process to the image.
struct Chunk {
  std::vector<uint8_t> buffer = std::vector<uint8_t>(kChunkBytes);
  uint64_t address = 0;
  uint64_t bytes = 0;
  bool exact = false;  // only what is marked: DumpRange::Pages::kModified, or a guard region lies between
  bool marked[kChunkPages] = {};
};

// Writes chunks in a thread of its own, in the order they come, so that reading the process and writing the file overlap.
class ChunkWriter {
 public:
  ChunkWriter(ImageWriter& writer, DumpProgress& progress) : writer_(writer), progress_(progress) {
    for (size_t i = 0; i < kChunksInFlight; ++i) free_.push_back(std::make_unique<Chunk>());
    thread_ = std::thread([this] { run(); });
  }
  ~ChunkWriter() { (void)finish(); }
  ChunkWriter(const ChunkWriter&) = delete;
  ChunkWriter& operator=(const ChunkWriter&) = delete;

  // An empty chunk to fill; null when writing has failed.
  std::unique_ptr<Chunk> take() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return !free_.empty() || !result_.ok(); });
    if (!result_.ok()) return nullptr;
    auto chunk = std::move(free_.back());
    free_.pop_back();
    return chunk;
  }

  void put(std::unique_ptr<Chunk> chunk) {
    std::lock_guard lock(mutex_);
    full_.push_back(std::move(chunk));
    changed_.notify_all();
  }

  // Waits until everything is written.
  Result<void> finish() {
    {
      std::lock_guard lock(mutex_);
      finished_ = true;
      changed_.notify_all();
    }
    if (thread_.joinable()) thread_.join();
    return result_;
  }

 private:
  static constexpr size_t kChunksInFlight = 8;

  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return !full_.empty() || finished_; });
      if (full_.empty()) return;
      auto chunk = std::move(full_.front());
      full_.pop_front();
      lock.unlock();
      auto written = write(*chunk);
      lock.lock();
      if (!written.ok() && result_.ok()) result_ = written.error();
      free_.push_back(std::move(chunk));
      changed_.notify_all();
      if (!result_.ok()) return;
    }
  }

  Result<void> write(const Chunk& chunk) {
    auto written = chunk.exact ? write_marked_runs(chunk.buffer.data(), chunk.bytes, chunk.marked, 0, chunk.address, writer_)
                               : write_runs(chunk.buffer.data(), chunk.bytes, 0, chunk.address, writer_);
    progress_.bytes_saved += VMCKPT_TRY(std::move(written));
    // The disk starts now, not at the final sync.
    if (progress_.bytes_saved - flushed_bytes_ >= kFlushBytes) {
      (void)::sync_file_range(writer_.fd(), 0, 0, SYNC_FILE_RANGE_WRITE);
      flushed_bytes_ = progress_.bytes_saved;
    }
    return {};
  }

  static constexpr uint64_t kFlushBytes = 32u << 20;
  ImageWriter& writer_;
  DumpProgress& progress_;
  uint64_t flushed_bytes_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::unique_ptr<Chunk>> free_;
  std::deque<std::unique_ptr<Chunk>> full_;
  bool finished_ = false;
  Result<void> result_;
  std::thread thread_;
};

class Dumper {
 public:
  Dumper(pid_t source, ChunkWriter& writer, DumpProgress& progress, PageScanner scanner, Fd memory)
      : source_(source), writer_(writer), progress_(progress), scanner_(std::move(scanner)), memory_(std::move(memory)) {}

  Result<void> dump(const DumpRange& range) {
    done_before_ = progress_.bytes_done;
    range_ = &range;
    begin_chunk(range.start);
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
    VMCKPT_TRY(end_chunk());
    if (range.pages != DumpRange::Pages::kGuards) progress_.bytes_done = done_before_ + (range.end - range.start);
    return {};
  }

  std::vector<GuardRegion> take_guards() { return std::move(guards_); }

 private:
  void begin_chunk(uint64_t address) {
    start_ = address;
    end_ = std::min(range_->end, address / kChunkBytes * kChunkBytes + kChunkBytes);
    any_ = has_holes_ = false;
    std::fill_n(wanted_, kChunkPages, false);
  }

  // The chunk that `address` is in becomes the present one.
  Result<void> go_to(uint64_t address) {
    if (address < end_) return {};
    VMCKPT_TRY(end_chunk());
    begin_chunk(std::max(range_->start, address / kChunkBytes * kChunkBytes));
    return {};
  }

  Result<void> want(uint64_t start, uint64_t end) {
    while (start < end) {
      VMCKPT_TRY(go_to(start));
      const uint64_t stop = std::min(end, end_);
      std::fill(wanted_ + (start - start_) / kPageBytes, wanted_ + (stop - start_) / kPageBytes, true);
      any_ = true;
      start = stop;
    }
    return {};
  }

  // Pages that must not be covered by a run, not even as a gap of zeros between others.
  Result<void> leave_out(uint64_t start, uint64_t end) {
    if (start < end_) has_holes_ = true;
    VMCKPT_TRY(go_to(end - kPageBytes));
    has_holes_ |= start_ < end;
    return {};
  }

  void note_guard(const PageSpan& span) {
    if (!guards_.empty() && guards_.back().end == span.start) guards_.back().end = span.end;
    else guards_.push_back({span.start, span.end});
  }

  Result<void> end_chunk() {
    if (progress_.cancelled) return error("the checkpoint was cancelled: who asked for it has gone");
    if (!any_) return {};
    auto chunk = writer_.take();
    if (chunk == nullptr) return writer_.finish();
    const size_t pages = (end_ - start_) / kPageBytes;
    uint8_t* const buffer = chunk->buffer.data();
    iovec local[kChunkPages], remote[kChunkPages];
    size_t spans = 0;
    for (size_t i = 0; i < pages; ++i) {
      uint64_t address = start_ + i * kPageBytes;
      chunk->marked[i] = wanted_[i];
      if (!wanted_[i]) {
        std::memset(buffer + i * kPageBytes, 0, kPageBytes);
        continue;
      }
      bool continues = spans > 0 && static_cast<uint8_t*>(local[spans - 1].iov_base) + local[spans - 1].iov_len ==
                                        buffer + i * kPageBytes;
      if (continues) {
        local[spans - 1].iov_len = remote[spans - 1].iov_len += kPageBytes;
      } else {
        local[spans] = {buffer + i * kPageBytes, kPageBytes};
        remote[spans++] = {reinterpret_cast<void*>(address), kPageBytes};
      }
    }
    VMCKPT_TRY(read_spans(*range_, local, remote, spans));
    chunk->address = start_;
    chunk->bytes = end_ - start_;
    chunk->exact = range_->pages == DumpRange::Pages::kModified || has_holes_;
    any_ = false;
    writer_.put(std::move(chunk));
    progress_.bytes_done = done_before_ + (end_ - range_->start);
    return {};
  }

  Result<void> read_spans(const DumpRange& range, iovec* local, iovec* remote, size_t spans) {
    size_t wanted = 0;
    for (size_t i = 0; i < spans; ++i) wanted += local[i].iov_len;
    if (range.readable && ::process_vm_readv(source_, local, spans, remote, spans, 0) == static_cast<ssize_t>(wanted)) return {};
    // Memory without PROT_READ, or a page beyond the end of a mapped file: one page at a time through /proc/PID/mem.
    for (size_t i = 0; i < spans; ++i) {
      for (size_t at = 0; at < local[i].iov_len; at += kPageBytes) {
        auto* to = static_cast<uint8_t*>(local[i].iov_base) + at;
        auto address = reinterpret_cast<uint64_t>(remote[i].iov_base) + at;
        ssize_t got = ::pread(memory_.get(), to, kPageBytes, static_cast<off_t>(address));
        if (got == static_cast<ssize_t>(kPageBytes)) continue;
        // Beyond the end of a mapped file nothing is there; no answer at all means that the process has gone.
        if (got == 0 || (got < 0 && errno == ESRCH)) {
          return error(fmt::format("process {}, whose memory was being written, has been killed", source_),
                       "if it was the target's copy, memory may have run short: free some, or checkpoint with --stop");
        }
        if (got < 0 && errno == EIO && range.pages == DumpRange::Pages::kAll) std::memset(to, 0, kPageBytes);
        else return errno_error(fmt::format("read memory of process {} at {:#x}", source_, address));
      }
    }
    return {};
  }

  pid_t source_;
  ChunkWriter& writer_;
  DumpProgress& progress_;
  PageScanner scanner_;
  Fd memory_;
  std::vector<GuardRegion> guards_;
  const DumpRange* range_ = nullptr;
  uint64_t done_before_ = 0;
  // The chunk that is being put together: [start_, end_), and which of its pages are wanted.
  uint64_t start_ = 0;
  uint64_t end_ = 0;
  bool any_ = false;
  bool has_holes_ = false;
  bool wanted_[kChunkPages] = {};
};

}  // namespace

Result<std::vector<GuardRegion>> dump_pages(pid_t source, const std::vector<DumpRange>& ranges, ImageWriter& writer,
                                            DumpProgress& progress) {
  PageScanner scanner = VMCKPT_TRY(PageScanner::open(source));
  Fd memory = VMCKPT_TRY(open_file(fmt::format("/proc/{}/mem", source), O_RDONLY));
  ChunkWriter chunks(writer, progress);
  Dumper dumper(source, chunks, progress, std::move(scanner), std::move(memory));
  for (const DumpRange& range : ranges) VMCKPT_TRY(dumper.dump(range));
  VMCKPT_TRY(chunks.finish());
  return dumper.take_guards();
}

}  // namespace vmckpt
