// Memory of another process, read in bulk: with process_vm_readv(2), and where the process itself may not read, or a page cannot
// be read at all, through /proc/PID/mem.
#pragma once

#include <cstdint>

#include <sys/types.h>

#include "core/fd.h"
#include "core/result.h"
#include "image/page_sink.h"

namespace vmckpt {

class ProcessMemory {
 public:
  explicit ProcessMemory(pid_t pid) : pid_(pid) {}
  // Whether the process still has its memory: one that was killed reads as if nothing had been written.
  Result<void> expect_still_there() const;

  enum class Readable { kMaybe, kNo };       // kNo: the process itself may not read it, so do not try
  enum class Unreadable { kError, kZeros };  // a page that cannot be read: beyond the end of a mapped file, or a guard region
  // The wanted pages of a piece, whose first page lies at `address`. An error that has EIO names a page that cannot be read.
  Result<void> read(const PagePiece& piece, uint64_t address, uint8_t* content, Readable readable, Unreadable unreadable);

 private:
  Result<void> read_as_tracer(uint64_t address, uint8_t* to, uint64_t bytes, Unreadable unreadable);

  pid_t pid_;
  Fd memory_;  // opened when it is needed
};

}  // namespace vmckpt
