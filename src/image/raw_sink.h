// Pages as they are, in the image itself: what restart reads fastest, and can map. Zero pages cost nothing, neighbouring pages
// become one run.
#pragma once

#include "image/page_sink.h"
#include "image/writer.h"

namespace vmckpt {

class RawSink : public PageSink {
 public:
  // kEarly: the disk starts as soon as there is something to write, not at the final sync. A call may wait for it then.
  enum class Writeback { kEarly, kAtCommit };
  RawSink(ImageWriter& writer, Writeback writeback) : writer_(writer), writeback_(writeback) {}

  // Gaps of up to 16 zero pages stay inside a run as holes of the file: a run less at restart is worth more than the hole costs.
  Result<uint64_t> put(const PagePiece& piece, const uint8_t* content) override;

 private:
  ImageWriter& writer_;
  Writeback writeback_;
  uint64_t unflushed_bytes_ = 0;
};

}  // namespace vmckpt
