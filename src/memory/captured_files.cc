#include "memory/captured_files.h"

#include <algorithm>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <unistd.h>

#include "image/page_runs.h"
#include "image/reader.h"
#include "image/writer.h"
#include "memory/system_v_segment.h"
#include "tracer/stopped_world.h"

namespace vmckpt {
namespace {

constexpr uint64_t kPageBytes = kImagePageBytes;

pb::CapturedFile::Kind kind_of(const std::string& name) {
  if (name.starts_with("/memfd:")) return pb::CapturedFile::MEMFD;
  if (name.starts_with("/dev/zero")) return pb::CapturedFile::SHARED_ANONYMOUS;
  if (is_system_v_name(name)) return pb::CapturedFile::SYSTEM_V;
  return pb::CapturedFile::DELETED;
}

uint64_t round_up(uint64_t bytes) { return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes; }

// Copies the data (not the holes) of a file that nobody changes meanwhile.
Result<void> copy_data(int fd, uint64_t size_bytes, uint64_t id, const std::string& name, ImageWriter& writer) {
  std::vector<uint8_t> buffer(kMaxRecordBytes);
  for (uint64_t at = 0; at < size_bytes;) {
    off_t data = ::lseek(fd, static_cast<off_t>(at), SEEK_DATA);
    if (data < 0 && errno == ENXIO) break;  // only a hole is left
    if (data >= 0) at = static_cast<uint64_t>(data) / kPageBytes * kPageBytes;
    uint64_t bytes = std::min<uint64_t>(kMaxRecordBytes, size_bytes - at);
    std::fill(buffer.begin(), buffer.end(), 0);
    VMCKPT_TRY(pread_exactly(fd, buffer.data(), bytes, at, name));
    VMCKPT_TRY(write_runs(buffer.data(), round_up(bytes), id, at, writer));
    at += kMaxRecordBytes;
  }
  return {};
}

// Pages that the image does not have are zero: also in a segment that the killed target left behind.
Result<int> rebuild_segment(const pb::CapturedFile& file, const ImageReader& image) {
  const int id = VMCKPT_TRY(make_segment(file.segment()));
  void* attached = ::shmat(id, nullptr, 0);
  if (attached == reinterpret_cast<void*>(-1)) return errno_error("attach " + file.name());
  const uint64_t size_bytes = file.segment().size_bytes();
  Result<void> filled;
  auto* content = static_cast<uint8_t*>(attached);
  std::fill_n(content, size_bytes, uint8_t{0});
  for (const PageRecord& record : image.records_of(file.id())) {
    const uint64_t bytes = std::min(record.bytes, size_bytes > record.address ? size_bytes - record.address : 0);
    filled = pread_exactly(image.fd(), content + record.address, bytes, record.file_offset, image.path());
    if (!filled.ok()) break;
  }
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
               "raise it with `vmckpt checkpoint --shared-limit`, or use --stop");
}

Result<uint64_t> CapturedFiles::capture(int target_fd, const std::string& name) {
  // An open file description of our own: looking for holes moves the offset, and that of `target_fd` is the target's.
  Fd own = VMCKPT_TRY(open_file(fmt::format("/proc/self/fd/{}", target_fd), O_RDONLY));
  const int fd = own.get();
  struct stat info {};
  if (::fstat(fd, &info) != 0) return errno_error("examine " + name);
  auto [known, is_new] = id_by_inode_.try_emplace({info.st_dev, info.st_ino}, files_.size() + 1);
  if (!is_new) return known->second;
  pb::CapturedFile& file = files_[known->second];
  file.set_id(known->second);
  file.set_kind(kind_of(name));
  file.set_name(name);
  file.set_size_bytes(static_cast<uint64_t>(info.st_size));
  file.set_mode(info.st_mode & 07777);
  file.set_device(info.st_dev);
  file.set_inode(info.st_ino);
  int seals = ::fcntl(fd, F_GET_SEALS);
  if (seals > 0) file.set_seals(static_cast<uint32_t>(seals));
  VMCKPT_TRY(charge(std::min<uint64_t>(file.size_bytes(), static_cast<uint64_t>(info.st_blocks) * 512), name));
  VMCKPT_TRY(copy_data(fd, file.size_bytes(), file.id(), name, writer_));
  return file.id();
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
  // The part that earlier mappings did not show. Reading allocates pages that were never touched: that is what it costs to
  // look at shared memory without privileges.
  uint64_t seen = std::max(file.size_bytes(), file_offset);
  VMCKPT_TRY(charge(file_offset + bytes - seen, name));
  std::vector<uint8_t> buffer(kMaxRecordBytes);
  for (uint64_t at = seen; at < file_offset + bytes; at += kMaxRecordBytes) {
    uint64_t part = std::min<uint64_t>(kMaxRecordBytes, file_offset + bytes - at);
    VMCKPT_TRY(read_memory(pid, address + (at - file_offset), buffer.data(), part));
    VMCKPT_TRY(write_runs(buffer.data(), part, file.id(), at, writer_));
  }
  file.set_size_bytes(file_offset + bytes);
  return file.id();
}

Result<void> RebuiltFiles::rebuild(const pb::AddressSpace& space, const ImageReader& image, int first_fd) {
  for (const pb::CapturedFile& file : space.captured()) {
    if (file.has_segment()) {
      segments_[file.id()] = VMCKPT_TRY(rebuild_segment(file, image));
      continue;
    }
    std::string name = file.name();
    if (name.starts_with("/memfd:")) name = name.substr(7);
    if (name.ends_with(" (deleted)")) name.resize(name.size() - 10);
    if (size_t slash = name.rfind('/'); slash != std::string::npos) name = name.substr(slash + 1);
    Fd low(::memfd_create(name.substr(0, 200).c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
    Fd fd(::fcntl(low.get(), F_DUPFD_CLOEXEC, first_fd));
    if (!fd) return errno_error("make the memory file " + file.name());
    if (::fchmod(fd.get(), static_cast<mode_t>(file.mode())) != 0) return errno_error("set the mode of " + file.name());
    if (::ftruncate(fd.get(), static_cast<off_t>(file.size_bytes())) != 0) {
      return errno_error(fmt::format("give {} its {} bytes", file.name(), file.size_bytes()));
    }
    std::vector<uint8_t> buffer(kMaxRecordBytes);
    for (const PageRecord& record : image.records_of(file.id())) {
      uint64_t bytes = std::min(record.bytes, file.size_bytes() > record.address ? file.size_bytes() - record.address : 0);
      VMCKPT_TRY(pread_exactly(image.fd(), buffer.data(), bytes, record.file_offset, image.path()));
      VMCKPT_TRY(pwrite_exactly(fd.get(), buffer.data(), bytes, record.address, file.name()));
    }
    fds_[file.id()] = std::move(fd);
  }
  return {};
}

int RebuiltFiles::segment(uint64_t id) const {
  auto found = segments_.find(id);
  return found == segments_.end() ? -1 : found->second;
}

int RebuiltFiles::fd(uint64_t id) const {
  auto found = fds_.find(id);
  return found == fds_.end() ? -1 : found->second.get();
}

}  // namespace vmckpt
