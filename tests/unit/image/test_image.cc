#include "catch.h"

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <random>
#include <set>

#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <google/protobuf/descriptor.h>
#include <xxhash.h>

#include "image/reader.h"
#include "image/schema.pb.h"
#include "image/tiny_image.h"
#include "image/trust.h"
#include "image/validate.h"
#include "image/writer.h"
#include "modules/credentials.pb.h"
#include "modules/kvm.pb.h"
#include "modules/process.pb.h"
#include "modules/seccomp.pb.h"
#include "modules/signals.pb.h"
#include "modules/threads.pb.h"

namespace vmckpt {
namespace {

namespace fs = std::filesystem;

// A directory of its own for each test, removed at the end.
class Scratch {
 public:
  Scratch() {
    std::string pattern = (fs::temp_directory_path() / "vmckpt-image-XXXXXX").string();
    REQUIRE(::mkdtemp(pattern.data()) != nullptr);
    path_ = pattern;
  }
  ~Scratch() { fs::remove_all(path_); }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }
  size_t entries() const {
    size_t count = 0;
    for (const auto& entry : fs::directory_iterator(path_)) count += !entry.path().empty();
    return count;
  }

 private:
  std::string path_;
};

void put_file(const std::string& path, const std::string& bytes) {
  Fd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  REQUIRE(write_exactly(fd.get(), bytes.data(), bytes.size(), path).ok());
}

std::string tiny_bytes(const Scratch& scratch) {
  auto bytes = test::tiny_image_bytes(scratch.path());
  REQUIRE(bytes.ok());
  return *bytes;
}

ImageHeader header_of(const std::string& bytes) {
  ImageHeader header;
  std::memcpy(&header, bytes.data(), sizeof header);
  return header;
}

// What the reader says about the image after `edit` and, when asked, putting the checksums right again.
std::string verdict(const Scratch& scratch, const std::string& bytes) {
  std::string path = scratch / "edited.ckpt";
  put_file(path, bytes);
  auto reader = ImageReader::open(path);
  if (!reader) return reader.error().message();
  auto pages = reader->verify_pages();
  return pages ? "ok" : pages.error().message();
}

std::string verdict_on_header(const Scratch& scratch, const std::function<void(ImageHeader&)>& edit) {
  std::string bytes = tiny_bytes(scratch);
  ImageHeader header = header_of(bytes);
  edit(header);
  std::memcpy(bytes.data(), &header, sizeof header);
  test::fix_checksums(bytes);
  return verdict(scratch, bytes);
}

std::string verdict_on_records(const Scratch& scratch, const std::function<void(PageRecord*)>& edit) {
  std::string bytes = tiny_bytes(scratch);
  auto* records = reinterpret_cast<PageRecord*>(bytes.data() + header_of(bytes).sections[1].offset);
  edit(records);
  test::fix_checksums(bytes);
  return verdict(scratch, bytes);
}

// The same pages, as a kind of record that stores nothing.
PageRecord without_content(const PageRecord& record, PageKind kind) {
  return {record.object, record.address, record.bytes, kind, PageCodec::kNone, 0, kStoreThisFile, 0, 0, 0};
}

// Puts other metadata, and records, into the tiny image by hand: the writer would refuse it.
std::string verdict_on_metadata(const Scratch& scratch, const std::function<void(pb::Image&)>& edit,
                                const std::function<void(PageRecord*)>& edit_records = [](PageRecord*) {}) {
  std::string bytes = tiny_bytes(scratch);
  ImageHeader header = header_of(bytes);
  std::string index = bytes.substr(header.sections[1].offset, header.sections[1].bytes);
  edit_records(reinterpret_cast<PageRecord*>(index.data()));
  pb::Image image = test::tiny_metadata();
  edit(image);
  std::string metadata = image.SerializeAsString();
  bytes.resize(header.sections[0].offset);
  bytes += metadata;
  bytes.resize((bytes.size() + 7) / 8 * 8);
  header.sections[0].bytes = metadata.size();
  header.sections[1].offset = bytes.size();
  bytes += index;
  header.file_bytes = bytes.size();
  std::memcpy(bytes.data(), &header, sizeof header);
  test::fix_checksums(bytes);
  return verdict(scratch, bytes);
}

Result<std::string> write_tiny(const ImageDestination& destination, ImageIdentity identity = test::tiny_identity()) {
  ImageWriter writer = VMCKPT_TRY(ImageWriter::create(destination, identity));
  VMCKPT_TRY(test::write_tiny_pages(writer));
  pb::Image metadata = test::tiny_metadata();
  metadata.mutable_target()->set_target_id(identity.target_id.data(), identity.target_id.size());
  return test::finish(writer, metadata);
}

// From now on open() says what file systems without unnamed files say.
void forbid_unnamed_files() {
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_openat, 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args) + 2 * sizeof(uint64_t)),  // flags, low half
      BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, O_TMPFILE & ~O_DIRECTORY, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EOPNOTSUPP),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  sock_fprog program{std::size(filter), filter};
  ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  if (::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) < 0) ::_exit(77);
}

// Runs `body` in a child, for what cannot be undone in a process; true when it returned true.
bool in_child(const std::function<bool()>& body) {
  pid_t child = ::fork();
  if (child == 0) ::_exit(body() ? 0 : 1);
  int status = -1;
  return ::waitpid(child, &status, 0) == child && status == 0;
}

// The bytes as `hexdump -C` prints them.
std::string hexdump(const std::string& bytes) {
  std::string text, previous;
  bool starred = false;
  for (size_t at = 0; at < bytes.size(); at += 16) {
    const std::string row = bytes.substr(at, 16);
    if (row == previous && row.size() == 16) {
      if (!starred) text += "*\n";
      starred = true;
      continue;
    }
    starred = false;
    previous = row;
    std::string digits, letters;
    for (size_t i = 0; i < 16; ++i) {
      if (i == 8) digits += " ";
      digits += i < row.size() ? fmt::format("{:02x} ", static_cast<unsigned char>(row[i])) : "   ";
      if (i < row.size()) letters += row[i] >= 0x20 && row[i] < 0x7f ? row[i] : '.';
    }
    text += fmt::format("{:08x}  {} |{}|\n", at, digits, letters);
  }
  return text + fmt::format("{:08x}\n", bytes.size());
}

std::string said_by(Result<std::string> result) { return result ? *result : result.error().message(); }

}  // namespace

