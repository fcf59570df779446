// Recognising a mapped file: same build id, or same size and modification time; where the target had other rights than
// the caller, the very same file otherwise.
#include <fcntl.h>
#include <sys/stat.h>

#include "core/elf_file.h"
#include "core/fd.h"
#include "memory/address_space.h"

namespace vmckpt {
namespace {

Result<pb::FileIdentity> examine(int fd, const std::string& path) {
  struct stat info {};
  if (::fstat(fd, &info) != 0) return errno_error("examine " + path);
  pb::FileIdentity identity;
  identity.set_path(path);
  identity.set_device(info.st_dev);
  identity.set_inode(info.st_ino);
  identity.set_size_bytes(static_cast<uint64_t>(info.st_size));
  identity.set_mtime_sec(info.st_mtim.tv_sec);
  identity.set_mtime_nsec(info.st_mtim.tv_nsec);
  *identity.mutable_origin() = inode_of(fd);
  if (S_ISREG(info.st_mode)) {
    if (auto elf = ElfFile::open(fd, path); elf.ok()) identity.set_build_id(elf->build_id());
  }
  return identity;
}

}  // namespace

Result<pb::FileIdentity> identify_file(pid_t pid, const std::string& path) {
  // O_NONBLOCK: the path may lead to a FIFO by now.
  auto fd = open_file(fmt::format("/proc/{}/root{}", pid, path), O_RDONLY | O_NONBLOCK);
  if (!fd.ok()) fd = open_file(path, O_RDONLY | O_NONBLOCK);
  if (!fd.ok()) return fd.error();
  return examine(fd->get(), path);
}

Result<Fd> open_mapped_file(const pb::FileIdentity& identity, int flags, const FileAccess& access, pb::FileIdentity* now) {
  // What the target could open itself gives nothing away: there the same build may be another file, as an installation makes it.
  Fd fd = VMCKPT_TRY(access.accepting_others().open(identity.path(), flags, identity.origin()));
  *now = VMCKPT_TRY(examine(fd.get(), identity.path()));
  const bool same_build = !identity.build_id().empty() && identity.build_id() == now->build_id();
  if (access.is_foreign() && !access.policy().accept_changed && !same_build &&
      !is_same_inode(identity.origin(), now->origin())) {
    return error(fmt::format("\"{}\" is another file than at the checkpoint", identity.path()),
                 "put back what was there, or pass --changed-files=accept to open it with the program's rights");
  }
  return fd;
}

std::string difference_from(const pb::FileIdentity& identity, const FileAccess& access, pb::FileIdentity* now) {
  auto opened = open_mapped_file(identity, O_RDONLY | O_NONBLOCK, access, now);
  if (!opened.ok()) return opened.error().message();
  if (!identity.build_id().empty() && identity.build_id() == now->build_id()) return {};
  if (!identity.build_id().empty()) return "it has another build id";
  if (identity.size_bytes() != now->size_bytes()) {
    return fmt::format("its size was {} bytes and is {}", identity.size_bytes(), now->size_bytes());
  }
  if (identity.mtime_sec() != now->mtime_sec() || identity.mtime_nsec() != now->mtime_nsec()) {
    return "it was modified since";
  }
  return {};
}

}  // namespace vmckpt
