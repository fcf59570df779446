#include "memory/file_source.h"

#include <algorithm>
#include <cstring>

#include <unistd.h>

#include "core/fd.h"
#include "core/page.h"

namespace vmckpt {
namespace {


// Whole pages up to the one in which `end` is.
PagePiece all_pages(uint64_t object, uint64_t start, uint64_t end) {
  PagePiece piece;
  piece.object = object;
  piece.address = start;
  piece.bytes = std::min((end - start + kPageBytes - 1) / kPageBytes * kPageBytes, kMaxRecordBytes);
  for (size_t page = 0; page < piece.pages(); ++page) piece.wanted.set(page);
  return piece;
}

}  // namespace

Result<void> FileSource::find(const Take& take) {
  for (uint64_t at = 0; at < size_bytes_; at += kMaxRecordBytes) {
    const off_t data = ::lseek(fd_, static_cast<off_t>(at), SEEK_DATA);
    if (data < 0 && errno == ENXIO) break;  // only a hole is left
    if (data >= 0) at = static_cast<uint64_t>(data) / kPageBytes * kPageBytes;
    if (at >= size_bytes_) break;  // it has grown
    VMCKPT_TRY(take(all_pages(object_, at, size_bytes_)));
  }
  return {};
}

Result<void> FileSource::read(const PagePiece& piece, uint8_t* content) {
  const uint64_t bytes = std::min(piece.bytes, size_bytes_ - piece.address);
  VMCKPT_TRY(pread_exactly(fd_, content, bytes, piece.address, name_));
  std::memset(content + bytes, 0, piece.bytes - bytes);  // the last page is filled up
  return {};
}

Result<void> MappedFileSource::find(const Take& take) {
  for (uint64_t at = start_; at < end_; at += kMaxRecordBytes) VMCKPT_TRY(take(all_pages(object_, at, end_)));
  return {};
}

Result<void> MappedFileSource::read(const PagePiece& piece, uint8_t* content) {
  auto read = memory_.read(piece, view_.address + (piece.address - view_.file_offset), content, ProcessMemory::Readable::kMaybe,
                           ProcessMemory::Unreadable::kError);
  if (read.ok() || (read.error().err != EFAULT && read.error().err != EIO)) return read;
  return error(fmt::format("{} can only be read through its mapping at {:#x}, where guard regions or its end hide a part of it",
                           name_, view_.address),
               "checkpoint as root, or let the program keep a descriptor of it");
}

}  // namespace vmckpt