TEST_CASE("an image that was written reads back as it was") {
  Scratch scratch;
  auto path = write_tiny({.path = scratch / "a.ckpt"});
  REQUIRE(path.ok());
  CHECK(*path == scratch / "a.ckpt");

  auto reader = ImageReader::open(*path);
  REQUIRE(reader.ok());
  CHECK(reader->path() == *path);
  CHECK(reader->metadata().SerializeAsString() == test::tiny_metadata().SerializeAsString());
  CHECK(reader->header().format_version == kImageFormatVersion);
  CHECK(reader->header().created_unix_us > 0);
  REQUIRE(reader->pages().records().size() == 2);
  CHECK(reader->pages().records_of(0).size() == 1);
  CHECK(reader->pages().records_of(test::kTinyCapturedId).size() == 1);
  CHECK(reader->pages().records_of(7).empty());
  CHECK(reader->verify_pages().ok());

  struct stat status;
  REQUIRE(::stat(path->c_str(), &status) == 0);
  CHECK((status.st_mode & 07777) == 0600);
}

TEST_CASE("the hexdump in docs/image-format.md is of the tiny image") {
  Scratch scratch;
  const fs::path page = fs::path(__FILE__).parent_path() / "../../../docs/image-format.md";
  auto text = read_whole_file(page);
  if (!text) {
    WARN("skipped: no " << page << " from here");
    return;
  }
  CHECK_THAT(*text, Contains("```\n" + hexdump(tiny_bytes(scratch)) + "```\n"));
}

TEST_CASE("records added in any order are sorted in the image") {
  Scratch scratch;
  auto writer = ImageWriter::create({.path = scratch / "a.ckpt"}, test::tiny_identity());
  REQUIRE(writer.ok());
  std::string page(kImagePageBytes, 'x');
  uint64_t hash = XXH3_64bits(page.data(), page.size());
  for (uint64_t number : {1, 0}) {
    uint64_t offset = writer->reserve_pages(page.size());
    REQUIRE(writer->write_pages(page.data(), page.size(), offset).ok());
    writer->add_record(plain_record(0, test::kTinyHeapStart + number * kImagePageBytes, page.size(), offset, hash));
  }
  CHECK(writer->page_bytes_written() == 2 * kImagePageBytes);
  REQUIRE(test::finish(*writer, test::tiny_metadata()).ok());
  CHECK(writer->file_bytes() >= 3 * kImagePageBytes);
  auto reader = ImageReader::open(scratch / "a.ckpt");
  REQUIRE(reader.ok());
  CHECK(reader->pages().records()[0].address < reader->pages().records()[1].address);
  CHECK(reader->verify_pages().ok());
}

TEST_CASE("a sealed image is whole and has no name until it is published") {
  Scratch scratch;
  const std::string path = scratch / "a.ckpt";
  {
    auto writer = ImageWriter::create({.path = path}, test::tiny_identity());
    REQUIRE(writer.ok());
    CHECK_THAT(writer->publish().error().message(), Contains("is not sealed"));
    REQUIRE(test::write_tiny_pages(*writer).ok());
    REQUIRE(writer->seal(test::tiny_metadata()).ok());
    CHECK_THAT(writer->seal(test::tiny_metadata()).error().message(), Contains("is sealed already"));
    CHECK_FALSE(std::filesystem::exists(path));
    Scratch elsewhere;
    std::filesystem::copy_file("/proc/self/fd/" + std::to_string(writer->fd()), elsewhere / "copy.ckpt");
    auto reader = ImageReader::open(elsewhere / "copy.ckpt");
    REQUIRE(reader.ok());
    CHECK(reader->verify_pages().ok());
  }
  CHECK(std::filesystem::is_empty(scratch / "."));  // one that is not published leaves nothing
  auto writer = ImageWriter::create({.path = path}, test::tiny_identity());
  REQUIRE(writer.ok());
  REQUIRE(test::write_tiny_pages(*writer).ok());
  REQUIRE(writer->seal(test::tiny_metadata()).ok());
  CHECK(writer->publish().value() == path);
  CHECK(ImageReader::open(path).ok());
  CHECK_THAT(writer->publish().error().message(), Contains("is published already"));
}

TEST_CASE("pages that were not written are holes, cost no disk and read as zeros") {
  Scratch scratch;
  constexpr uint64_t kHoleBytes = uint64_t{64} << 20;
  auto writer = ImageWriter::create({.path = scratch / "a.ckpt"}, test::tiny_identity());
  REQUIRE(writer.ok());
  uint64_t offset = writer->reserve_pages(kHoleBytes);
  std::string zeros(kImagePageBytes, '\0');
  writer->add_record(
      plain_record(0, test::kTinyHeapStart, zeros.size(), offset + kHoleBytes / 2, XXH3_64bits(zeros.data(), zeros.size())));
  REQUIRE(test::finish(*writer, test::tiny_metadata()).ok());
  CHECK(writer->page_bytes_written() == 0);
  CHECK(writer->file_bytes() < kHoleBytes / 8);
  auto reader = ImageReader::open(scratch / "a.ckpt");
  REQUIRE(reader.ok());
  CHECK(reader->header().file_bytes > kHoleBytes);
  CHECK(reader->verify_pages().ok());
}

TEST_CASE("a run of pages can be mapped privately from the image") {
  Scratch scratch;
  auto path = write_tiny({.path = scratch / "a.ckpt"});
  REQUIRE(path.ok());
  auto reader = ImageReader::open(*path);
  REQUIRE(reader.ok());
  PageRun run = reader->pages().runs_of(0).front();
  void* at = ::mmap(nullptr, run.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, reader->fd(), static_cast<off_t>(run.file_offset));
  REQUIRE(at != MAP_FAILED);
  auto* bytes = static_cast<char*>(at);
  CHECK(bytes[0] == 'A');
  CHECK(bytes[kImagePageBytes] == '\0');
  bytes[0] = 'Z';  // stays private: the image remains whole
  ::munmap(at, run.bytes);
  CHECK(reader->verify_pages().ok());
}

TEST_CASE("an image cut off anywhere is refused") {
  Scratch scratch;
  const std::string bytes = tiny_bytes(scratch);
  const ImageHeader header = header_of(bytes);
  std::vector<uint64_t> lengths = {0, 1, 8, 96, 4088, 4095, 4096, 4097, bytes.size() - 1};
  for (uint32_t i = 0; i < header.section_count; ++i) {
    for (int64_t near : {-1, 0, 1}) {
      lengths.push_back(header.sections[i].offset + near);
      lengths.push_back(
          std::min<uint64_t>(header.sections[i].offset + header.sections[i].bytes + near, bytes.size() - 1));
    }
  }
  for (uint64_t length : lengths) {
    INFO("cut to " << length << " bytes");
    CHECK_THAT(verdict(scratch, bytes.substr(0, length)), !Contains("ok") && Contains("edited.ckpt"));
  }
  CHECK_THAT(verdict(scratch, bytes + "x"), Contains("its header says"));
  CHECK(verdict(scratch, bytes) == "ok");
}

