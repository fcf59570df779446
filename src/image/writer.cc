#include "image/writer.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <google/protobuf/stubs/logging.h>
#include <xxhash.h>

#include "image/reader.h"
#include "image/decode.h"
#include "image/validate.h"

namespace vmckpt {
namespace {

constexpr uint64_t kSectionAlignmentBytes = 8;
constexpr size_t kMaxTemporaryStemBytes = 200;  // of NAME_MAX, leaving room for what is added

constexpr uint64_t round_up(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }

// Adds to a failed call what the user can do about it.
Error with_cure(Error error, const std::string& directory) {
  if (!error.cure.empty()) return error;
  switch (error.err) {
    case ENOSPC: error.cure = fmt::format("free space in {} or write the image elsewhere", directory); break;
    case EDQUOT:
      error.cure =
          fmt::format("your disk quota in {} is used up: remove files or write the image elsewhere", directory);
      break;
    case EFBIG: error.cure = "raise the file size limit (ulimit -f) or write the image to another file system"; break;
    case EACCES:
    case EPERM:
    case EROFS:
      error.cure = fmt::format("write the image to a directory that you may write to, {} is not one", directory);
      break;
    case ENOENT:
    case ENOTDIR: error.cure = fmt::format("create the directory {} or write the image elsewhere", directory); break;
    case EIO: error.cure = fmt::format("the disk under {} fails: write the image elsewhere", directory); break;
    default: break;
  }
  return error;
}

std::string base_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

std::string proc_path(int fd) { return fmt::format("/proc/self/fd/{}", fd); }

Result<std::string> temporary_path(const std::string& directory, const std::string& base) {
  uint64_t random = 0;
  if (::getrandom(&random, sizeof random, 0) != sizeof random) return errno_error("get random bytes");
  return fmt::format("{}/.{}.tmp-{}-{:016x}", directory, base.substr(0, kMaxTemporaryStemBytes), ::getpid(), random);
}

// Unnamed files need O_TMPFILE of the file system and /proc to give them a name later.
bool can_name_later(int fd) { return ::access(proc_path(fd).c_str(), F_OK) == 0; }

// Only an image of the same target may be replaced; looked at again just before it happens.
Result<void> check_replaceable(const std::string& path, const Id128& target_id) {
  const std::string cure = "choose another file name, or remove that file first";
  Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | O_NOFOLLOW));
  if (!fd) return errno_error(fmt::format("{} exists and cannot be read to see whose it is", path), cure);
  Result<ImageHeader> header = read_image_header(fd.get(), path);
  if (!header) {
    return error(fmt::format("{} exists and is not an image of this target ({})", path, header.error().message()),
                 cure);
  }
  if (std::memcmp(header->target_id, target_id.data(), target_id.size()) != 0) {
    return error(path + " exists and is an image of another target", cure);
  }
  return {};
}

// Gives the file the name `to`; EEXIST when it is taken. The temporary name, if there was one, is gone afterwards.
int name_without_replacing(int fd, const std::string& temporary, const std::string& to) {
  if (temporary.empty()) {
    return ::linkat(AT_FDCWD, proc_path(fd).c_str(), AT_FDCWD, to.c_str(), AT_SYMLINK_FOLLOW) == 0 ? 0 : errno;
  }
  if (::renameat2(AT_FDCWD, temporary.c_str(), AT_FDCWD, to.c_str(), RENAME_NOREPLACE) == 0) return 0;
  if (errno != EINVAL && errno != ENOSYS) return errno;
  // A file system without RENAME_NOREPLACE (NFS): a hard link does not replace either.
  if (::link(temporary.c_str(), to.c_str()) < 0) return errno;
  ::unlink(temporary.c_str());
  return 0;
}

// Removes a name unless it was disowned.
class NameGuard {
 public:
  explicit NameGuard(std::string path) : path_(std::move(path)) {}
  NameGuard(const NameGuard&) = delete;
  NameGuard& operator=(const NameGuard&) = delete;
  ~NameGuard() {
    if (!path_.empty()) ::unlink(path_.c_str());
  }
  void disown() { path_.clear(); }

 private:
  std::string path_;
};

}  // namespace

ImageWriter::ImageWriter(ImageWriter&& other) noexcept
    : destination_(std::move(other.destination_)),
      identity_(other.identity_),
      directory_(std::move(other.directory_)),
      temporary_path_(std::exchange(other.temporary_path_, {})),
      fd_(std::move(other.fd_)),
      next_offset_(other.next_offset_),
      page_bytes_written_(other.page_bytes_written_),
      file_bytes_(other.file_bytes_),
      is_sealed_(other.is_sealed_),
      records_(std::move(other.records_)) {}

