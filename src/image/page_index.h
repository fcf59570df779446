// The pages of an image: which there are, where their content lies, and the only way to it. Nobody else looks at a record's
// store, codec and offset, so that content which is compressed, or lies in another file, has one place to come from.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "core/fd.h"
#include "core/result.h"
#include "vmckpt/image_format.h"

namespace vmckpt {

// Pages that follow one another in memory and in the image file, where they lie as they are: to be read or mapped from there.
// A run of zeros lies nowhere.
struct PageRun {
  uint64_t address;
  uint64_t bytes;
  uint64_t file_offset;
  bool zero = false;
};

// The records with stored content in the order in which it lies in its store: those that have the same follow one another.
std::vector<const PageRecord*> in_stored_order(std::span<const PageRecord> records);

class PageIndex {
 public:
  PageIndex() = default;
  // `records` are checked (validate.h): sorted, within the file, of no kind that cannot be read, what they store apart or the
  // same. `file` is the image at `path`.
  PageIndex(Fd file, std::string path, std::vector<PageRecord> records)
      : file_(std::move(file)), path_(std::move(path)), records_(std::move(records)) {}

  const std::vector<PageRecord>& records() const { return records_; }
  // The records of one object, in address order.
  std::span<const PageRecord> records_of(uint64_t object) const;

  struct Size {
    uint64_t records = 0;
    uint64_t bytes = 0;         // of memory whose content is stored
    uint64_t stored_bytes = 0;  // what it takes, holes of the file counted
  };
  // Of all objects; of one object; of the records of one object that begin within [start, end).
  Size size() const;
  Size size_of(uint64_t object) const { return size_of(object, 0, UINT64_MAX); }
  Size size_of(uint64_t object, uint64_t start, uint64_t end) const;

  // One object's runs of data and of zeros, in address order, as long as they can be. What is between them is absent.
  std::vector<PageRun> runs_of(uint64_t object) const;

  // The content of a range: zeros where there is none. False where no record of the range has any.
  Result<bool> read(uint64_t object, uint64_t address, void* to, uint64_t bytes) const;

  // The content of one object's records in address order; absent ones are left out. `content` is good until `take` returns.
  using Take = std::function<Result<void>(uint64_t address, const uint8_t* content, uint64_t bytes)>;
  Result<void> read_all(uint64_t object, const Take& take) const;

  // Checksums of all that is stored in the image file, each byte read once; names the damaged pages and the file offset.
  Result<void> verify() const;

  int fd() const { return file_.get(); }
  // Goes on with another descriptor of the same file.
  void use_fd(Fd fd) { file_ = std::move(fd); }

 private:
  Result<void> read_stored(const PageRecord& record, uint64_t from, void* to, uint64_t bytes) const;

  Fd file_;
  std::string path_;
  std::vector<PageRecord> records_;
};

}  // namespace vmckpt