TEST_CASE("a flipped bit anywhere that matters is found") {
  Scratch scratch;
  const std::string bytes = tiny_bytes(scratch);
  const ImageHeader header = header_of(bytes);
  std::vector<std::pair<uint64_t, uint64_t>> areas = {{0, sizeof header}};  // offset and length
  for (uint32_t i = 0; i < header.section_count; ++i)
    areas.push_back({header.sections[i].offset, header.sections[i].bytes});
  const auto* records = reinterpret_cast<const PageRecord*>(bytes.data() + header.sections[1].offset);
  for (int i = 0; i < 2; ++i) areas.push_back({records[i].offset, records[i].stored_bytes});

  const unsigned seed = std::random_device()();
  INFO("seed " << seed);
  std::mt19937_64 random(seed);
  for (auto [offset, length] : areas) {
    for (int round = 0; round < 50; ++round) {
      uint64_t at = offset + random() % length;
      std::string damaged = bytes;
      damaged[at] = static_cast<char>(damaged[at] ^ (1 << (random() % 8)));
      INFO("flipped a bit of byte " << at);
      CHECK(verdict(scratch, damaged) != "ok");
    }
  }
}

TEST_CASE("damaged page data is named by address and file offset, and does not stop the image from opening") {
  Scratch scratch;
  std::string bytes = tiny_bytes(scratch);
  bytes[kImagePageBytes + 5] ^= 1;
  put_file(scratch / "a.ckpt", bytes);
  auto reader = ImageReader::open(scratch / "a.ckpt");
  REQUIRE(reader.ok());
  auto verified = reader->verify_pages();
  REQUIRE_FALSE(verified.ok());
  CHECK_THAT(verified.error().message(), Contains("memory 0x10000000-0x10002000") && Contains("file offset 4096"));
}

TEST_CASE("an image that needs a newer reader is refused with both versions named") {
  Scratch scratch;
  std::string said = verdict_on_header(scratch, [](ImageHeader& header) {
    header.format_version = 9;
    header.min_reader_version = 7;
  });
  CHECK_THAT(said, Contains("format version 9") && Contains("version 7 or newer") && Contains("up to version 2"));
}

TEST_CASE("an image of a newer format that this reader may read is read") {
  Scratch scratch;
  CHECK(verdict_on_header(scratch, [](ImageHeader& header) { header.format_version = 3; }) == "ok");
}

TEST_CASE("an image of format 1 is refused with what to do") {
  Scratch scratch;
  // Version 1 had the same header page; nothing behind it is looked at.
  std::string bytes(3 * kImagePageBytes, '\0');
  ImageHeader header = header_of(tiny_bytes(scratch));
  header.format_version = header.min_reader_version = 1;
  header.file_bytes = bytes.size();
  header.sections[0] = {1, 0, kImagePageBytes, 1000, 1};
  header.sections[1] = {2, 0, 2 * kImagePageBytes, 80, 1};
  header.header_xxh3 = XXH3_64bits(&header, offsetof(ImageHeader, header_xxh3));
  std::memcpy(bytes.data(), &header, sizeof header);
  CHECK_THAT(verdict(scratch, bytes),
             Contains("has format version 1; this vmckpt reads version 2") &&
                 Contains("restart it with the vmckpt that made it, or launch the program with this one"));
}

TEST_CASE("an unknown section is refused unless it says that it may be skipped") {
  Scratch scratch;
  auto add = [](uint32_t flags) {
    return [flags](ImageHeader& header) {
      header.sections[2] = {99, flags, header.file_bytes / 8 * 8, 0, XXH3_64bits("", 0)};
      header.section_count = 3;
    };
  };
  CHECK_THAT(verdict_on_header(scratch, add(0)), Contains("section of kind 99"));
  CHECK(verdict_on_header(scratch, add(kSectionSkippable)) == "ok");
}

TEST_CASE("a hostile header is refused") {
  Scratch scratch;
  auto refused = [&](const char* what, const std::function<void(ImageHeader&)>& edit) {
    INFO(what);
    CHECK_THAT(verdict_on_header(scratch, edit), Contains("edited.ckpt") && !Contains("ok"));
  };
  refused("other magic", [](ImageHeader& h) { h.magic[0] = 'X'; });
  refused("zero magic", [](ImageHeader& h) { std::memset(h.magic, 0, sizeof h.magic); });
  refused("no version", [](ImageHeader& h) { h.format_version = h.min_reader_version = 0; });
  refused("version below its minimum", [](ImageHeader& h) { h.format_version = 0; });
  refused("other page size", [](ImageHeader& h) { h.page_bytes = 65536; });
  refused("other machine", [](ImageHeader& h) { h.machine = 183; });
  refused("reserved word", [](ImageHeader& h) { h.reserved0 = 1; });
  refused("reserved byte", [](ImageHeader& h) { h.reserved[sizeof h.reserved - 1] = 1; });
  refused("file length", [](ImageHeader& h) { h.file_bytes += 1; });
  refused("huge section count", [](ImageHeader& h) { h.section_count = UINT32_MAX; });
  refused("no sections", [](ImageHeader& h) {
    h.section_count = 0;
    std::memset(h.sections, 0, sizeof h.sections);
  });
  refused("unused entry in use", [](ImageHeader& h) { h.sections[31].offset = 8; });
  refused("metadata twice", [](ImageHeader& h) { h.sections[1].kind = h.sections[0].kind; });
  refused("unknown section flag", [](ImageHeader& h) { h.sections[0].flags = 2; });
  refused("section in the header page", [](ImageHeader& h) { h.sections[0].offset = 0; });
  refused("section beyond the file", [](ImageHeader& h) { h.sections[0].offset = h.file_bytes + 8; });
  refused("section longer than the file", [](ImageHeader& h) { h.sections[0].bytes = h.file_bytes; });
  refused("section end wraps", [](ImageHeader& h) { h.sections[0].bytes = UINT64_MAX - h.sections[0].offset + 100; });
  refused("unaligned section", [](ImageHeader& h) { h.sections[0].offset += 1; });
  refused("overlapping sections", [](ImageHeader& h) { h.sections[1].offset = h.sections[0].offset; });
  refused("index not of whole records", [](ImageHeader& h) { h.sections[1].bytes -= 1; });
  refused("index over page data", [](ImageHeader& h) {
    h.sections[1].offset = 4096;
    h.sections[1].bytes = 2 * sizeof(PageRecord);
  });
}

TEST_CASE("a huge sparse file that claims a huge page index is refused without reading it") {
  Scratch scratch;
  std::string bytes = tiny_bytes(scratch);
  ImageHeader header = header_of(bytes);
  header.sections[1].bytes = (uint64_t{1} << 40) / sizeof(PageRecord) * sizeof(PageRecord);
  header.file_bytes = header.sections[1].offset + header.sections[1].bytes;
  header.header_xxh3 = XXH3_64bits(&header, offsetof(ImageHeader, header_xxh3));
  std::memcpy(bytes.data(), &header, sizeof header);
  put_file(scratch / "a.ckpt", bytes);
  REQUIRE(::truncate((scratch / "a.ckpt").c_str(), static_cast<off_t>(header.file_bytes)) == 0);
  auto reader = ImageReader::open(scratch / "a.ckpt");
  REQUIRE_FALSE(reader.ok());
  CHECK_THAT(reader.error().message(), Contains("page index has 10995"));
}