ImageWriter::~ImageWriter() {
  if (!temporary_path_.empty()) ::unlink(temporary_path_.c_str());
}

Result<ImageWriter> ImageWriter::create(const ImageDestination& destination, const ImageIdentity& identity) {
  const bool numbered = !destination.numbered_stem.empty();
  const std::string& named = numbered ? destination.numbered_stem : destination.path;
  if (named.empty() || named[0] != '/')
    return error(fmt::format("the image name \"{}\" is not an absolute path", named));
  const std::string base = base_name(named);
  if (base.empty() || base == "." || base == "..") {
    return error(named + " is a directory, not a name for an image", "add a file name");
  }

  ImageWriter writer;
  writer.destination_ = destination;
  writer.identity_ = identity;
  writer.directory_ = named.size() == base.size() + 1 ? "/" : named.substr(0, named.size() - base.size() - 1);
  const std::string& directory = writer.directory_;

  // Said now rather than after everything was written; looked at again in publish().
  struct stat status;
  if (!numbered && ::lstat(named.c_str(), &status) == 0) {
    if (!destination.replace) {
      return error(fmt::format("{} exists and is not to be replaced", named),
                   "choose another file name, or remove that file first");
    }
    VMCKPT_TRY(check_replaceable(named, identity.target_id));
  }

  int fd = ::open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (fd >= 0 && !can_name_later(fd)) {
    ::close(fd);
    fd = -1;
    errno = EOPNOTSUPP;
  }
  // EISDIR is the answer of file systems that do not know O_TMPFILE at all, EINVAL that of some FUSE ones.
  if (fd < 0 && (errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL)) {
    std::string temporary = VMCKPT_TRY(temporary_path(directory, base));
    fd = ::open(temporary.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd >= 0) writer.temporary_path_ = temporary;
  }
  if (fd < 0) return with_cure(errno_error(fmt::format("create an image in {}", directory)), directory);
  writer.fd_ = Fd(fd);
  // The umask may have taken the owner's bits away; an image is never readable by others.
  if (::fchmod(fd, 0600) < 0) {
    return with_cure(errno_error(fmt::format("set the mode of a new image in {}", directory)), directory);
  }
  return writer;
}

uint64_t ImageWriter::reserve_pages(uint64_t bytes) {
  uint64_t offset = next_offset_;
  next_offset_ += round_up(bytes, kImagePageBytes);
  return offset;
}

Result<void> ImageWriter::write_pages(const void* data, uint64_t bytes, uint64_t file_offset) {
  if (file_offset < kImagePageBytes || file_offset > next_offset_ || next_offset_ - file_offset < bytes) {
    return error(fmt::format("write {} bytes at offset {} of an image in {}: the space is not reserved", bytes,
                             file_offset, directory_));
  }
  Result<void> written = pwrite_exactly(fd_.get(), data, bytes, file_offset, "an image in " + directory_);
  if (!written) return with_cure(written.error(), directory_);
  page_bytes_written_ += bytes;
  return {};
}

std::string ImageWriter::described() const {
  return destination_.numbered_stem.empty() ? destination_.path : destination_.numbered_stem + "-N.ckpt";
}

Error ImageWriter::failed(const char* what) const {
  return with_cure(errno_error(fmt::format("{} image {}", what, described())), directory_);
}

