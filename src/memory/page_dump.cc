#include "memory/page_dump.h"

#include <algorithm>
#include <cstring>

#include <fcntl.h>
#include <sys/mman.h>
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

class Dumper {
 public:
  Dumper(pid_t source, ImageWriter& writer, DumpProgress& progress, Pagemap pagemap, Fd memory)
      : source_(source), writer_(writer), progress_(progress), pagemap_(std::move(pagemap)), memory_(std::move(memory)) {
    buffer_ = static_cast<uint8_t*>(::mmap(nullptr, kChunkBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    VMCKPT_CHECK(buffer_ != MAP_FAILED);
  }
  ~Dumper() { ::munmap(buffer_, kChunkBytes); }
  Dumper(const Dumper&) = delete;
  Dumper& operator=(const Dumper&) = delete;

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
  Result<void> dump_chunk(const DumpRange& range, uint64_t start, uint64_t end) {
    size_t pages = (end - start) / kPageBytes;
    bool any = false;
    bool marked[kChunkPages];
    iovec local[kChunkPages], remote[kChunkPages];
    size_t spans = 0;
    for (size_t i = 0; i < pages; ++i) {
      uint64_t address = start + i * kPageBytes;
      bool wanted = range.pages == DumpRange::Pages::kAll;
      if (!wanted) {
        uint64_t entry = VMCKPT_TRY(pagemap_.entry(address, range.end));
        wanted = (entry & (kPresent | kSwapped)) != 0 && (entry & kFilePage) == 0;
      }
      marked[i] = wanted;
      if (!wanted) {
        std::memset(buffer_ + i * kPageBytes, 0, kPageBytes);
        continue;
      }
      any = true;
      bool continues = spans > 0 && static_cast<uint8_t*>(local[spans - 1].iov_base) + local[spans - 1].iov_len ==
                                        buffer_ + i * kPageBytes;
      if (continues) {
        local[spans - 1].iov_len = remote[spans - 1].iov_len += kPageBytes;
      } else {
        local[spans] = {buffer_ + i * kPageBytes, kPageBytes};
        remote[spans++] = {reinterpret_cast<void*>(address), kPageBytes};
      }
    }
    if (!any) return {};
    VMCKPT_TRY(read_spans(range, local, remote, spans));
    auto written = range.pages == DumpRange::Pages::kModified
                       ? write_marked_runs(buffer_, end - start, marked, 0, start, writer_)
                       : write_runs(buffer_, end - start, 0, start, writer_);
    progress_.bytes_saved += VMCKPT_TRY(std::move(written));
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
        if (range.pages == DumpRange::Pages::kAll) std::memset(to, 0, kPageBytes);  // nothing is mapped there
        else return errno_error(fmt::format("read memory of process {} at {:#x}", source_, address));
      }
    }
    return {};
  }

  pid_t source_;
  ImageWriter& writer_;
  DumpProgress& progress_;
  Pagemap pagemap_;
  Fd memory_;
  uint8_t* buffer_;
};

}  // namespace

Result<void> dump_pages(pid_t source, const std::vector<DumpRange>& ranges, ImageWriter& writer, DumpProgress& progress) {
  Pagemap pagemap = VMCKPT_TRY(Pagemap::open(source));
  Fd memory = VMCKPT_TRY(open_file(fmt::format("/proc/{}/mem", source), O_RDONLY));
  Dumper dumper(source, writer, progress, std::move(pagemap), std::move(memory));
  for (const DumpRange& range : ranges) VMCKPT_TRY(dumper.dump(range));
  return {};
}

}  // namespace vmckpt
