#include "image/raw_sink.h"

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "catch.h"
#include <stdlib.h>
#include <sys/stat.h>

using namespace vmckpt;

namespace {

constexpr uint64_t kPage = kImagePageBytes;

struct Fixture {
  Fixture() {
    char path[] = "/tmp/vmckpt-runs-XXXXXX";
    directory = ::mkdtemp(path);
    ImageDestination destination;
    destination.path = directory + "/x.ckpt";
    auto made = ImageWriter::create(destination, {});
    REQUIRE(made.ok());
    writer = std::make_unique<ImageWriter>(std::move(made).value());
  }
  ~Fixture() { std::filesystem::remove_all(directory); }

  std::string directory;
  std::unique_ptr<ImageWriter> writer;
};

std::vector<uint8_t> pages(const std::string& pattern) {  // 'x' a page of data, '.' a zero page
  std::vector<uint8_t> buffer(pattern.size() * kPage);
  for (size_t i = 0; i < pattern.size(); ++i) {
    if (pattern[i] == 'x') buffer[i * kPage + 4095] = 1;
  }
  return buffer;
}

// All pages that there are, or those that `wanted` says.
Result<uint64_t> put(ImageWriter& writer, const std::string& pattern, bool exact = false, std::string wanted = {}) {
  PagePiece piece;
  piece.address = 0x1000;
  piece.bytes = pattern.size() * kPage;
  piece.exact = exact;
  for (size_t i = 0; i < pattern.size(); ++i) piece.wanted[i] = wanted.empty() || wanted[i] == '1';
  RawSink sink(writer, RawSink::Writeback::kEarly);
  return sink.put(piece, pages(pattern).data());
}

uint64_t blocks_of(int fd) {
  struct stat info {};
  ::fstat(fd, &info);
  return static_cast<uint64_t>(info.st_blocks) * 512;
}

}  // namespace

TEST_CASE("zero pages cost nothing in the image") {
  Fixture f;
  auto written = put(*f.writer, std::string(256, '.'));
  REQUIRE(written.ok());
  CHECK(*written == 0);
  CHECK(f.writer->reserve_pages(0) == kPage);
}

TEST_CASE("a short gap of zero pages stays inside a run and takes no blocks") {
  Fixture f;
  auto written = put(*f.writer, "x..........x");
  REQUIRE(written.ok());
  CHECK(*written == 2 * kPage);
  CHECK(f.writer->reserve_pages(0) == kPage + 12 * kPage);
  CHECK(blocks_of(f.writer->fd()) < 12 * kPage);
}

TEST_CASE("a long gap of zero pages ends a run") {
  Fixture f;
  REQUIRE(put(*f.writer, "x" + std::string(100, '.') + "x").ok());
  CHECK(f.writer->reserve_pages(0) == kPage + 2 * kPage);
}

TEST_CASE("modified pages of a mapped file are kept exactly: zero ones too, clean neighbours not") {
  Fixture f;
  REQUIRE(put(*f.writer, "x..x", true, "1101").ok());  // page 2 is the file's
  CHECK(f.writer->reserve_pages(0) == kPage + 3 * kPage);
}
