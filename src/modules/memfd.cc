// Files that no path leads to: memfd_create(2), O_TMPFILE, and files whose last name has been removed.
//
// The content is a CapturedFile of the image (src/memory/captured_files.h), shared with the mappings of the same file;
// size, owner, times and seals belong to it. A descriptor adds access mode, status flags and position. Restored after
// RebuiltFiles has made the file again: it is opened once more for every open file description through /proc/self/fd, which works
// without a path and gives each its own position. Sources: memfd_create(2), proc_pid_fd(5).
#include <set>

#include <fcntl.h>
#include <unistd.h>

#include "modules/descriptor_module.h"
#include "modules/inotify.pb.h"
#include "modules/memfd.pb.h"
#include "modules/regular_file.pb.h"

namespace vmckpt {
namespace {

const pb::CapturedDescriptor& captured_of(const pb::OpenFile& file) { return file.GetExtension(pb::captured); }

constexpr uint32_t kTmpfileBit = O_TMPFILE & ~O_DIRECTORY;

bool recognise(const TargetFile& file) {
  return (file.flags & O_PATH) == 0 && S_ISREG(file.status.st_mode) && file.status.st_nlink == 0 &&
         has_ordinary_content(file) && !is_pseudo_file(file);
}

// Captured files that inotify watches: since Linux 6.14 what happens through the descriptor that memfd_create gives is not
// reported (FMODE_NONOTIFY, alloc_file_pseudo in fs/file_table.c).
std::set<uint64_t> find_watched(const pb::Image& image) {
  std::set<uint32_t> ids;
  for (const pb::OpenFile& file : image.open_files()) {
    for (const pb::InotifyWatch& watch : file.GetExtension(pb::inotify).watches()) {
      if (watch.has_file()) ids.insert(watch.file());
    }
  }
  std::set<uint64_t> watched;
  for (const pb::OpenFile& file : image.open_files()) {
    if (file.HasExtension(pb::captured) && ids.count(file.id()) != 0) watched.insert(captured_of(file).captured_id());
  }
  return watched;
}

Result<void> restore(RestoreContext& context) {
  std::set<uint64_t> given = find_watched(context.image);  // and captured files whose own descriptor the target has
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (!file.HasExtension(pb::captured)) continue;
    int whole = context.restore.captured.fd(captured_of(file).captured_id());
    if (whole < 0)
      return error(fmt::format("{}: the image has no content for it", describe(file)), "use another image");
    uint32_t dropped = kTmpfileBit | O_DIRECTORY | O_CREAT | O_EXCL | O_TRUNC | O_NOFOLLOW | O_ASYNC | O_DIRECT;
    const bool is_place = (file.status_flags() & O_PATH) != 0;
    // The descriptor that memfd_create gives does not count as a writer, one that opened the file again does, and a file with a
    // writer cannot be executed (ETXTBSY; i_writecount in fs/open.c). So the first that may be memfd_create's own is.
    const bool may_be_first = !is_place && (file.status_flags() & (O_ACCMODE | O_APPEND)) == O_RDWR;
    Fd fd;
    if (may_be_first && given.insert(captured_of(file).captured_id()).second) {
      fd = Fd(::fcntl(whole, F_DUPFD_CLOEXEC, context.restore.first_service_fd));
      if (!fd) return errno_error(fmt::format("{}: duplicate its descriptor", describe(file)));
      if (::fcntl(fd.get(), F_SETFL, file.status_flags() & ~dropped) != 0 || ::lseek(fd.get(), 0, SEEK_SET) < 0) {
        return errno_error(fmt::format("{}: set its status flags", describe(file)));
      }
    } else {
      fd = VMCKPT_TRY(reopen(whole, static_cast<int>(file.status_flags() & ~dropped)));
    }
    if (!is_place && captured_of(file).position() != 0 && ::lseek(fd.get(), captured_of(file).position(), SEEK_SET) < 0) {
      return errno_error(fmt::format("{}: go to position {}", describe(file), captured_of(file).position()));
    }
    VMCKPT_TRY(context.put(file, std::move(fd)));
  }
  // Only now: the permissions may forbid opening the file as its descriptors were.
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (!file.HasExtension(pb::captured)) continue;
    const int whole = context.restore.captured.fd(captured_of(file).captured_id());
    if (::fchmod(whole, captured_of(file).permissions()) == 0) continue;
    return errno_error(fmt::format("{}: set its permissions to {:#o}", describe(file), captured_of(file).permissions()));
  }
  return {};
}

}  // namespace

Result<uint64_t> capture_content(SaveContext& context, const TargetFile& file, int fd, bool kept) {
  return context.save.captured.capture(fd, file.link, kept);
}

Result<void> save_captured(SaveContext& context, const TargetFile& file, int fd, pb::OpenFile* saved) {
  auto id = capture_content(context, file, fd);
  if (!id.ok() && file.stdio() >= 0) {
    context.note(fmt::format("{} has no name any more and may not be read; after a restart it will be restart's own",
                             file.describe()));
    saved->MutableExtension(pb::path_file)->set_mode(file.status.st_mode);
    saved->MutableExtension(pb::path_file)->set_path(file.link);
    saved->MutableExtension(pb::path_file)->set_volatile_content(true);
    return {};
  }
  saved->MutableExtension(pb::captured)->set_captured_id(VMCKPT_TRY(std::move(id)));
  saved->MutableExtension(pb::captured)->set_position(file.position);
  saved->MutableExtension(pb::captured)->set_permissions(file.status.st_mode & 07777);
  return {};
}

const DescriptorModule kMemfdModule{"memfd", recognise, save_captured, nullptr, nullptr, restore};

}  // namespace vmckpt
