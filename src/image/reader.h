// Opens an image and checks it: header, section bounds and checksums before anything is decoded, then the page index against
// the mappings. Page data is only checksummed by verify(): restart maps it and must not read it all first.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/fd.h"
#include "core/result.h"
#include "image/image.pb.h"
#include "vmckpt/image_format.h"

namespace vmckpt {

class ImageReader {
 public:
  static Result<ImageReader> open(const std::string& path);

  const std::string& path() const { return path_; }  // absolute
  int fd() const { return fd_.get(); }
  const ImageHeader& header() const { return header_; }
  const pb::Image& metadata() const { return metadata_; }
  const std::vector<PageRecord>& records() const { return records_; }
  // The records of one object, in address order.
  std::vector<PageRecord> records_of(uint64_t object) const;

  // Goes on with another descriptor of the same file.
  void use_fd(Fd fd) { fd_ = std::move(fd); }

  // Checksums of all page data; names the damaged run and file offset.
  Result<void> verify_pages() const;

 private:
  ImageReader() = default;
  std::string path_;
  Fd fd_;
  ImageHeader header_{};
  pb::Image metadata_;
  std::vector<PageRecord> records_;
};

// Only the header, checked: cheap, for deciding whether an existing file is an image and whose.
Result<ImageHeader> read_image_header(int fd, const std::string& path);

}  // namespace vmckpt
