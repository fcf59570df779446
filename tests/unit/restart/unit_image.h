// Images with a given memory layout, for tests of restart's plans.
#pragma once

#include <algorithm>
#include <filesystem>
#include <memory>
#include <vector>

#include "catch.h"
#include <stdlib.h>

#include "image/reader.h"
#include "image/tiny_image.h"
#include "image/writer.h"

namespace vmckpt {

struct TestRun {
  uint64_t address;
  uint64_t bytes;
  PageKind kind = PageKind::kData;
};

// The tiny image with other mappings; each run's pages are there (as zeros: plans do not look at them).
inline std::unique_ptr<ImageReader> image_with_runs(const pb::AddressSpace& space, const std::vector<TestRun>& runs) {
  char path[] = "/tmp/vmckpt-plan-XXXXXX";
  const std::string directory = ::mkdtemp(path);
  ImageDestination destination;
  destination.path = directory + "/x.ckpt";
  auto writer = ImageWriter::create(destination, test::tiny_identity());
  REQUIRE(writer.ok());
  for (const TestRun& run : runs) {
    const bool is_data = run.kind == PageKind::kData;
    const uint64_t offset = is_data ? writer->reserve_pages(run.bytes) : 0;
    for (uint64_t at = 0; at < run.bytes; at += kMaxRecordBytes) {
      const uint64_t bytes = std::min(kMaxRecordBytes, run.bytes - at);
      PageRecord record = plain_record(0, run.address + at, bytes, is_data ? offset + at : 0, 0);
      record.kind = run.kind;
      if (!is_data) record.stored_bytes = 0;
      writer->add_record(record);
    }
  }
  pb::Image metadata = test::tiny_metadata();
  *metadata.mutable_address_spaces(0) = space;
  auto finished = test::finish(*writer, metadata);
  if (!finished.ok()) FAIL(finished.error().message());
  auto reader = ImageReader::open(destination.path);
  if (!reader.ok()) FAIL(reader.error().message());
  std::filesystem::remove_all(directory);
  return std::make_unique<ImageReader>(std::move(reader).value());
}

}  // namespace vmckpt
