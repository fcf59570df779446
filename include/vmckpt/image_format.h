// The image file, to the byte. docs/image-format.md is the prose.
//
//   offset 0     ImageHeader, one page, fixed for ever (zeros until the image is complete: written last)
//   4096 ...     page data: what page records store in this file; plain pages at page-aligned offsets; holes read as zeros
//   then         sections at 8-byte aligned offsets: metadata (protobuf vmckpt.pb.Image), page index (PageRecord[])
//
// All integers are little-endian. Everything read before its checksum is checked is bounds-checked against the file.
#pragma once

#include <stdint.h>

namespace vmckpt {

constexpr char kImageMagic[8] = {'V', 'M', 'C', 'K', 'P', 'T', '\r', '\n'};
constexpr uint32_t kImageFormatVersion = 2;
constexpr uint32_t kImageMinReaderVersion = 2;
constexpr uint32_t kImageOldestVersion = 2;  // images of an older format are refused
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

enum class PageKind : uint8_t {
  kData = 1,    // the content is stored
  kZero = 2,    // the pages are zeros, whatever lies under them
  kAbsent = 3,  // nothing is here, as where no record is: what lies under the pages shows, which is zeros or a mapped file
  kInBase = 4,  // the content is that of the same pages in the base image that `store` names; readers refuse it so far
};

enum class PageCodec : uint8_t {
  kNone = 0,  // stored as it is, page aligned: may be mapped
  kZstd = 1,  // reserved: readers refuse it so far
};

constexpr uint32_t kStoreThisFile = 0;  // another number n is that of the n-th PageStore of the metadata, counted from 1

// One run of pages. Records are sorted by (object, address) and never overlap. Runs that follow one another in memory and in
// their store may be mapped as one. A record covers at most kMaxRecordBytes: the unit in which content is found, checked, and
// taken by several processors at once. Only records of kind kData store something; in others codec, offset, stored_bytes and
// stored_xxh3 are zero, and so is store, but for kInBase.
struct PageRecord {
  uint64_t object;   // 0: the process's memory, otherwise the id of a CapturedFile
  uint64_t address;  // virtual address, or offset within the captured file; page aligned
  uint32_t bytes;    // of memory: whole pages
  PageKind kind;
  PageCodec codec;
  uint16_t reserved;  // zero, checked
  uint32_t store;
  uint32_t stored_bytes;  // the same as `bytes` without a codec, otherwise less
  uint64_t offset;        // in the store
  uint64_t stored_xxh3;   // XXH3_64bits of the stored bytes
};
static_assert(sizeof(PageRecord) == 48);
static_assert(__builtin_offsetof(PageRecord, bytes) == 16 && __builtin_offsetof(PageRecord, kind) == 20 &&
              __builtin_offsetof(PageRecord, codec) == 21 && __builtin_offsetof(PageRecord, reserved) == 22 &&
              __builtin_offsetof(PageRecord, store) == 24 && __builtin_offsetof(PageRecord, stored_bytes) == 28 &&
              __builtin_offsetof(PageRecord, offset) == 32 && __builtin_offsetof(PageRecord, stored_xxh3) == 40);
constexpr uint64_t kMaxRecordBytes = uint64_t{1} << 20;

// Pages that lie in this file as they are.
constexpr PageRecord plain_record(uint64_t object, uint64_t address, uint64_t bytes, uint64_t offset, uint64_t xxh3) {
  const auto length = static_cast<uint32_t>(bytes);
  return {object, address, length, PageKind::kData, PageCodec::kNone, 0, kStoreThisFile, length, offset, xxh3};
}

}  // namespace vmckpt
