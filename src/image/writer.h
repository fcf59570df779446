// Writes one image: page data first; seal() adds metadata and page index, the header last, and syncs; publish() gives it its name
// by rename or link, so the final name only ever shows a whole image. The destructor removes what was not published.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "core/fd.h"
#include "core/result.h"
#include "image/image.pb.h"
#include "vmckpt/image_format.h"

namespace vmckpt {

using Id128 = std::array<uint8_t, 16>;

struct ImageDestination {
  std::string path;            // absolute
  bool replace = false;        // the path exists and is this target's own image: rename over it
  std::string numbered_stem;   // when set, path is ignored: STEM-N.ckpt, the newest with the highest N
  uint64_t number = 1;         // the N to begin with; the first that is free from there on
};

struct ImageIdentity {
  Id128 image_id{};
  Id128 parent_id{};
  Id128 target_id{};
};

class ImageWriter {
 public:
  // Opens an unnamed (O_TMPFILE) or temporary file (mode 0600) beside the destination.
  static Result<ImageWriter> create(const ImageDestination& destination, const ImageIdentity& identity);
  ImageWriter(ImageWriter&&) noexcept;
  ImageWriter& operator=(ImageWriter&&) = delete;
  ~ImageWriter();

  // Sets aside `bytes` of page-aligned file space; what is not written there stays a hole that reads as zeros.
  uint64_t reserve_pages(uint64_t bytes);
  // Writes page data at an offset within reserved space.
  Result<void> write_pages(const void* data, uint64_t bytes, uint64_t file_offset);
  void add_record(const PageRecord& record) { records_.push_back(record); }
  int fd() const { return fd_.get(); }
  const std::string& directory() const { return directory_; }

  // Sorts and checks the index, writes metadata, index and header, syncs: the image is whole, and nobody sees it yet.
  Result<void> seal(const pb::Image& metadata);
  // Gives the sealed image its name, durably. Returns the final path.
  Result<std::string> publish();

  uint64_t page_bytes_written() const { return page_bytes_written_; }  // page data, holes not counted
  bool is_numbered() const { return !destination_.numbered_stem.empty(); }
  uint64_t number() const { return destination_.number; }              // after publish() under a numbered name
  uint64_t file_bytes() const { return file_bytes_; }                  // after seal(): blocks allocated to the file

 private:
  ImageWriter() = default;
  std::string described() const;  // its name, or what it will be like
  Error failed(const char* what) const;

  ImageDestination destination_;
  ImageIdentity identity_;
  std::string directory_;
  std::string temporary_path_;  // empty when the file has no name
  Fd fd_;
  uint64_t next_offset_ = kImagePageBytes;
  uint64_t page_bytes_written_ = 0;
  uint64_t file_bytes_ = 0;
  bool is_sealed_ = false;
  std::vector<PageRecord> records_;
};

}  // namespace vmckpt
