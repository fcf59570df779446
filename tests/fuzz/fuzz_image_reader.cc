// Mutates a valid tiny image and opens the result: every answer will do but a crash, a hang or a sanitizer's report.
// Half of the cases have their checksums put right, so that what lies behind the checksums is reached too.
//
//   fuzz_image_reader [SEED [ITERATIONS]]    the seed is printed; the same seed repeats the same cases
#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core/page.h"
#include "image/reader.h"
#include "image/tiny_image.h"
#include "image/validate.h"

namespace vmckpt {
namespace {

using Random = std::mt19937_64;

// Values at which arithmetic goes wrong.
uint64_t awkward(Random& random) {
  static constexpr uint64_t kValues[] = {0,
                                         1,
                                         7,
                                         8,
                                         255,
                                         4095,
                                         4096,
                                         4097,
                                         1 << 20,
                                         (1 << 20) + 4096,
                                         0x7fffffff,
                                         0x80000000,
                                         0xffffffff,
                                         0x7fffffffffffffff,
                                         0x8000000000000000,
                                         0xfffffffffffff000,
                                         0xffffffffffffffff};
  return random() % 4 == 0 ? random() : kValues[random() % std::size(kValues)];
}

// The areas that decide: header, metadata, page index; page data only now and then.
size_t pick_offset(const std::string& bytes, Random& random) {
  ImageHeader header;
  std::memcpy(&header, bytes.data(), sizeof header);
  switch (random() % 8) {
    case 0: return random() % bytes.size();
    case 1:
    case 2: return random() % 1120;  // header up to the end of the section table
    case 3:
    case 4:
    case 5: return header.sections[0].offset + random() % header.sections[0].bytes;
    default: return header.sections[1].offset + random() % header.sections[1].bytes;
  }
}

void mutate(std::string& bytes, const std::string& original, Random& random) {
  size_t at = std::min(pick_offset(original, random), bytes.empty() ? 0 : bytes.size() - 1);
  if (bytes.empty()) return;
  const char filler = static_cast<char>(random());  // drawn here: the order of evaluation inside a call is not fixed
  switch (random() % 7) {
    case 0: bytes[at] = static_cast<char>(bytes[at] ^ (1 << (random() % 8))); break;
    case 1: bytes[at] = filler; break;
    case 2: {  // an aligned word, as the fields of header and index are
      size_t width = random() % 2 != 0 ? 8 : 4;
      uint64_t value = awkward(random);
      at = at / width * width;
      if (at + width <= bytes.size()) std::memcpy(bytes.data() + at, &value, width);
      break;
    }
    case 3: bytes.resize(random() % (bytes.size() + 1)); break;
    case 4: bytes.insert(at, random() % 64, filler); break;
    case 5: {  // swap two pieces as long as a record
      size_t other = std::min(pick_offset(original, random), bytes.size() - 1);
      for (size_t i = 0; i < sizeof(PageRecord) && std::max(at, other) + i < bytes.size(); ++i)
        std::swap(bytes[at + i], bytes[other + i]);
      break;
    }
    default: bytes.erase(at, random() % 64); break;
  }
}

// A header whose lengths agree with the file again, so that mutations that move things are not all refused at the door.
void fix_lengths(std::string& bytes, size_t original_bytes) {
  if (bytes.size() < sizeof(ImageHeader)) return;
  ImageHeader header;
  std::memcpy(&header, bytes.data(), sizeof header);
  int64_t grown = static_cast<int64_t>(bytes.size()) - static_cast<int64_t>(original_bytes);
  header.file_bytes = bytes.size();
  header.sections[0].bytes += static_cast<uint64_t>(grown);
  header.sections[1].offset += static_cast<uint64_t>(grown);
  std::memcpy(bytes.data(), &header, sizeof header);
}

int run(uint64_t seed, uint64_t iterations) {
  char directory[] = "/tmp/vmckpt-fuzz-XXXXXX";
  if (::mkdtemp(directory) == nullptr) {
    std::perror("mkdtemp");
    return 1;
  }
  Result<std::string> made = test::tiny_image_bytes(directory);
  if (!made) {
    ::rmdir(directory);
    std::fprintf(stderr, "%s\n", made.error().message().c_str());
    return 1;
  }
  const std::string original = *made;
  const std::string path = std::string(directory) + "/fuzzed.ckpt";
  uint64_t opened = 0, verified = 0;
  for (uint64_t i = 0; i < iterations; ++i) {
    Random random(seed + i);  // one case can be repeated alone: SEED + its number, 1 iteration
    std::string bytes = original;
    for (uint64_t count = 1 + random() % 4; count > 0; --count) mutate(bytes, original, random);
    if (random() % 2 != 0) {
      if (bytes.size() != original.size() && random() % 2 != 0) fix_lengths(bytes, original.size());
      test::fix_checksums(bytes);
    }
    Fd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
    if (!write_exactly(fd.get(), bytes.data(), bytes.size(), path)) break;
    Result<ImageReader> reader = ImageReader::open(path);
    if (!reader) {
      VMCKPT_CHECK(!reader.error().message().empty());
      continue;
    }
    ++opened;
    std::vector<uint8_t> content(2 * kImagePageBytes);
    for (const PageRecord& record : reader->pages().records()) {
      VMCKPT_CHECK(record.store == kStoreThisFile && record.codec == PageCodec::kNone);
      VMCKPT_CHECK(record.offset + record.stored_bytes <= bytes.size());
      VMCKPT_CHECK(reader->pages().read(record.object, record.address + 1, content.data(), content.size()).ok());
      VMCKPT_CHECK(record.object != 0 || record.address + record.bytes <= kLargestUserSpaceEnd);
    }
    for (const PageRun& run : reader->pages().runs_of(0)) VMCKPT_CHECK(run.zero || run.file_offset + run.bytes <= bytes.size());
    VMCKPT_CHECK(reader->pages().read_all(test::kTinyCapturedId, [](auto...) { return Result<void>(); }).ok());
    verified += reader->verify_pages().ok();
  }
  ::unlink(path.c_str());
  ::rmdir(directory);
  std::printf("%" PRIu64 " cases, %" PRIu64 " opened, %" PRIu64 " verified\n", iterations, opened, verified);
  return 0;
}

}  // namespace
}  // namespace vmckpt

int main(int argc, char** argv) {
  uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 0) : std::random_device()();
  uint64_t iterations = argc > 2 ? std::strtoull(argv[2], nullptr, 0) : 20000;
  std::printf("seed %" PRIu64 " (repeat: %s %" PRIu64 " %" PRIu64 ")\n", seed, argv[0], seed, iterations);
  std::fflush(stdout);
  return vmckpt::run(seed, iterations);
}
