#include "memory/process_memory.h"

#include <algorithm>
#include <array>
#include <cstring>

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include "core/page.h"

namespace vmckpt {
namespace {


Error killed(pid_t pid) {
  return error(fmt::format("process {}, whose memory was being written, has been killed", pid),
               "if it was the target's copy, memory may have run short: free some, or checkpoint with --stop or --kill");
}

}  // namespace

Result<void> ProcessMemory::read(const PagePiece& piece, uint64_t address, uint8_t* content, Readable readable,
                                 Unreadable unreadable) {
  std::array<iovec, kMaxPiecePages> local{}, remote{};
  size_t spans = 0, wanted_bytes = 0;
  for (size_t page = 0, end; page < piece.pages(); page = end) {
    end = piece.end_of_span(page);
    if (!piece.wanted[page]) continue;
    const size_t bytes = (end - page) * kPageBytes;
    local[spans] = {content + page * kPageBytes, bytes};
    remote[spans++] = {reinterpret_cast<void*>(address + page * kPageBytes), bytes};
    wanted_bytes += bytes;
  }
  if (readable == Readable::kMaybe) {
    const ssize_t got = ::process_vm_readv(pid_, local.data(), spans, remote.data(), spans, 0);
    if (got == static_cast<ssize_t>(wanted_bytes)) return {};
  }
  for (size_t i = 0; i < spans; ++i) {
    const auto from = reinterpret_cast<uint64_t>(remote[i].iov_base);
    VMCKPT_TRY(read_as_tracer(from, static_cast<uint8_t*>(local[i].iov_base), local[i].iov_len, unreadable));
  }
  return {};
}

// The file gives what it can up to the first page that cannot be read.
Result<void> ProcessMemory::read_as_tracer(uint64_t address, uint8_t* to, uint64_t bytes, Unreadable unreadable) {
  if (!memory_) {
    auto opened = open_file(fmt::format("/proc/{}/mem", pid_), O_RDONLY);
    if (!opened.ok()) return opened.error().err == ENOENT || opened.error().err == ESRCH ? killed(pid_) : opened.error();
    memory_ = std::move(opened).value();
  }
  while (bytes > 0) {
    const ssize_t got = ::pread(memory_.get(), to, bytes, static_cast<off_t>(address));
    if (got < 0 && errno == EINTR) continue;
    // No answer at all means that the process has gone.
    if (got == 0 || (got < 0 && errno == ESRCH)) return killed(pid_);
    uint64_t done = got > 0 ? static_cast<uint64_t>(got) : 0;
    if (got < 0) {
      if (errno != EIO || unreadable == Unreadable::kError) {
        return errno_error(fmt::format("read memory of process {} at {:#x}", pid_, address));
      }
      done = std::min(bytes, kPageBytes - address % kPageBytes);
      std::memset(to, 0, done);
    }
    address += done;
    to += done;
    bytes -= done;
  }
  return {};
}

Result<void> ProcessMemory::expect_still_there() const {
  char byte;
  // Nothing lies there: EFAULT for any process that has memory (process_vm_rw_core in the kernel's mm/process_vm_access.c).
  const iovec here{&byte, 1}, nowhere{nullptr, 1};
  if (::process_vm_readv(pid_, &here, 1, &nowhere, 1, 0) < 0 && errno == ESRCH) return killed(pid_);
  return {};
}

}  // namespace vmckpt
