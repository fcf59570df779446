#include "memory/captured_files.h"

#include <algorithm>
#include <cstring>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/page.h"
#include "image/raw_sink.h"
#include "image/reader.h"
#include "memory/file_source.h"
#include "memory/page_copy.h"
#include "memory/system_v_segment.h"

namespace vmckpt {
namespace {

constexpr uint64_t kMaxKeptBytes = 1 << 20, kMaxKeptBytesInAll = 8 << 20;

pb::CapturedFile::Kind kind_of(const std::string& name) {
  if (name.starts_with("/memfd:")) return pb::CapturedFile::MEMFD;
  if (name.starts_with("/dev/zero")) return pb::CapturedFile::SHARED_ANONYMOUS;
  if (is_system_v_name(name)) return pb::CapturedFile::SYSTEM_V;
  return pb::CapturedFile::DELETED;
}

uint64_t round_up(uint64_t bytes) { return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes; }

// Runs in the image have short gaps of zeros in them: holes stay holes.
Result<void> write_without_zero_pages(int fd, const uint8_t* content, uint64_t bytes, uint64_t offset, const std::string& name) {
  static constexpr uint8_t kZeros[kPageBytes] = {};
  auto page_bytes = [&](uint64_t at) { return std::min(kPageBytes, bytes - at); };
  auto is_zero = [&](uint64_t at) { return std::memcmp(content + at, kZeros, page_bytes(at)) == 0; };
  for (uint64_t at = 0; at < bytes;) {
    uint64_t end = at;
    while (end < bytes && !is_zero(end)) end += page_bytes(end);
    if (end > at) VMCKPT_TRY(pwrite_exactly(fd, content + at, end - at, offset + at, name));
    at = end;
    while (at < bytes && is_zero(at)) at += page_bytes(at);
  }
  return {};
}

// Within the pause, so the disk is left alone.
Result<void> copy_into_image(PageSource& source, ImageWriter& writer) {
  RawSink sink(writer, RawSink::Writeback::kAtCommit);
  DumpProgress nobody_looks;
  return copy_pages(source, sink, nobody_looks);
}

// Pages that the image does not have are zero: also in a segment that the killed target left behind.
Result<int> rebuild_segment(const pb::CapturedFile& file, const ImageReader& image) {
  const int id = VMCKPT_TRY(make_segment(file.segment()));
  void* attached = ::shmat(id, nullptr, 0);
  if (attached == reinterpret_cast<void*>(-1)) return errno_error("attach " + file.name());
  auto filled = image.pages().read(file.id(), 0, attached, file.segment().size_bytes());
  ::shmdt(attached);
  if (!filled.ok()) return filled.error();
  return id;
}

}  // namespace

Result<void> CapturedFiles::charge(uint64_t bytes, const std::string& name) {
  used_bytes_ += bytes;
  if (used_bytes_ <= limit_bytes_) return {};
  return error(fmt::format("{} and other memory that fork cannot snapshot come to {} MiB, which would have to be copied during "
                           "the pause; the limit is {} MiB", name, used_bytes_ >> 20, limit_bytes_ >> 20),
               "raise it with `vmckpt checkpoint --shared-limit`, or use --stop or --kill");
}

Result<uint64_t> CapturedFiles::capture(int target_fd, const std::string& name, bool kept) {
  // An open file description of our own: looking for holes moves the offset, and that of `target_fd` is the target's. Where the
  // file's permissions forbid another one, the offset is put back.
  auto own = open_file(fmt::format("/proc/self/fd/{}", target_fd), O_RDONLY);
  const int flags = ::fcntl(target_fd, F_GETFL);
  if (!own.ok() && ((flags & O_PATH) != 0 || (flags & O_ACCMODE) == O_WRONLY)) return own.error();
  const int fd = own.ok() ? own->get() : target_fd;
  const off_t offset = ::lseek(fd, 0, SEEK_CUR);
  struct stat info {};
  if (::fstat(fd, &info) != 0) return errno_error("examine " + name);
  auto [known, is_new] = id_by_inode_.try_emplace({info.st_dev, info.st_ino}, files_.size() + 1);
  pb::CapturedFile& file = files_[known->second];
  // What is kept only may turn out to be mapped, or open, under a name that has gone.
  if (!is_new && !kept && file.kind() == pb::CapturedFile::KEPT) {
    file.set_kind(kind_of(name));
    file.clear_path();
  }
  if (!is_new) return known->second;
  file.set_id(known->second);
  file.set_kind(kept ? pb::CapturedFile::KEPT : kind_of(name));
  file.set_name(name);
  file.set_size_bytes(static_cast<uint64_t>(info.st_size));
  file.set_mode(info.st_mode & 07777);
  file.set_device(info.st_dev);
  file.set_inode(info.st_ino);
  file.set_has_owner(true);
  file.set_uid(info.st_uid);
  file.set_gid(info.st_gid);
  file.set_atime_ns(to_ns(info.st_atim));
  file.set_mtime_ns(to_ns(info.st_mtim));
  int seals = kept ? 0 : ::fcntl(fd, F_GET_SEALS);
  if (seals > 0) file.set_seals(static_cast<uint32_t>(seals));
  if (kept) kept_bytes_ += file.size_bytes();
  else VMCKPT_TRY(charge(std::min<uint64_t>(file.size_bytes(), static_cast<uint64_t>(info.st_blocks) * 512), name));
  FileSource source(fd, file.size_bytes(), file.id(), name);
  auto copied = copy_into_image(source, writer_);
  ::lseek(fd, offset, SEEK_SET);
  VMCKPT_TRY(std::move(copied));
  return file.id();
}

bool CapturedFiles::has_room_to_keep(uint64_t bytes) const {
  return bytes <= kMaxKeptBytes && kept_bytes_ + bytes <= kMaxKeptBytesInAll;
}

void CapturedFiles::note_path(uint64_t id, const std::string& path) {
  pb::CapturedFile& file = files_[id];
  file.set_kind(pb::CapturedFile::NAMED);
  file.clear_seals();  // a file of tmpfs shows F_SEAL_SEAL, which only memfds can be given
  file.set_path(path);
}

void CapturedFiles::note_path_of_kept(uint64_t id, const std::string& path) {
  pb::CapturedFile& file = files_[id];
  if (file.kind() == pb::CapturedFile::KEPT) file.set_path(path);
}

void CapturedFiles::note_segment(uint64_t id, const pb::SystemVSegment& segment) { *files_[id].mutable_segment() = segment; }

Result<uint64_t> CapturedFiles::capture_mapping(pid_t pid, uint64_t address, uint64_t bytes, uint64_t file_offset,
                                                uint64_t device, uint64_t inode, const std::string& name) {
  auto [known, is_new] = id_by_inode_.try_emplace({device, inode}, files_.size() + 1);
  pb::CapturedFile& file = files_[known->second];
  if (is_new) {
    file.set_id(known->second);
    file.set_kind(kind_of(name));
    file.set_name(name);
    file.set_mode(0600);
    file.set_device(device);
    file.set_inode(inode);
  } else if (file.size_bytes() >= file_offset + bytes) {
    return file.id();  // seen through another mapping, or captured through a descriptor
  }
  // The part that earlier mappings did not show.
  const uint64_t seen = std::max(round_up(file.size_bytes()), file_offset), end = file_offset + bytes;
  if (seen >= end) return file.id();
  VMCKPT_TRY(charge(end - seen, name));
  MappedFileSource source({pid, address, file_offset}, seen, end, file.id(), name);
  VMCKPT_TRY(copy_into_image(source, writer_));
  file.set_size_bytes(end);
  return file.id();
}

Result<void> RebuiltFiles::rebuild(const ImageReader& image, int first_fd, const FileAccess& access) {
  image_ = &image;
  for (const pb::CapturedFile& file : image.metadata().captured_files()) {
    files_[file.id()] = &file;
    if (file.kind() == pb::CapturedFile::KEPT && !is_put_back(file, access)) continue;
    if (file.has_segment()) {
      segments_[file.id()] = VMCKPT_TRY(rebuild_segment(file, image));
      continue;
    }
    if (!file.path().empty()) {
      Fd low = VMCKPT_TRY(open_shared_file(file, access));
      Fd fd(::fcntl(low.get(), F_DUPFD_CLOEXEC, first_fd));
      if (!fd) return errno_error("keep " + file.path() + " open");
      if (access.policy().shared_files != SharedFiles::kLeave) VMCKPT_TRY(fill(file.id(), fd.get()));
      fds_[file.id()] = std::move(fd);
      continue;
    }
    std::string name = file.name();
    if (name.starts_with("/memfd:")) name = name.substr(7);
    if (name.ends_with(" (deleted)")) name.resize(name.size() - 10);
    if (size_t slash = name.rfind('/'); slash != std::string::npos) name = name.substr(slash + 1);
    Fd low(::memfd_create(name.substr(0, 200).c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
    Fd fd(::fcntl(low.get(), F_DUPFD_CLOEXEC, first_fd));
    if (!fd) return errno_error("make the memory file " + file.name());
    VMCKPT_TRY(fill(file.id(), fd.get()));
    if (::fchmod(fd.get(), static_cast<mode_t>(file.mode())) != 0) return errno_error("set the mode of " + file.name());
    fds_[file.id()] = std::move(fd);
  }
  return {};
}

Result<void> RebuiltFiles::fill(uint64_t id, int fd) const {
  auto found = files_.find(id);
  if (found == files_.end()) return error(fmt::format("the image has no captured file {}", id), "use another image");
  const pb::CapturedFile& file = *found->second;
  if (::ftruncate(fd, static_cast<off_t>(file.size_bytes())) != 0) {
    return errno_error(fmt::format("give {} its {} bytes", file.name(), file.size_bytes()));
  }
  VMCKPT_TRY(image_->pages().read_all(file.id(), [&](uint64_t at, const uint8_t* content, uint64_t bytes) {
    const uint64_t within = std::min(bytes, file.size_bytes() > at ? file.size_bytes() - at : 0);  // the last page is filled up
    return write_without_zero_pages(fd, content, within, at, file.name());
  }));
  if (!file.has_owner()) return {};
  // An ordinary user's files are his own, as they were; what may not be given back stays as it is.
  struct stat now {};
  if (::fstat(fd, &now) == 0 && (now.st_uid != file.uid() || now.st_gid != file.gid())) {
    (void)!::fchown(fd, file.uid(), file.gid());
  }
  const timespec times[2] = {to_timespec(file.atime_ns()), to_timespec(file.mtime_ns())};
  ::futimens(fd, times);
  return {};
}

int RebuiltFiles::segment(uint64_t id) const {
  auto found = segments_.find(id);
  return found == segments_.end() ? -1 : found->second;
}

int RebuiltFiles::fd_of_path(const std::string& path) const {
  for (const auto& [id, file] : files_) {
    if (file->path() == path) return fd(id);
  }
  return -1;
}

int RebuiltFiles::fd(uint64_t id) const {
  auto found = fds_.find(id);
  return found == fds_.end() ? -1 : found->second.get();
}

}  // namespace vmckpt
