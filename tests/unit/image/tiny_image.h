// A tiny valid image for tests, the fuzzer and the hexdump in docs/image-format.md: one thread, two mappings, one
// captured file, three pages of which one is a hole. The same bytes on every machine and on every run.
#pragma once

#include <string>

#include "core/result.h"
#include "image/image.pb.h"
#include "image/writer.h"

namespace vmckpt::test {

// Seals and publishes.
Result<std::string> finish(ImageWriter& writer, const pb::Image& metadata);

constexpr uint64_t kTinyHeapStart = 0x10000000;
constexpr uint64_t kTinyCapturedId = 1;

ImageIdentity tiny_identity();
pb::Image tiny_metadata();

// Writes the tiny image's pages and records: one page of 'A', a hole, and one page of 'B' in the captured file.
Result<void> write_tiny_pages(ImageWriter& writer);

// The whole image as bytes, made through ImageWriter in `directory`.
Result<std::string> tiny_image_bytes(const std::string& directory);

// Puts right every checksum that can be found by following `bytes`' own header, so that what lies behind is reached.
void fix_checksums(std::string& bytes);

}  // namespace vmckpt::test
