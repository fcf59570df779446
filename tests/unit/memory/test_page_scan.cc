#include "memory/page_scan.h"

#include "catch.h"
#include <sys/mman.h>
#include <unistd.h>

#include "memory/maps.h"

using namespace vmckpt;

namespace {

constexpr uint64_t kPage = 4096;
constexpr int kGuardInstall = 102;

struct Mapped {
  explicit Mapped(size_t bytes_wanted, int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
      : bytes(bytes_wanted), start(static_cast<char*>(::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0))) {
    // A huge page would make neighbours of a touched page its own.
    ::madvise(start, bytes, MADV_NOHUGEPAGE);
  }
  ~Mapped() { ::munmap(start, bytes); }
  uint64_t address(size_t page) const { return reinterpret_cast<uint64_t>(start) + page * kPage; }
  size_t bytes;
  char* start;
};

// Pages of each kind, by number; spans are put together whatever way they come.
std::vector<size_t> pages_of(const Mapped& memory, PageSpan::Kind kind, PageScanner::Method method) {
  auto scanner = PageScanner::open(::getpid(), method);
  REQUIRE(scanner.ok());
  std::vector<size_t> pages;
  uint64_t reached = memory.address(0);
  auto scanned = scanner->scan(memory.address(0), memory.address(0) + memory.bytes, [&](const PageSpan& span) -> Result<void> {
    CHECK(span.start >= reached);
    reached = span.end;
    for (uint64_t at = span.start; at < span.end; at += kPage) {
      if (span.kind == kind) pages.push_back((at - memory.address(0)) / kPage);
    }
    return {};
  });
  CHECK(scanned.ok());
  return pages;
}

}  // namespace

TEST_CASE("only pages that were written are found, on kernels with and without PAGEMAP_SCAN") {
  Mapped memory(2000 * kPage);
  const std::vector<size_t> written = {0, 1, 2, 511, 512, 700, 1999};
  for (size_t page : written) memory.start[page * kPage] = 1;
  CHECK(pages_of(memory, PageSpan::Kind::kOwn, PageScanner::Method::kBest) == written);
  CHECK(pages_of(memory, PageSpan::Kind::kOwn, PageScanner::Method::kEntries) == written);
}

TEST_CASE("a mapping with nothing in it is passed over, however large it is") {
  Mapped memory(size_t{1} << 44);
  REQUIRE(memory.start != MAP_FAILED);
  CHECK(pages_of(memory, PageSpan::Kind::kOwn, PageScanner::Method::kBest).empty());
  CHECK(pages_of(memory, PageSpan::Kind::kOwn, PageScanner::Method::kEntries).empty());
}

TEST_CASE("many runs come one after the other, none twice and none left out") {
  Mapped memory(8000 * kPage);
  std::vector<size_t> written;
  for (size_t page = 0; page < 8000; page += 2) {
    memory.start[page * kPage] = 1;
    written.push_back(page);
  }
  CHECK(pages_of(memory, PageSpan::Kind::kOwn, PageScanner::Method::kBest) == written);
  CHECK(pages_of(memory, PageSpan::Kind::kOwn, PageScanner::Method::kEntries) == written);
}

TEST_CASE("guard regions are told from pages with content") {
  if (!host_has_guard_regions()) {
    WARN("not tested: guard regions need Linux 6.13");
    return;
  }
  Mapped memory(64 * kPage);
  for (size_t page = 0; page < 64; ++page) memory.start[page * kPage] = 1;
  REQUIRE(::madvise(memory.start + 8 * kPage, 2 * kPage, kGuardInstall) == 0);
  CHECK(pages_of(memory, PageSpan::Kind::kGuard, PageScanner::Method::kBest) == std::vector<size_t>{8, 9});
  CHECK(pages_of(memory, PageSpan::Kind::kOwn, PageScanner::Method::kBest).size() == 62);
}

TEST_CASE("a mapped file's own pages are not the process's") {
  Mapped shared(16 * kPage, MAP_SHARED | MAP_ANONYMOUS);
  for (size_t page = 0; page < 16; ++page) shared.start[page * kPage] = 1;
  CHECK(pages_of(shared, PageSpan::Kind::kOwn, PageScanner::Method::kBest).empty());
  CHECK(pages_of(shared, PageSpan::Kind::kOwn, PageScanner::Method::kEntries).empty());
}

TEST_CASE("what smaps says of each mapping is read") {
  auto uses = parse_mapping_uses(
      "1000-3000 rw-p 00000000 00:00 0    [heap]\nSize: 8 kB\nRss: 4 kB\nSwap: 12 kB\nSwapPss: 1 kB\nVmFlags: rd wr\n"
      "5000-6000 r--p 00000000 fd:01 77   /A file\nSize: 4 kB\nRss: 0 kB\nSwap: 0 kB\n");
  REQUIRE(uses.size() == 2);
  CHECK(uses[0].start == 0x1000);
  CHECK(uses[0].end == 0x3000);
  CHECK(uses[0].resident_kb == 4);
  CHECK(uses[0].swapped_kb == 12);
  CHECK(uses[1].resident_kb == 0);
}
