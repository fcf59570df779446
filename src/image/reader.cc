#include "image/reader.h"

#include <algorithm>
#include <climits>
#include <filesystem>
#include <new>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <xxhash.h>

#include "image/decode.h"
#include "image/validate.h"

namespace vmckpt {
namespace {

constexpr uint64_t kSectionAlignmentBytes = 8;

template <class Bytes>
bool all_zero(const Bytes& bytes) {
  return std::all_of(std::begin(bytes), std::end(bytes), [](uint8_t byte) { return byte == 0; });
}

const char* section_name(uint32_t kind) {
  switch (static_cast<SectionKind>(kind)) {
    case SectionKind::kMetadata: return "metadata";
    case SectionKind::kPageIndex: return "page index";
  }
  return "unknown";
}

Error damaged(const std::string& path, const std::string& what) {
  return error(fmt::format("image {} is damaged: {}", path, what), "use another image of this target");
}

Error unusable(const std::string& path, Error error) {
  error.what = fmt::format("image {} cannot be used: {}", path, error.what);
  if (error.cure.empty()) error.cure = "use another image of this target";
  return error;
}

Result<void> prefixed(const std::string& path, const Result<void>& result) {
  return result ? result : unusable(path, result.error());
}

const char* file_type(mode_t mode) {
  if (S_ISDIR(mode)) return "a directory";
  if (S_ISLNK(mode)) return "a symbolic link";
  if (S_ISFIFO(mode)) return "a FIFO";
  if (S_ISSOCK(mode)) return "a socket";
  return "a device";
}

// The length of the file, which must be a regular one.
Result<uint64_t> image_file_bytes(int fd, const std::string& path) {
  struct stat status;
  if (::fstat(fd, &status) < 0) return errno_error("look at image " + path);
  if (!S_ISREG(status.st_mode)) {
    return error(fmt::format("{} is {}, not an image", path, file_type(status.st_mode)), "name the image file itself");
  }
  return static_cast<uint64_t>(status.st_size);
}

Result<void> check_section_table(const ImageHeader& header, const std::string& path) {
  if (header.section_count > kImageMaxSections) {
    return damaged(path, fmt::format("its header lists {} sections", header.section_count));
  }
  bool seen_metadata = false;
  bool seen_index = false;
  for (uint32_t i = 0; i < header.section_count; ++i) {
    const SectionEntry& section = header.sections[i];
    const std::string name = fmt::format("section {} (kind {}, {})", i, section.kind, section_name(section.kind));
    if ((section.flags & ~uint32_t{kSectionSkippable}) != 0) {
      return damaged(path, fmt::format("{} has the flags {:#x}", name, section.flags));
    }
    if (section.offset % kSectionAlignmentBytes != 0 || section.offset < kImagePageBytes ||
        section.offset > header.file_bytes || header.file_bytes - section.offset < section.bytes) {
      return damaged(path, fmt::format("{} at offset {} with {} bytes is not inside the file", name, section.offset,
                                       section.bytes));
    }
    for (uint32_t j = 0; j < i; ++j) {
      const SectionEntry& other = header.sections[j];
      if (section.offset < other.offset + other.bytes && other.offset < section.offset + section.bytes) {
        return damaged(path, fmt::format("{} overlaps section {}", name, j));
      }
    }
    bool* seen = nullptr;
    if (section.kind == static_cast<uint32_t>(SectionKind::kMetadata)) seen = &seen_metadata;
    if (section.kind == static_cast<uint32_t>(SectionKind::kPageIndex)) seen = &seen_index;
    if (seen != nullptr) {
      if (*seen) return damaged(path, name + " is there twice");
      *seen = true;
    } else if ((section.flags & kSectionSkippable) == 0) {
      return error(fmt::format("image {} has a section of kind {} that this vmckpt does not know", path, section.kind),
                   "use the vmckpt that made it, or a newer one");
    }
  }
  if (!seen_metadata || !seen_index) return damaged(path, "it has no metadata or no page index");
  for (uint32_t i = header.section_count; i < kImageMaxSections; ++i) {
    const SectionEntry& unused = header.sections[i];
    if (unused.kind != 0 || unused.flags != 0 || unused.offset != 0 || unused.bytes != 0 || unused.xxh3 != 0) {
      return damaged(path, fmt::format("unused section entry {} is not zero", i));
    }
  }
  return {};
}

const SectionEntry& section_of(const ImageHeader& header, SectionKind kind) {
  const SectionEntry* end = header.sections + header.section_count;
  return *std::find_if(header.sections, end,
                       [&](const SectionEntry& section) { return section.kind == static_cast<uint32_t>(kind); });
}

// Reads a section and checks its checksum before anyone decodes it.
Result<void> read_section(int fd, const std::string& path, const SectionEntry& section, void* to) {
  VMCKPT_TRY(pread_exactly(fd, to, section.bytes, section.offset, path));
  if (XXH3_64bits(to, section.bytes) != section.xxh3) {
    return damaged(path, fmt::format("the checksum of its {} ({} bytes at offset {}) is wrong",
                                     section_name(section.kind), section.bytes, section.offset));
  }
  return {};
}

Result<pb::Image> read_metadata(int fd, const std::string& path, const SectionEntry& section) {
  if (section.bytes > kMaxMetadataBytes) {
    return damaged(path,
                   fmt::format("its metadata has {} bytes; at most {} are accepted", section.bytes, kMaxMetadataBytes));
  }
  std::string bytes(section.bytes, '\0');
  VMCKPT_TRY(read_section(fd, path, section, bytes.data()));
  Result<pb::Image> image = decode_metadata(bytes);
  if (!image) return unusable(path, image.error());
  return image;
}

Result<std::vector<PageRecord>> read_index(int fd, const std::string& path, const SectionEntry& section) {
  if (section.bytes % sizeof(PageRecord) != 0 || section.bytes > kMaxPageIndexBytes) {
    return damaged(path, fmt::format("its page index has {} bytes", section.bytes));
  }
  std::vector<PageRecord> records(section.bytes / sizeof(PageRecord));
  VMCKPT_TRY(read_section(fd, path, section, records.data()));
  return records;
}

// Page data ends where the first section begins.
uint64_t page_data_end(const ImageHeader& header) {
  uint64_t end = header.file_bytes;
  for (uint32_t i = 0; i < header.section_count; ++i) end = std::min(end, header.sections[i].offset);
  return end;
}

}  // namespace

Result<ImageHeader> read_image_header(int fd, const std::string& path) {
  const uint64_t file_bytes = VMCKPT_TRY(image_file_bytes(fd, path));
  if (file_bytes < sizeof(ImageHeader)) {
    return error(fmt::format("{} is not an image: it has {} bytes, less than an image's first page", path, file_bytes));
  }
  ImageHeader header;
  VMCKPT_TRY(pread_exactly(fd, &header, sizeof header, 0, path));
  if (std::memcmp(header.magic, kImageMagic, sizeof header.magic) != 0) {
    if (all_zero(header.magic)) {
      return error(fmt::format("{} is not an image, or one that was never completed: its first bytes are zeros", path),
                   "use another image of this target");
    }
    return error(path + " is not an image: it does not begin with the magic bytes of one");
  }
  if (XXH3_64bits(&header, offsetof(ImageHeader, header_xxh3)) != header.header_xxh3) {
    return damaged(path, "the checksum of its first page is wrong");
  }
  // From here on the header is what a writer wrote, but the writer may be newer, or hostile.
  if (header.min_reader_version > kImageFormatVersion) {
    return error(
        fmt::format("image {} has format version {} and needs a reader of version {} or newer; this vmckpt reads "
                    "up to version {}",
                    path, header.format_version, header.min_reader_version, kImageFormatVersion),
        "use a newer vmckpt");
  }
  if (header.format_version != 0 && header.format_version < kImageOldestVersion) {
    return error(fmt::format("image {} has format version {}; this vmckpt reads version {}", path, header.format_version,
                             kImageFormatVersion),
                 "restart it with the vmckpt that made it, or launch the program with this one and checkpoint it again");
  }
  if (header.min_reader_version == 0 || header.format_version < header.min_reader_version) {
    return damaged(path, fmt::format("it has format version {} and minimum reader version {}", header.format_version,
                                     header.min_reader_version));
  }
  if (header.machine != kImageMachineX86_64) {
    return error(
        fmt::format("image {} was made on another kind of machine (ELF machine number {})", path, header.machine),
        "restart it on a machine like the one it was made on");
  }
  if (header.page_bytes != kImagePageBytes) {
    return damaged(path, fmt::format("it has pages of {} bytes", header.page_bytes));
  }
  if (header.reserved0 != 0 || !all_zero(header.reserved))
    return damaged(path, "reserved bytes of its first page are not zero");
  if (header.file_bytes != file_bytes) {
    return damaged(path, fmt::format("it has {} bytes, its header says {}", file_bytes, header.file_bytes));
  }
  VMCKPT_TRY(check_section_table(header, path));
  return header;
}

Result<ImageReader> ImageReader::open(const std::string& path) try {
  ImageReader reader;
  std::error_code ignored;
  reader.path_ = std::filesystem::absolute(path, ignored).lexically_normal().string();
  if (reader.path_.empty()) reader.path_ = path;

  // O_NONBLOCK: a FIFO must not make us wait. O_NOFOLLOW: an image is code, so what is checked is what was named.
  int fd;
  do fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | O_NOFOLLOW);
  while (fd < 0 && errno == EINTR);
  if (fd < 0) {
    if (errno == ELOOP) return error(path + " is a symbolic link, not an image", "name the image file it leads to");
    if (errno == ENXIO) return error(path + " is a socket or a device, not an image", "name the image file itself");
    return errno_error("open image " + path);
  }
  Fd file(fd);

  reader.header_ = VMCKPT_TRY(read_image_header(fd, path));
  std::vector<PageRecord> records = VMCKPT_TRY(read_index(fd, path, section_of(reader.header_, SectionKind::kPageIndex)));
  VMCKPT_TRY(prefixed(path, check_records(records, page_data_end(reader.header_))));
  reader.metadata_ = VMCKPT_TRY(read_metadata(fd, path, section_of(reader.header_, SectionKind::kMetadata)));
  VMCKPT_TRY(prefixed(path, check_metadata(reader.metadata_)));
  VMCKPT_TRY(prefixed(path, check_records_belong(reader.metadata_, records)));
  const std::string& target_id = reader.metadata_.target().target_id();
  if (std::memcmp(target_id.data(), reader.header_.target_id, sizeof reader.header_.target_id) != 0) {
    return damaged(path, "its first page and its metadata name different targets");
  }
  reader.pages_ = PageIndex(std::move(file), reader.path_, std::move(records));
  return reader;
} catch (const std::bad_alloc&) {
  return error(fmt::format("image {} cannot be read: its metadata and page index do not fit into memory", path));
}

}  // namespace vmckpt