TEST_CASE("a hostile page index is refused") {
  Scratch scratch;
  auto refused = [&](const char* what, const char* said, const std::function<void(PageRecord*)>& edit) {
    INFO(what);
    CHECK_THAT(verdict_on_records(scratch, edit), Contains(said));
  };
  refused("no pages", "length of 0", [](PageRecord* r) { r[0].bytes = 0; });
  refused("half a page", "length of 2048", [](PageRecord* r) { r[0].bytes = 2048; });
  refused("too long", "length of", [](PageRecord* r) { r[0].bytes = kMaxRecordBytes + kImagePageBytes; });
  refused("length that wraps", "length of", [](PageRecord* r) { r[0].bytes = UINT32_MAX - kImagePageBytes + 1; });
  refused("unaligned address", "not page aligned", [](PageRecord* r) { r[0].address += 1; });
  refused("address that wraps", "out of range", [](PageRecord* r) { r[0].address = UINT64_MAX - kImagePageBytes + 1; });
  refused("content in the header", "outside the page data", [](PageRecord* r) { r[0].offset = 0; });
  refused("unaligned content", "not page aligned", [](PageRecord* r) { r[1].offset -= 8; });
  refused("content over the sections", "outside the page data",
          [](PageRecord* r) { r[0].offset += 2 * kImagePageBytes; });
  refused("content that wraps", "outside the page data", [](PageRecord* r) { r[0].offset = UINT64_MAX - 4095; });
  refused("out of order", "out of order", [](PageRecord* r) { std::swap(r[0], r[1]); });
  refused("overlap", "out of order", [](PageRecord* r) {
    r[1] = r[0];
    r[1].address += kImagePageBytes;
    r[1].bytes = r[1].stored_bytes = kImagePageBytes;
  });
  refused("unmapped memory", "not within one mapping", [](PageRecord* r) { r[0].address += 16 * kImagePageBytes; });
  refused("end outside its mapping", "not within one mapping", [](PageRecord* r) { r[0].address += kImagePageBytes; });
  refused("shared memory by address", "not private", [](PageRecord* r) {
    r[0].address = 0x20000000;
    r[0].bytes = r[0].stored_bytes = kImagePageBytes;
  });
  refused("unknown captured file", "no captured file", [](PageRecord* r) { r[1].object = 12; });
  refused("beyond its captured file", "beyond the file's 100 bytes",
          [](PageRecord* r) { r[1].address = kImagePageBytes; });
  refused("reserved bytes", "reserved bytes that are not zero", [](PageRecord* r) { r[0].reserved = 1; });
  refused("nothing stored", "has 0 bytes stored", [](PageRecord* r) { r[0].stored_bytes = 0; });
  refused("more stored than there is", "has 12288 bytes stored", [](PageRecord* r) {
    r[0].stored_bytes = 3 * kImagePageBytes;
    r[0].offset = kImagePageBytes;
  });
  refused("less stored without a codec", "not compressed and has 4096 bytes stored instead of 8192",
          [](PageRecord* r) { r[0].stored_bytes = kImagePageBytes; });
  refused("a store that the image does not name", "in store 1; the image names 0", [](PageRecord* r) { r[0].store = 1; });
  for (PageKind kind : {PageKind::kZero, PageKind::kAbsent, PageKind::kInBase}) {
    INFO("kind " << static_cast<int>(kind));
    refused("kinds without content that store some", "stores something", [&](PageRecord* r) { r[0].kind = kind; });
    refused("a kind and a store that do not fit", "which records of its kind cannot", [&](PageRecord* r) {
      r[0] = without_content(r[0], kind);
      r[0].store = kind == PageKind::kInBase ? kStoreThisFile : 1;
    });
  }
}

TEST_CASE("records may have the same content, which is verified once, and no part of it in common") {
  Scratch scratch;
  constexpr uint64_t kRecords = 4000, kBytes = 64 * kImagePageBytes;
  pb::Image metadata = test::tiny_metadata();
  metadata.mutable_address_spaces(0)->mutable_mappings(1)->set_end(test::kTinyHeapStart + kRecords * kBytes);
  metadata.mutable_address_spaces(0)->mutable_mappings(2)->set_start(0x200000000);
  metadata.mutable_address_spaces(0)->mutable_mappings(2)->set_end(0x200000000 + kImagePageBytes);
  const std::string content(2 * kBytes, 'x');
  auto written = [&](const std::function<PageRecord(PageRecord, uint64_t)>& edit) {
    const std::string path = scratch / "shared.ckpt";
    ::unlink(path.c_str());
    auto writer = ImageWriter::create({.path = path}, test::tiny_identity());
    REQUIRE(writer.ok());
    const uint64_t offset = writer->reserve_pages(2 * kBytes), xxh3 = XXH3_64bits(content.data(), kBytes);
    REQUIRE(writer->write_pages(content.data(), content.size(), offset).ok());
    for (uint64_t i = 0; i < kRecords; ++i) {
      writer->add_record(edit(plain_record(0, test::kTinyHeapStart + i * kBytes, kBytes, offset, xxh3), i));
    }
    return said_by(test::finish(*writer, metadata));
  };
  REQUIRE(written([](PageRecord record, uint64_t) { return record; }) == scratch / "shared.ckpt");
  auto reader = ImageReader::open(scratch / "shared.ckpt");
  REQUIRE(reader.ok());
  CHECK(reader->pages().size().bytes == kRecords * kBytes);
  // /proc/thread-self/io counts what was read: without this the same 256 KiB come 4000 times.
  auto read_so_far = [] {
    std::ifstream io("/proc/thread-self/io");
    std::string name;
    uint64_t bytes = 0;
    io >> name >> bytes;
    return bytes;
  };
  const uint64_t before = read_so_far();
  CHECK(reader->verify_pages().ok());
  CHECK(read_so_far() - before < 2 * kBytes);

  CHECK_THAT(written([](PageRecord record, uint64_t i) {
    record.offset += i * kImagePageBytes % kBytes;
    return record;
  }), Contains("in part in common with the page record"));
  CHECK_THAT(written([](PageRecord record, uint64_t i) {
    record.stored_xxh3 += i;
    return record;
  }), Contains("in part in common"));
  CHECK_THAT(written([](PageRecord record, uint64_t i) {
    if (i % 2 != 0) record.bytes = record.stored_bytes = kImagePageBytes;
    return record;
  }), Contains("in part in common"));
}

