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

namespace vmckpt {
namespace {

constexpr uint64_t kPageBytes = kImagePageBytes;
constexpr uint64_t kChunkBytes = kMaxRecordBytes;
constexpr size_t kChunkPages = kChunkBytes / kPageBytes;

// /proc/PID/pagemap entries (kernel: Documentation/admin-guide/mm/pagemap.rst).
constexpr uint64_t kPresent = uint64_t{1} << 63, kSwapped = uint64_t{1} << 62, kFilePage = uint64_t{1} << 61;

// Pages looked up for one chunk at a time would cost a system call each; a window covers 256 MiB.
class Pagemap {
 public:
  static Result<Pagemap> open(pid_t pid) {
    Pagemap pagemap;
    pagemap.fd_ = VMCKPT_TRY(open_file(fmt::format("/proc/{}/pagemap", pid), O_RDONLY));
    return pagemap;
  }

  // The entry of one page; addresses come in rising order.
  Result<uint64_t> entry(uint64_t address, uint64_t range_end) {
    if (address < window_start_ || address >= window_start_ + window_.size() * kPageBytes) {
      uint64_t pages = std::min<uint64_t>(kWindowPages, (range_end - address) / kPageBytes);
      window_.resize(pages);
      window_start_ = address;
      VMCKPT_TRY(pread_exactly(fd_.get(), window_.data(), pages * sizeof(uint64_t), address / kPageBytes * sizeof(uint64_t),
                               "pagemap"));
    }
    return window_[(address - window_start_) / kPageBytes];
  }

 private:
  static constexpr uint64_t kWindowPages = 65536;
  Fd fd_;
  uint64_t window_start_ = 0;
  std::vector<uint64_t> window_;
};

// One chunk on its way from the process to the image.
struct Chunk {
  std::vector<uint8_t> buffer = std::vector<uint8_t>(kChunkBytes);
  uint64_t address = 0;
  uint64_t bytes = 0;
  bool exact = false;  // DumpRange::Pages::kModified
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
  Dumper(pid_t source, ChunkWriter& writer, DumpProgress& progress, Pagemap pagemap, Fd memory)
      : source_(source), writer_(writer), progress_(progress), pagemap_(std::move(pagemap)), memory_(std::move(memory)) {}

  Result<void> dump(const DumpRange& range) {
    for (uint64_t chunk = range.start; chunk < range.end;) {
      uint64_t chunk_end = std::min(range.end, chunk / kChunkBytes * kChunkBytes + kChunkBytes);
      VMCKPT_TRY(dump_chunk(range, chunk, chunk_end));
      progress_.bytes_done += chunk_end - chunk;
      chunk = chunk_end;
    }
    return {};
  }

 private:
  // Which of the chunk's pages have content; false when none has. Address space that was only reserved ends here.
  Result<bool> mark_wanted(const DumpRange& range, uint64_t start, size_t pages, bool* wanted) {
    bool any = range.pages == DumpRange::Pages::kAll;
    for (size_t i = 0; i < pages; ++i) {
      wanted[i] = range.pages == DumpRange::Pages::kAll;
      if (wanted[i]) continue;
      uint64_t entry = VMCKPT_TRY(pagemap_.entry(start + i * kPageBytes, range.end));
      wanted[i] = (entry & (kPresent | kSwapped)) != 0 && (entry & kFilePage) == 0;
      any |= wanted[i];
    }
    return any;
  }

  Result<void> dump_chunk(const DumpRange& range, uint64_t start, uint64_t end) {
    size_t pages = (end - start) / kPageBytes;
    bool wanted[kChunkPages];
    if (!VMCKPT_TRY(mark_wanted(range, start, pages, wanted))) return {};
    auto chunk = writer_.take();
    if (chunk == nullptr) return writer_.finish();
    uint8_t* const buffer = chunk->buffer.data();
    iovec local[kChunkPages], remote[kChunkPages];
    size_t spans = 0;
    for (size_t i = 0; i < pages; ++i) {
      uint64_t address = start + i * kPageBytes;
      chunk->marked[i] = wanted[i];
      if (!wanted[i]) {
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
    VMCKPT_TRY(read_spans(range, local, remote, spans));
    chunk->address = start;
    chunk->bytes = end - start;
    chunk->exact = range.pages == DumpRange::Pages::kModified;
    writer_.put(std::move(chunk));
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
  Pagemap pagemap_;
  Fd memory_;
};

}  // namespace

Result<void> dump_pages(pid_t source, const std::vector<DumpRange>& ranges, ImageWriter& writer, DumpProgress& progress) {
  Pagemap pagemap = VMCKPT_TRY(Pagemap::open(source));
  Fd memory = VMCKPT_TRY(open_file(fmt::format("/proc/{}/mem", source), O_RDONLY));
  ChunkWriter chunks(writer, progress);
  Dumper dumper(source, chunks, progress, std::move(pagemap), std::move(memory));
  for (const DumpRange& range : ranges) VMCKPT_TRY(dumper.dump(range));
  return chunks.finish();
}

}  // namespace vmckpt
