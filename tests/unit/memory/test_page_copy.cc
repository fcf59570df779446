#include "memory/page_copy.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include "catch.h"
#include <sys/mman.h>
#include <unistd.h>

#include "core/fd.h"
#include "memory/file_source.h"
#include "memory/process_memory.h"

using namespace vmckpt;

namespace {

constexpr uint64_t kPage = kImagePageBytes;

// Pieces of four pages each, of which the first and the last are wanted; a page is full of its number.
class FourPages : public PageSource {
 public:
  explicit FourPages(size_t pieces) : pieces_(pieces) {}
  Result<void> find(const Take& take) override {
    for (size_t i = 0; i < pieces_; ++i) {
      PagePiece piece;
      piece.address = i * 4 * kPage;
      piece.bytes = 4 * kPage;
      piece.wanted.set(0).set(3);
      looked_at_bytes_ += piece.bytes;
      VMCKPT_TRY(take(piece));
    }
    return {};
  }
  Result<void> read(const PagePiece& piece, uint8_t* content) override {
    if (piece.address == fails_at) return error("the source has failed");
    for (size_t page : {0, 3}) std::fill_n(content + page * kPage, kPage, static_cast<uint8_t>(piece.address / kPage + page + 1));
    return {};
  }
  uint64_t bytes_looked_at() const override { return looked_at_bytes_; }

  uint64_t fails_at = ~uint64_t{0};

 private:
  size_t pieces_;
  uint64_t looked_at_bytes_ = 0;
};

class Collected : public PageSink {
 public:
  Result<uint64_t> put(const PagePiece& piece, const uint8_t* content) override {
    if (piece.address == fails_at) return error("the sink has failed");
    if (cancels != nullptr) cancels->cancelled = true;
    addresses.push_back(piece.address);
    bytes.append(reinterpret_cast<const char*>(content), piece.bytes);
    return 2 * kPage;
  }
  std::vector<uint64_t> addresses;
  std::string bytes;
  uint64_t fails_at = ~uint64_t{0};
  DumpProgress* cancels = nullptr;
};

PagePiece piece_of(size_t pages) {
  PagePiece piece;
  piece.bytes = pages * kPage;
  for (size_t i = 0; i < pages; ++i) piece.wanted.set(i);
  return piece;
}

}  // namespace

TEST_CASE("pieces reach the sink in their order, with zeros where a page is not wanted") {
  for (size_t pieces : {0, 1, 2, 100}) {
    INFO(pieces << " pieces");
    FourPages source(pieces);
    Collected sink;
    DumpProgress progress;
    REQUIRE(copy_pages(source, sink, progress).ok());
    REQUIRE(sink.addresses.size() == pieces);
    for (size_t page = 0; page < 4 * pieces; ++page) {
      const bool wanted = page % 4 == 0 || page % 4 == 3;
      CHECK(sink.bytes.substr(page * kPage, kPage) == std::string(kPage, wanted ? static_cast<char>(page + 1) : '\0'));
    }
    CHECK(progress.bytes_saved == pieces * 2 * kPage);
    CHECK(progress.bytes_done == pieces * 4 * kPage);
  }
}

TEST_CASE("a sink that can use several threads gets each piece once, and its first error ends the copy") {
  class Parallel : public Collected {
   public:
    Result<uint64_t> put(const PagePiece& piece, const uint8_t* content) override {
      const size_t now = ++inside_;
      most_inside = std::max<size_t>(most_inside, now);
      ::usleep(1000);
      std::lock_guard lock(mutex_);
      --inside_;
      return Collected::put(piece, content);
    }
    size_t most_threads() const override { return 3; }
    std::atomic<size_t> most_inside{0};

   private:
    std::atomic<size_t> inside_{0};
    std::mutex mutex_;
  };
  FourPages source(200);
  Parallel sink;
  DumpProgress progress;
  REQUIRE(copy_pages(source, sink, progress).ok());
  CHECK(sink.most_inside == 3);
  std::sort(sink.addresses.begin(), sink.addresses.end());
  REQUIRE(sink.addresses.size() == 200);
  for (size_t i = 0; i < 200; ++i) CHECK(sink.addresses[i] == i * 4 * kPage);

  FourPages again(200);
  Parallel failing_sink;
  failing_sink.fails_at = 100 * 4 * kPage;
  CHECK_THAT(copy_pages(again, failing_sink, progress).error().message(), Contains("the sink has failed"));
  CHECK(failing_sink.addresses.size() < 120);
}