Result<void> ImageWriter::seal(const pb::Image& metadata) {
  const std::string named = described();
  if (is_sealed_) return error("image " + named + " is sealed already");

  // 1. What restart would refuse is refused here, while the target still runs.
  std::sort(records_.begin(), records_.end(), [](const PageRecord& a, const PageRecord& b) {
    return std::pair(a.object, a.address) < std::pair(b.object, b.address);
  });
  auto fits = [&](const Result<void>& result) -> Result<void> {
    if (result) return {};
    return error(fmt::format("image {} would not be restartable: {}", named, result.error().message()));
  };
  VMCKPT_TRY(fits(check_records(records_, next_offset_)));
  VMCKPT_TRY(fits(check_metadata(metadata)));
  VMCKPT_TRY(fits(check_records_belong(metadata, records_)));
  if (std::memcmp(metadata.target().target_id().data(), identity_.target_id.data(), identity_.target_id.size()) != 0) {
    VMCKPT_TRY(fits(error("its first page and its metadata name different targets")));
  }

  std::string encoded;
  {
    google::protobuf::LogSilencer quiet;
    if (!metadata.SerializeToString(&encoded)) VMCKPT_TRY(fits(error("its metadata cannot be encoded")));
  }
  // Decoding again finds what encoding lets through: text fields that are not UTF-8, and more than a reader takes.
  if (auto decoded = decode_metadata(encoded); !decoded.ok()) VMCKPT_TRY(fits(decoded.error()));
  const uint64_t index_bytes = records_.size() * sizeof(PageRecord);
  if (index_bytes > kMaxPageIndexBytes) {
    return error(fmt::format("image {} would be too large: {} bytes of page index", named, index_bytes));
  }

  // 2. Everything but the header, on disk.
  ImageHeader header{};
  std::memcpy(header.magic, kImageMagic, sizeof header.magic);
  header.format_version = kImageFormatVersion;
  header.min_reader_version = kImageMinReaderVersion;
  header.page_bytes = kImagePageBytes;
  header.machine = kImageMachineX86_64;
  std::copy(identity_.image_id.begin(), identity_.image_id.end(), header.image_id);
  std::copy(identity_.parent_id.begin(), identity_.parent_id.end(), header.parent_id);
  std::copy(identity_.target_id.begin(), identity_.target_id.end(), header.target_id);
  timespec now;
  ::clock_gettime(CLOCK_REALTIME, &now);
  header.created_unix_us = int64_t{now.tv_sec} * 1000000 + now.tv_nsec / 1000;
  header.section_count = 2;
  header.sections[0] = {static_cast<uint32_t>(SectionKind::kMetadata), 0, next_offset_, encoded.size(),
                        XXH3_64bits(encoded.data(), encoded.size())};
  header.sections[1] = {static_cast<uint32_t>(SectionKind::kPageIndex), 0,
                        round_up(next_offset_ + encoded.size(), kSectionAlignmentBytes), index_bytes,
                        XXH3_64bits(records_.data(), index_bytes)};
  header.file_bytes = header.sections[1].offset + index_bytes;
  header.header_xxh3 = XXH3_64bits(&header, offsetof(ImageHeader, header_xxh3));

  if (::ftruncate(fd_.get(), static_cast<off_t>(header.file_bytes)) < 0) return failed("set the length of");
  auto put = [&](const void* data, uint64_t bytes, uint64_t offset) -> Result<void> {
    Result<void> written = pwrite_exactly(fd_.get(), data, bytes, offset, "image " + named);
    if (!written) return with_cure(written.error(), directory_);
    return written;
  };
  VMCKPT_TRY(put(encoded.data(), encoded.size(), header.sections[0].offset));
  VMCKPT_TRY(put(records_.data(), index_bytes, header.sections[1].offset));
  if (::fdatasync(fd_.get()) < 0) return failed("sync");

  // 3. The header makes it an image.
  VMCKPT_TRY(put(&header, sizeof header, 0));
  if (::fsync(fd_.get()) < 0) return failed("sync");
  struct stat status;
  if (::fstat(fd_.get(), &status) < 0) return failed("look at");
  file_bytes_ = static_cast<uint64_t>(status.st_blocks) * 512;
  is_sealed_ = true;
  return {};
}

Result<std::string> ImageWriter::publish() {
  if (!is_sealed_) return error("image " + described() + " is not sealed");
  if (!fd_) return error("image " + described() + " is published already");
  Fd directory_fd(::open(directory_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!directory_fd) return failed("open the directory of");

  // 1. The name makes it visible; only then may an older image go.
  std::string path = destination_.path;
  int err;
  if (is_numbered()) {
    for (;; ++destination_.number) {
      path = fmt::format("{}-{}.ckpt", destination_.numbered_stem, destination_.number);
      if ((err = name_without_replacing(fd_.get(), temporary_path_, path)) != EEXIST) break;
    }
  } else {
    err = name_without_replacing(fd_.get(), temporary_path_, path);
  }
  bool replaced = false;
  if (err == EEXIST) {
    if (!destination_.replace) {
      return error(fmt::format("{} exists and is not to be replaced", path),
                   "choose another file name, or remove that file first");
    }
    VMCKPT_TRY(check_replaceable(path, identity_.target_id));
    if (temporary_path_.empty()) {
      std::string temporary = VMCKPT_TRY(temporary_path(directory_, base_name(path)));
      errno = name_without_replacing(fd_.get(), {}, temporary);
      if (errno != 0) return failed("name");
      temporary_path_ = temporary;
    }
    err = ::rename(temporary_path_.c_str(), path.c_str()) == 0 ? 0 : errno;
    replaced = true;
  }
  errno = err;
  if (err != 0) return failed("name");
  temporary_path_.clear();

  // 2. A name that might not survive a power failure is not a publication. A replaced image cannot come back, so it stays.
  NameGuard guard(replaced ? std::string() : path);
  if (::fsync(directory_fd.get()) < 0 && errno != EINVAL) return failed("sync the directory of");
  guard.disown();
  fd_.reset();
  return path;
}

}  // namespace vmckpt