TEST_CASE("what only a newer vmckpt can read is refused as that") {
  Scratch scratch;
  auto refused = [&](const char* said, const std::function<void(PageRecord*)>& edit) {
    INFO(said);
    CHECK_THAT(verdict_on_records(scratch, edit), Contains(said) && Contains("use a newer vmckpt"));
  };
  refused("is compressed (zstd)", [](PageRecord* r) {
    r[0].codec = PageCodec::kZstd;
    r[0].stored_bytes = 100;
  });
  refused("has the codec 9", [](PageRecord* r) { r[0].codec = static_cast<PageCodec>(9); });
  refused("is of kind 0", [](PageRecord* r) { r[0].kind = static_cast<PageKind>(0); });
  refused("is of kind 200", [](PageRecord* r) { r[0].kind = static_cast<PageKind>(200); });
  refused("in a base image", [](PageRecord* r) {
    r[0] = without_content(r[0], PageKind::kInBase);
    r[0].store = 1;
  });
  auto add_store = [](pb::Image& i) { i.add_page_stores()->set_base_image_id(std::string(16, 'b')); };
  const std::string said = verdict_on_metadata(scratch, add_store, [](PageRecord* r) { r[0].store = 1; });
  CHECK_THAT(said, Contains("store 1, which is another image") && Contains("use a newer vmckpt"));
}

TEST_CASE("a store that no record needs does no harm, and one that is no image is refused") {
  Scratch scratch;
  auto verdict_on_id = [&](const std::string& id) {
    return verdict_on_metadata(scratch, [&](pb::Image& i) { i.add_page_stores()->set_base_image_id(id); });
  };
  CHECK(verdict_on_id(std::string(16, 'b')) == "ok");
  CHECK_THAT(verdict_on_id("short"), Contains("5 bytes instead of 16"));
  CHECK_THAT(verdict_on_metadata(scratch, [](pb::Image& i) { i.add_page_stores(); }),
             Contains("page_stores: base image id has 0 bytes instead of 16"));
}

TEST_CASE("pages are read as data, as zeros, and where nothing is as zeros too") {
  Scratch scratch;
  pb::Image metadata = test::tiny_metadata();
  metadata.mutable_address_spaces(0)->mutable_mappings(1)->set_end(test::kTinyHeapStart + 8 * kImagePageBytes);
  auto writer = ImageWriter::create({.path = scratch / "a.ckpt"}, test::tiny_identity());
  REQUIRE(writer.ok());
  const std::string content(kImagePageBytes, 'x');
  const uint64_t xxh3 = XXH3_64bits(content.data(), content.size());
  for (uint64_t page : {1, 3}) {  // neighbours in the file, not in memory
    const uint64_t offset = writer->reserve_pages(kImagePageBytes);
    REQUIRE(writer->write_pages(content.data(), kImagePageBytes, offset).ok());
    writer->add_record(plain_record(0, test::kTinyHeapStart + page * kImagePageBytes, kImagePageBytes, offset, xxh3));
  }
  const uint64_t offset = writer->reserve_pages(kImagePageBytes);
  REQUIRE(writer->write_pages(content.data(), kImagePageBytes, offset).ok());
  PageRecord record = plain_record(0, test::kTinyHeapStart + 4 * kImagePageBytes, kImagePageBytes, offset, xxh3);
  writer->add_record(record);
  for (auto [page, kind] : {std::pair{5, PageKind::kZero}, {6, PageKind::kAbsent}}) {
    record.address = test::kTinyHeapStart + static_cast<uint64_t>(page) * kImagePageBytes;
    writer->add_record(without_content(record, kind));
  }
  REQUIRE(test::finish(*writer, metadata).ok());
  auto reader = ImageReader::open(scratch / "a.ckpt");
  REQUIRE(reader.ok());
  const PageIndex& pages = reader->pages();
  CHECK(pages.verify().ok());

  // .x.xxz-. with '-' absent: what a reader sees
  const std::vector<PageRun> runs = pages.runs_of(0);
  REQUIRE(runs.size() == 3);
  CHECK(runs[0].address == test::kTinyHeapStart + kImagePageBytes);
  CHECK(runs[1].address == test::kTinyHeapStart + 3 * kImagePageBytes);
  CHECK(runs[1].bytes == 2 * kImagePageBytes);
  CHECK(runs[2].zero);
  CHECK(pages.size().bytes == 3 * kImagePageBytes);
  CHECK(pages.size_of(0, test::kTinyHeapStart + 2 * kImagePageBytes, UINT64_MAX).stored_bytes == 2 * kImagePageBytes);

  std::string wanted(8 * kImagePageBytes, '\0'), got(8 * kImagePageBytes, '?');
  for (size_t page : {1, 3, 4}) std::fill_n(wanted.begin() + static_cast<long>(page * kImagePageBytes), kImagePageBytes, 'x');
  CHECK(*pages.read(0, test::kTinyHeapStart, got.data(), got.size()));
  CHECK(got == wanted);
  std::string part(3 * kImagePageBytes, '?');
  CHECK(*pages.read(0, test::kTinyHeapStart + 100, part.data(), part.size()));
  CHECK(part == wanted.substr(100, part.size()));
  for (uint64_t page : {0, 2, 6, 7}) {  // no record has these
    std::string nothing(kImagePageBytes, '?');
    CHECK_FALSE(*pages.read(0, test::kTinyHeapStart + page * kImagePageBytes, nothing.data(), nothing.size()));
    CHECK(nothing == std::string(kImagePageBytes, '\0'));
  }
  std::string taken;
  CHECK(pages.read_all(0, [&](uint64_t address, const uint8_t* at, uint64_t bytes) {
          CHECK(bytes == kImagePageBytes);
          taken += fmt::format("{}{} ", (address - test::kTinyHeapStart) / kImagePageBytes, *at == 'x' ? 'x' : 'z');
          return Result<void>();
        }).ok());
  CHECK(taken == "1x 3x 4x 5z ");
}

namespace {

pb::Thread* leader_of(pb::Image& image) { return image.mutable_processes(0)->mutable_threads(0); }
pb::ThreadState* state_of(pb::Image& image) { return leader_of(image)->MutableExtension(pb::thread_state); }

}  // namespace

