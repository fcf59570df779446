// Opens an image and checks it: header, section bounds and checksums before anything is decoded, then the page index against
// the mappings. Page data is only checksummed by verify_pages(): restart reads it once, into its place, or maps it.
#pragma once

#include <cstdint>
#include <string>

#include "core/result.h"
#include "image/image.pb.h"
#include "image/page_index.h"
#include "vmckpt/image_format.h"

namespace vmckpt {

class ImageReader {
 public:
  static Result<ImageReader> open(const std::string& path);

  const std::string& path() const { return path_; }  // absolute
  int fd() const { return pages_.fd(); }
  const ImageHeader& header() const { return header_; }
  const pb::Image& metadata() const { return metadata_; }
  const PageIndex& pages() const { return pages_; }

  // Goes on with another descriptor of the same file.
  void use_fd(Fd fd) { pages_.use_fd(std::move(fd)); }

  // Checksums of all page data; names the damaged run and file offset.
  Result<void> verify_pages() const { return pages_.verify(); }

 private:
  ImageReader() = default;
  std::string path_;
  ImageHeader header_{};
  pb::Image metadata_;
  PageIndex pages_;
};

// Only the header, checked: cheap, for deciding whether an existing file is an image and whose.
Result<ImageHeader> read_image_header(int fd, const std::string& path);

}  // namespace vmckpt
