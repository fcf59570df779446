// Recognising a mapped file: same build id, or same size and modification time; where the target had other rights than
// the caller, the very same file otherwise.
#include <cstring>

#include <elf.h>
#include <fcntl.h>
#include <sys/stat.h>

#include "core/fd.h"
#include "memory/address_space.h"

namespace vmckpt {
namespace {

constexpr size_t kMaxNoteBytes = 64 * 1024;

// NT_GNU_BUILD_ID from the file's PT_NOTE segments, or empty.
std::string build_id_of(int fd) {
  Elf64_Ehdr header{};
  if (!pread_exactly(fd, &header, sizeof header, 0, "").ok()) return {};
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_ident[EI_CLASS] != ELFCLASS64) return {};
  if (header.e_phentsize != sizeof(Elf64_Phdr)) return {};
  for (unsigned i = 0; i < header.e_phnum; ++i) {
    Elf64_Phdr segment{};
    if (!pread_exactly(fd, &segment, sizeof segment, header.e_phoff + i * sizeof segment, "").ok()) return {};
    if (segment.p_type != PT_NOTE || segment.p_filesz > kMaxNoteBytes) continue;
    std::string notes(segment.p_filesz, '\0');
    if (!pread_exactly(fd, notes.data(), notes.size(), segment.p_offset, "").ok()) return {};
    for (size_t at = 0; at + sizeof(Elf64_Nhdr) <= notes.size();) {
      Elf64_Nhdr note{};
      std::memcpy(&note, notes.data() + at, sizeof note);
      size_t name = at + sizeof note;
      size_t description = name + (size_t{note.n_namesz} + 3) / 4 * 4;
      size_t next = description + (size_t{note.n_descsz} + 3) / 4 * 4;
      if (next > notes.size() || next <= at) break;
      if (note.n_type == NT_GNU_BUILD_ID && note.n_namesz == 4 && notes.compare(name, 3, "GNU") == 0) {
        return notes.substr(description, note.n_descsz);
      }
      at = next;
    }
  }
  return {};
}

}  // namespace

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
  if (S_ISREG(info.st_mode)) identity.set_build_id(build_id_of(fd));
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
