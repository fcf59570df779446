// Pages of a file that is memory, read while nobody changes it: through a descriptor, or where there is none through a mapping.
#pragma once

#include <string>

#include "memory/page_source.h"
#include "memory/process_memory.h"

namespace vmckpt {

// The data of an open file; its holes are left out. Moves the descriptor's position. `fd` is borrowed.
class FileSource : public PageSource {
 public:
  FileSource(int fd, uint64_t size_bytes, uint64_t object, std::string name)
      : fd_(fd), size_bytes_(size_bytes), object_(object), name_(std::move(name)) {}
  Result<void> find(const Take& take) override;
  Result<void> read(const PagePiece& piece, uint8_t* content) override;

 private:
  int fd_;
  uint64_t size_bytes_;
  uint64_t object_;
  std::string name_;
};

// Where in a process's memory an object is seen.
struct FileView {
  pid_t pid = 0;
  uint64_t address = 0;
  uint64_t file_offset = 0;  // at `address`
};

// The pages [start, end) of an object, as a mapping shows them. Reading makes pages that were never touched: that is what it
// costs to look at shared memory without privileges.
class MappedFileSource : public PageSource {
 public:
  MappedFileSource(const FileView& view, uint64_t start, uint64_t end, uint64_t object, std::string name)
      : view_(view), start_(start), end_(end), object_(object), name_(std::move(name)), memory_(view.pid) {}
  Result<void> find(const Take& take) override;
  Result<void> read(const PagePiece& piece, uint8_t* content) override;

 private:
  FileView view_;
  uint64_t start_;
  uint64_t end_;
  uint64_t object_;
  std::string name_;
  ProcessMemory memory_;
};

}  // namespace vmckpt
