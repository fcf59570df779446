// Where pages come from at a checkpoint: a process that stands still (page_dump.cc), a file (file_source.h). Where they go is
// a PageSink's business.
#pragma once

#include <cstdint>
#include <functional>

#include "core/result.h"
#include "image/page_sink.h"

namespace vmckpt {

class PageSource {
 public:
  virtual ~PageSource() = default;
  using Take = std::function<Result<void>(const PagePiece&)>;
  // Calls `take` for the pages that there are, in pieces, each page once.
  virtual Result<void> find(const Take& take) = 0;
  // The wanted pages' content, each in its place from `content` on, where zeros are. Called from within `take`, for that piece.
  virtual Result<void> read(const PagePiece& piece, uint8_t* content) = 0;
  // For progress: how much find() has been through, pages that are not there counted.
  virtual uint64_t bytes_looked_at() const { return 0; }
};

}  // namespace vmckpt