TEST_CASE("metadata that cannot be restarted is refused") {
  Scratch scratch;
  auto refused = [&](const char* said, const std::function<void(pb::Image&)>& edit) {
    INFO(said);
    CHECK_THAT(verdict_on_metadata(scratch, edit), Contains(said));
  };
  CHECK(verdict_on_metadata(scratch, [](pb::Image&) {}) == "ok");
  refused("no target", [](pb::Image& i) { i.Clear(); });
  refused("no thread", [](pb::Image& i) { i.mutable_processes(0)->clear_threads(); });
  refused("not the leader", [](pb::Image& i) { leader_of(i)->set_tid(101); });
  refused("there twice", [](pb::Image& i) { *i.mutable_processes(0)->add_threads() = i.processes(0).threads(0); });
  refused("thread 100, thread_state: registers has 5 bytes instead of 216",
          [](pb::Image& i) { state_of(i)->set_registers("short"); });
  refused("xstate has 100000 bytes instead of 576 to 65536",
          [](pb::Image& i) { state_of(i)->set_xstate(std::string(100000, 'x')); });
  refused("pid is -1 instead of 1 or more", [](pb::Image& i) { i.mutable_processes(0)->set_pid(-1); });
  refused("different targets", [](pb::Image& i) { i.mutable_target()->set_target_id(std::string(16, 'x')); });
  refused("target: target id has 3 bytes instead of 16", [](pb::Image& i) { i.mutable_target()->set_target_id("abc"); });
  refused("has a slash", [](pb::Image& i) { i.mutable_target()->set_name("../evil"); });
  refused("process 100, process_state: arguments has a NUL byte", [](pb::Image& i) {
    i.mutable_processes(0)->MutableExtension(pb::process_state)->add_arguments(std::string("a\0b", 3));
  });
  refused("whole pages", [](pb::Image& i) { i.mutable_address_spaces(0)->mutable_mappings(0)->set_start(0x400001); });
  refused("empty", [](pb::Image& i) { i.mutable_address_spaces(0)->mutable_mappings(0)->set_end(0x400000); });
  refused("outside user space", [](pb::Image& i) {
    i.mutable_address_spaces(0)->mutable_mappings(2)->set_start(0xffffffffff600000);
    i.mutable_address_spaces(0)->mutable_mappings(2)->set_end(0xffffffffff601000);
  });
  refused("overlaps", [](pb::Image& i) { *i.mutable_address_spaces(0)->add_mappings() = i.address_spaces(0).mappings(0); });
  refused("unknown kind", [](pb::Image& i) { i.mutable_address_spaces(0)->mutable_mappings(0)->clear_kind(); });
  refused("does not know",
          [](pb::Image& i) {
            // An enum's unknown values are unknown fields.
            pb::Mapping* mapping = i.mutable_address_spaces(0)->mutable_mappings(0);
            mapping->clear_kind();
            mapping->GetReflection()->MutableUnknownFields(mapping)->AddVarint(1, 77);
          });
  refused("not an absolute one",
          [](pb::Image& i) { i.mutable_address_spaces(0)->mutable_mappings(0)->mutable_file()->set_path("bin/tiny"); });
  refused("which is not there", [](pb::Image& i) { i.mutable_address_spaces(0)->mutable_mappings(2)->set_captured_id(5); });
  refused("protection is 255 instead of at most 7",
          [](pb::Image& i) { i.mutable_address_spaces(0)->mutable_mappings(0)->set_protection(0xff); });
  refused("captured file id 1 is there twice",
          [](pb::Image& i) { *i.add_captured_files() = i.captured_files(0); });
  refused("process 100, pending_signals: number is 65 instead of 1 to 64", [](pb::Image& i) {
    auto& signal = *i.mutable_processes(0)->AddExtension(pb::pending_signals);
    signal.set_number(65);
    signal.set_info(std::string(128, '\0'));
  });
  refused("process 100, thread 100, own_pending_signals: info has 0 bytes instead of 128",
          [](pb::Image& i) { leader_of(i)->AddExtension(pb::own_pending_signals)->set_number(10); });
  refused("filters: program has 3 bytes, no multiple of 8", [](pb::Image& i) {
    leader_of(i)->MutableExtension(pb::seccomp)->add_filters()->set_program("odd");
  });
  refused("there are 5 uid instead of 4", [](pb::Image& i) { leader_of(i)->MutableExtension(pb::credentials)->add_uid(1); });
  refused("uid is missing", [](pb::Image& i) { leader_of(i)->MutableExtension(pb::credentials)->clear_uid(); });
  refused("credentials is missing", [](pb::Image& i) { leader_of(i)->ClearExtension(pb::credentials); });
  refused("thread state is missing", [](pb::Image& i) { leader_of(i)->ClearExtension(pb::thread_state); });
  refused("seccomp is missing", [](pb::Image& i) { leader_of(i)->ClearExtension(pb::seccomp); });
  refused("process state is missing", [](pb::Image& i) { i.mutable_processes(0)->ClearExtension(pb::process_state); });
  refused("has the parent 77, which is not there", [](pb::Image& i) { i.mutable_processes(0)->set_parent(77); });
  refused("there is no process", [](pb::Image& i) { i.clear_processes(); });
  refused("this release restarts one process; the image has 2 processes", [](pb::Image& i) {
    *i.add_processes() = i.processes(0);
    i.mutable_processes(1)->set_pid(200);
  });
  refused("the image has 0 address spaces", [](pb::Image& i) { i.clear_address_spaces(); });
  refused("the image has 2 descriptor tables", [](pb::Image& i) { i.add_descriptor_tables()->set_id(1); });
  refused("the image has 2 working directories", [](pb::Image& i) { i.add_file_system_contexts()->set_id(1); });
  refused("the image has 2 tables of signal handlers", [](pb::Image& i) { i.add_signal_handlers()->set_id(1); });
  refused("process 100 had ended", [](pb::Image& i) { i.mutable_processes(0)->set_state(pb::Process::ZOMBIE); });
  refused("process 100 refers to the address space 7, which is not there",
          [](pb::Image& i) { i.mutable_processes(0)->set_mm_id(7); });
  refused("process 100 refers to the signal handlers 7, which is not there",
          [](pb::Image& i) { i.mutable_processes(0)->set_sighand_id(7); });
  refused("process 100, thread 100 refers to the descriptor table 7, which is not there",
          [](pb::Image& i) { leader_of(i)->set_files_id(7); });
  refused("process 100, thread 100 refers to the file system context 7, which is not there",
          [](pb::Image& i) { leader_of(i)->set_fs_id(7); });
  refused("refers to the open file 7, which is not there", [](pb::Image& i) {
    i.mutable_descriptor_tables(0)->add_descriptors()->set_file(7);
  });
  refused("open file 7 has no descriptor", [](pb::Image& i) { i.add_open_files()->set_id(7); });
  refused("the number 5 is there twice among descriptors", [](pb::Image& i) {
    for (int twice = 0; twice < 2; ++twice) i.mutable_descriptor_tables(0)->add_descriptors()->set_number(5);
    i.add_open_files();
  });
  refused("umask is 512 instead of at most 511", [](pb::Image& i) { i.mutable_file_system_contexts(0)->set_umask(01000); });
  refused("working directory is \"tmp\", not an absolute path",
          [](pb::Image& i) { i.mutable_file_system_contexts(0)->set_working_directory("tmp"); });
  refused("field 4242 that this vmckpt does not know", [](pb::Image& i) {
    leader_of(i)->GetReflection()->MutableUnknownFields(leader_of(i))->AddVarint(4242, 1);
  });
}