TEST_CASE("a copy ends with the error of its source or of its sink, wherever it happens") {
  for (uint64_t piece : {0, 1, 50, 99}) {
    INFO("piece " << piece);
    DumpProgress progress;
    FourPages source(100), failing_source(100);
    Collected sink, failing_sink;
    failing_source.fails_at = failing_sink.fails_at = piece * 4 * kPage;
    CHECK_THAT(copy_pages(failing_source, sink, progress).error().message(), Contains("the source has failed"));
    CHECK_THAT(copy_pages(source, failing_sink, progress).error().message(), Contains("the sink has failed"));
    CHECK(failing_sink.addresses.size() == piece);
  }
}

TEST_CASE("a copy that is cancelled ends soon and says so") {
  FourPages source(100000);
  Collected sink;
  DumpProgress progress;
  sink.cancels = &progress;
  CHECK_THAT(copy_pages(source, sink, progress).error().message(), Contains("cancelled"));
  CHECK(sink.addresses.size() < 100);
}

TEST_CASE("a file's data is copied, not its holes, and its last page is filled up") {
  Fd file(::memfd_create("sparse", MFD_CLOEXEC));
  const std::string page(kPage, 'x'), rest(100, 'y');
  const uint64_t far = 5 * kMaxRecordBytes;
  REQUIRE(pwrite_exactly(file.get(), page.data(), page.size(), kPage, "memfd").ok());
  REQUIRE(pwrite_exactly(file.get(), rest.data(), rest.size(), far, "memfd").ok());
  FileSource source(file.get(), far + rest.size(), 7, "memfd");
  Collected sink;
  DumpProgress progress;
  REQUIRE(copy_pages(source, sink, progress).ok());
  CHECK(sink.addresses == std::vector<uint64_t>{kPage, far});
  CHECK(sink.bytes.substr(0, kPage) == page);
  CHECK(sink.bytes.substr(sink.bytes.size() - kPage) == rest + std::string(kPage - rest.size(), '\0'));
}

TEST_CASE("memory that a process may not read itself is read all the same, page by page where something is missing") {
  Fd file(::memfd_create("short", MFD_CLOEXEC));
  const std::string page(kPage, 'x');
  REQUIRE(write_exactly(file.get(), page.data(), page.size(), "memfd").ok());
  constexpr size_t kPages = 3;  // of which the file has the first
  void* at = ::mmap(nullptr, kPages * kPage, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
  REQUIRE(at != MAP_FAILED);
  const auto address = reinterpret_cast<uint64_t>(at);
  using Readable = ProcessMemory::Readable;
  using Unreadable = ProcessMemory::Unreadable;
  ProcessMemory memory(::getpid());
  std::string content(kPages * kPage, '?');
  auto* to = reinterpret_cast<uint8_t*>(content.data());

  auto refused = memory.read(piece_of(kPages), address, to, Readable::kMaybe, Unreadable::kError);
  REQUIRE_FALSE(refused.ok());
  CHECK(refused.error().err == EIO);
  CHECK_THAT(refused.error().message(), Contains(fmt::format("at {:#x}", address + kPage)));
  CHECK(memory.read(piece_of(kPages), address, to, Readable::kMaybe, Unreadable::kZeros).ok());
  CHECK(content == page + std::string(2 * kPage, '\0'));

  REQUIRE(::mprotect(at, kPages * kPage, PROT_NONE) == 0);
  for (Readable readable : {Readable::kMaybe, Readable::kNo}) {
    content.assign(kPage, '?');
    CHECK(memory.read(piece_of(1), address, reinterpret_cast<uint8_t*>(content.data()), readable, Unreadable::kError).ok());
    CHECK(content == page);
  }
  PagePiece some = piece_of(kPages);
  some.wanted.reset(1).reset(2);  // what is not wanted is not looked at
  content.assign(kPages * kPage, '?');
  CHECK(memory.read(some, address, reinterpret_cast<uint8_t*>(content.data()), Readable::kMaybe, Unreadable::kError).ok());
  CHECK(content == page + std::string(2 * kPage, '?'));
  ::munmap(at, kPages * kPage);
}
