// The image file, to the byte. docs/image-format.md is the prose.
//
//   offset 0     ImageHeader, one page, fixed for ever (zeros until the image is complete: written last)
//   4096 ...     page data: runs of whole pages, each at a page-aligned file offset; holes read as zeros
//   then         sections at 8-byte aligned offsets: metadata (protobuf vmckpt.pb.Image), page index (PageRecord[])
//
// All integers are little-endian. Everything read before its checksum is checked is bounds-checked against the file.
#pragma once

#include <stdint.h>

namespace vmckpt {

constexpr char kImageMagic[8] = {'V', 'M', 'C', 'K', 'P', 'T', '\r', '\n'};
constexpr uint32_t kImageFormatVersion = 1;
constexpr uint32_t kImageMinReaderVersion = 1;
constexpr uint32_t kImagePageBytes = 4096;
constexpr uint32_t kImageMachineX86_64 = 62;  // ELF's EM_X86_64
constexpr uint32_t kImageMaxSections = 32;

enum class SectionKind : uint32_t {
  kMetadata = 1,   // protobuf vmckpt.pb.Image
  kPageIndex = 2,  // PageRecord[]
};

enum SectionFlag : uint32_t {
  kSectionSkippable = 1,  // a reader that does not know the kind may ignore it
};

struct SectionEntry {
  uint32_t kind;  // SectionKind
  uint32_t flags;
  uint64_t offset;  // from the start of the file
  uint64_t bytes;
  uint64_t xxh3;  // XXH3_64bits of the section's bytes
};
static_assert(sizeof(SectionEntry) == 32);

struct ImageHeader {
  char magic[8];
  uint32_t format_version;
  uint32_t min_reader_version;  // a reader older than this refuses
  uint32_t page_bytes;
  uint32_t machine;
  uint8_t image_id[16];   // random
  uint8_t parent_id[16];  // image the target was restarted from, or zeros
  uint8_t target_id[16];  // random, made at launch, kept by every restart: whose image this is
  int64_t created_unix_us;
  uint64_t file_bytes;  // length of the whole file
  uint32_t section_count;
  uint32_t reserved0;
  SectionEntry sections[kImageMaxSections];
  uint8_t reserved[4096 - 96 - 32 * kImageMaxSections - 8];  // zeros, checked
  uint64_t header_xxh3;                                       // XXH3_64bits of the 4088 bytes before
};
static_assert(sizeof(ImageHeader) == 4096);

// One run of pages. Records are sorted by (object, address) and never overlap. Runs that follow one another in memory and
// in the file may be mapped as one. A record covers at most kMaxRecordBytes, so that damage is located.
struct PageRecord {
  uint64_t object;   // 0: the process's memory, otherwise the id of a CapturedFile
  uint64_t address;  // virtual address, or offset within the captured file; page aligned
  uint64_t bytes;    // whole pages
  uint64_t file_offset;  // page aligned
  uint64_t xxh3;         // XXH3_64bits of the content
};
static_assert(sizeof(PageRecord) == 40);
constexpr uint64_t kMaxRecordBytes = uint64_t{1} << 20;

}  // namespace vmckpt