TEST_CASE("something that is not a file is named for what it is") {
  Scratch scratch;
  auto said = [&](const std::string& path) {
    auto reader = ImageReader::open(path);
    REQUIRE_FALSE(reader.ok());
    return reader.error().message();
  };
  REQUIRE(write_tiny({.path = scratch / "a.ckpt"}).ok());
  REQUIRE(::symlink("a.ckpt", (scratch / "link").c_str()) == 0);
  REQUIRE(::mkfifo((scratch / "fifo").c_str(), 0600) == 0);
  Fd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un address{AF_UNIX, {}};
  std::strncpy(address.sun_path, (scratch / "socket").c_str(), sizeof address.sun_path - 1);
  REQUIRE(::bind(socket.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);

  CHECK_THAT(said(scratch / "link"), Contains("is a symbolic link"));
  CHECK_THAT(said(scratch / "fifo"), Contains("is a FIFO"));
  CHECK_THAT(said(scratch / "socket"), Contains("is a socket"));
  CHECK_THAT(said(scratch.path()), Contains("is a directory"));
  CHECK_THAT(said("/dev/zero"), Contains("is a device"));
  CHECK_THAT(said(scratch / "missing"), Contains("No such file"));
  put_file(scratch / "zeros", std::string(8192, '\0'));
  CHECK_THAT(said(scratch / "zeros"), Contains("never completed"));
  put_file(scratch / "text", std::string(8192, 'x'));
  CHECK_THAT(said(scratch / "text"), Contains("magic"));
}

TEST_CASE("an image that others could have written is not to be run") {
  Scratch scratch;
  const std::string path = said_by(write_tiny({.path = scratch / "a.ckpt"}));
  auto reader = ImageReader::open(path);
  REQUIRE(reader.ok());
  CHECK(check_image_trusted(reader->fd(), path).ok());
  for (mode_t mode : {0620, 0602}) {
    REQUIRE(::chmod(path.c_str(), mode) == 0);
    CHECK_THAT(check_image_trusted(reader->fd(), path).error().message(), Contains("written by others"));
  }
  REQUIRE(::chmod(path.c_str(), 0444) == 0);
  CHECK(check_image_trusted(reader->fd(), path).ok());
  constexpr uid_t kSomebodyElse = 54321;
  if (::chown(path.c_str(), kSomebodyElse, static_cast<gid_t>(-1)) < 0) {
    WARN("skipped in part: only root can give a file away");
    return;
  }
  CHECK_THAT(check_image_trusted(reader->fd(), path).error().message(), Contains("belongs to user 54321"));
}

TEST_CASE("numbered images take the first free number") {
  Scratch scratch;
  ImageDestination destination{.numbered_stem = scratch / "vm"};
  CHECK(said_by(write_tiny(destination)) == scratch / "vm-1.ckpt");
  CHECK(said_by(write_tiny(destination)) == scratch / "vm-2.ckpt");
  put_file(scratch / "vm-3.ckpt", "not an image, and not ours to replace");
  REQUIRE(::symlink("nowhere", (scratch / "vm-4.ckpt").c_str()) == 0);
  CHECK(said_by(write_tiny(destination)) == scratch / "vm-5.ckpt");
  CHECK(said_by(read_whole_file(scratch / "vm-3.ckpt")) == "not an image, and not ours to replace");
}

TEST_CASE("a file that exists is not replaced unless it is this target's own image") {
  Scratch scratch;
  ImageIdentity other = test::tiny_identity();
  other.target_id[0] ^= 1;
  const std::string path = scratch / "a.ckpt";
  ImageDestination replace{.path = path, .replace = true};

  put_file(path, "a letter");
  CHECK_THAT(write_tiny({.path = path}).error().message(), Contains("exists"));
  CHECK_THAT(write_tiny(replace).error().message(), Contains("not an image of this target"));
  CHECK(said_by(read_whole_file(path)) == "a letter");

  ::unlink(path.c_str());
  REQUIRE(write_tiny({.path = path}, other).ok());
  CHECK_THAT(write_tiny(replace).error().message(), Contains("another target"));

  ::unlink(path.c_str());
  REQUIRE(write_tiny(replace).ok());  // there was nothing to replace
  auto old_image = ImageReader::open(path);
  REQUIRE(old_image.ok());
  REQUIRE(write_tiny(replace).ok());
  CHECK(old_image->verify_pages().ok());  // whoever has the old image mapped keeps it
  CHECK(ImageReader::open(path).ok());
  CHECK(scratch.entries() == 1);

  ::unlink(path.c_str());
  put_file(scratch / "letter", "a letter");
  REQUIRE(::symlink("letter", path.c_str()) == 0);
  CHECK_FALSE(write_tiny(replace).ok());
  CHECK(said_by(read_whole_file(scratch / "letter")) == "a letter");
}

TEST_CASE("a file that appears while the image is written is not replaced either") {
  Scratch scratch;
  const std::string path = scratch / "a.ckpt";
  for (bool replace : {false, true}) {
    auto writer = ImageWriter::create({.path = path, .replace = replace}, test::tiny_identity());
    REQUIRE(writer.ok());
    put_file(path, "a letter");
    CHECK_FALSE(test::finish(*writer, test::tiny_metadata()).ok());
    CHECK(said_by(read_whole_file(path)) == "a letter");
    ::unlink(path.c_str());
  }
  CHECK(scratch.entries() == 0);
}

namespace {

// Whether check_references() can follow what this message's fields, and those of the messages within, say of themselves.
void expect_references_that_can_be_followed(const google::protobuf::Descriptor& message, std::set<std::string>& seen) {
  using google::protobuf::FieldDescriptor;
  if (!seen.insert(message.full_name()).second) return;
  std::vector<const FieldDescriptor*> fields;
  google::protobuf::DescriptorPool::generated_pool()->FindAllExtensions(&message, &fields);
  for (int i = 0; i < message.field_count(); ++i) fields.push_back(message.field(i));
  auto is_id = [](const FieldDescriptor* field) {
    return field != nullptr && !field->is_repeated() &&
           (field->cpp_type() == FieldDescriptor::CPPTYPE_UINT32 || field->cpp_type() == FieldDescriptor::CPPTYPE_UINT64);
  };
  for (const FieldDescriptor* field : fields) {
    INFO(field->full_name());
    if (field->options().GetExtension(pb::refers_to) != pb::NOTHING) CHECK(is_id(field));
    if (field->options().GetExtension(pb::defines) != pb::NOTHING) {
      CHECK((field->is_repeated() && field->message_type() != nullptr && is_id(field->message_type()->FindFieldByName("id"))));
    }
    if (field->message_type() != nullptr) expect_references_that_can_be_followed(*field->message_type(), seen);
  }
}

}  // namespace

TEST_CASE("what the schema calls an id is a number that the image's checks can read") {
  std::set<std::string> seen;
  expect_references_that_can_be_followed(*pb::Image::descriptor(), seen);
  CHECK(seen.count("vmckpt.pb.UnixSocket") == 1);
}

namespace {

pb::Kvm* kvm(pb::Image& image) {
  return image.ExtensionSize(pb::virtual_machines) == 0 ? image.AddExtension(pb::virtual_machines)
                                                         : image.MutableExtension(pb::virtual_machines, 0);
}

}  // namespace

TEST_CASE("two KVM objects of one id are refused: each would be shown with all that belongs to the other") {
  pb::Image image = test::tiny_metadata();
  kvm(image)->add_objects()->set_id(3);
  REQUIRE(check_metadata(image).ok());
  kvm(image)->add_objects()->set_id(3);
  CHECK_THAT(check_metadata(image).error().message(), Contains("the KVM object id 3 is there twice"));
}

TEST_CASE("a vdso that is longer than its mapping is refused: restart puts it where that was") {
  pb::Image image = test::tiny_metadata();
  image.mutable_address_spaces(0)->set_vdso_code(std::string(1 << 16, 'x'));
  CHECK_THAT(check_metadata(image).error().message(), Contains("the vdso has 65536 bytes, its mapping "));
}

TEST_CASE("a writer that is given up leaves nothing behind") {
  Scratch scratch;
  {
    auto writer = ImageWriter::create({.path = scratch / "a.ckpt"}, test::tiny_identity());
    REQUIRE(writer.ok());
    REQUIRE(test::write_tiny_pages(*writer).ok());
    ImageWriter moved = std::move(*writer);
    pb::Image no_threads = test::tiny_metadata();
    no_threads.mutable_processes(0)->clear_threads();
    CHECK_THAT(moved.seal(no_threads).error().message(), Contains("there is no thread"));
  }
  CHECK(scratch.entries() == 0);
}

TEST_CASE("a writer accepts pages only where it reserved space") {
  Scratch scratch;
  auto writer = ImageWriter::create({.path = scratch / "a.ckpt"}, test::tiny_identity());
  REQUIRE(writer.ok());
  char page[kImagePageBytes] = {};
  CHECK_FALSE(writer->write_pages(page, sizeof page, 0).ok());
  CHECK_FALSE(writer->write_pages(page, sizeof page, kImagePageBytes).ok());
  uint64_t offset = writer->reserve_pages(1);  // whole pages
  CHECK(writer->write_pages(page, sizeof page, offset).ok());
  CHECK_FALSE(writer->write_pages(page, sizeof page, offset + 1).ok());
}

TEST_CASE("a destination that cannot be written is told with path and cure") {
  Scratch scratch;
  auto said = [](const ImageDestination& destination) {
    auto writer = ImageWriter::create(destination, test::tiny_identity());
    REQUIRE_FALSE(writer.ok());
    return writer.error().message();
  };
  CHECK_THAT(said({.path = scratch / "no/where.ckpt"}), Contains("/no") && Contains("create the directory"));
  CHECK_THAT(said({.path = "relative.ckpt"}), Contains("not an absolute path"));
  CHECK_THAT(said({.path = scratch.path() + "/"}), Contains("is a directory"));
  CHECK_THAT(said({.path = scratch.path()}), Contains("exists"));
  CHECK_THAT(said({.path = "/proc/self/a.ckpt"}), Contains("/proc/self"));
}

TEST_CASE("a file that may not grow any further fails the checkpoint with a cure and leaves nothing behind") {
  Scratch scratch;
  ImageDestination destination{.path = scratch / "a.ckpt"};
  CHECK(in_child([&] {
    ::signal(SIGXFSZ, SIG_IGN);
    rlimit limit{kImagePageBytes, kImagePageBytes};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    return said_by(write_tiny(destination)).find("ulimit -f") != std::string::npos;
  }));
  CHECK(scratch.entries() == 0);
}

TEST_CASE("a full disk fails the checkpoint with a cure and leaves nothing behind") {
  Scratch scratch;
  constexpr int kNotHere = 77;
  // A tiny file system of its own, which needs root or an unprivileged user namespace.
  pid_t child = ::fork();
  if (child == 0) {
    const std::string uid_map = fmt::format("0 {} 1", ::geteuid());
    const std::string gid_map = fmt::format("0 {} 1", ::getegid());
    if (::unshare(CLONE_NEWNS) < 0) {
      if (::unshare(CLONE_NEWUSER | CLONE_NEWNS) < 0) ::_exit(kNotHere);
      if (!write_file("/proc/self/setgroups", "deny") || !write_file("/proc/self/uid_map", uid_map)) ::_exit(kNotHere);
      if (!write_file("/proc/self/gid_map", gid_map)) ::_exit(kNotHere);
    }
    ::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr);
    if (::mount("tmpfs", scratch.path().c_str(), "tmpfs", 0, "size=28k") < 0) ::_exit(kNotHere);
    bool small_fits = write_tiny({.path = scratch / "small.ckpt"}).ok();
    std::string said = said_by(write_tiny({.path = scratch / "a.ckpt"}));
    bool told =
        said.find("ENOSPC") != std::string::npos && said.find("free space in " + scratch.path()) != std::string::npos;
    bool first_is_whole = ImageReader::open(scratch / "small.ckpt").ok();
    ::_exit(small_fits && told && first_is_whole && scratch.entries() == 1 ? 0 : 1);
  }
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  if (WIFEXITED(status) && WEXITSTATUS(status) == kNotHere) {
    WARN("skipped: neither root nor unprivileged user namespaces here");
    return;
  }
  CHECK(status == 0);
}

TEST_CASE("where the file system has no unnamed files a temporary name serves, and goes away with a failure") {
  Scratch scratch;
  ImageDestination named{.path = scratch / "a.ckpt", .replace = true};
  ImageDestination numbered{.numbered_stem = scratch / "vm"};
  CHECK(in_child([&] {
    forbid_unnamed_files();
    auto writer = ImageWriter::create(named, test::tiny_identity());
    if (!writer || scratch.entries() != 1) return false;
    const fs::directory_entry only = *fs::directory_iterator(scratch.path());
    bool hidden = only.path().filename().string().rfind(".a.ckpt.tmp-", 0) == 0;
    bool private_to_owner = (only.status().permissions() & fs::perms(077)) == fs::perms::none;
    return hidden && private_to_owner && !test::finish(*writer, pb::Image()).ok();
  }));
  CHECK(scratch.entries() == 0);
  CHECK(in_child([&] {
    forbid_unnamed_files();
    return write_tiny(named).ok() && write_tiny(named).ok() && write_tiny(numbered).ok() && write_tiny(numbered).ok();
  }));
  CHECK(scratch.entries() == 3);
  for (const char* name : {"a.ckpt", "vm-1.ckpt", "vm-2.ckpt"}) CHECK(ImageReader::open(scratch / name).ok());
}

}  // namespace vmckpt
