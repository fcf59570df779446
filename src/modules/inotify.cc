// inotify(7): watches on inodes, each with a watch descriptor, and a queue of events.
//
// Made by inotify_init, changed by inotify_add_watch and inotify_rm_watch. fdinfo shows watch descriptor, inode and
// mask, but no path; the recorder notes the path given, which is believed only if it still leads to the inode watched.
// Otherwise the target's own open files may know the inode, and root asks with open_by_handle_at(2). A removed file that
// the target has open is watched through that descriptor. Any other watch is refused.
//
// The kernel removes watches by itself (deleted file, IN_ONESHOT, closed descriptor), unseen by the recorder: notes of
// watches that are not there are given back to it here.
//
// Restart finds the file again as all files are found: with the target's rights, over no symbolic link, and where these are
// not the caller's only as the one that was watched. It is watched through its descriptor.
//
// Watch descriptors are kept: the kernel gives them out in increasing order (idr_alloc_cyclic), so watches are added in
// that order and numbers in between are used up by adding and removing a watch on a file nobody else knows.
//
// Events that wait in the queue cannot be looked at without taking them from the running program: they are not saved,
// and a note says how many bytes there were. Restored after regular files, so that opening those is not seen as an
// event. Sources: inotify(7), proc_pid_fdinfo(5), fs/notify/inotify/inotify_user.c. fdinfo: Linux 3.8.
#include <algorithm>
#include <climits>

#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "core/proc.h"
#include "modules/descriptor_module.h"
#include "modules/inotify.pb.h"
#include "tracer/ledger_reader.h"

namespace vmckpt {
namespace {

constexpr uint32_t kWatchBits = IN_ALL_EVENTS | IN_EXCL_UNLINK | IN_ONESHOT | IN_ONLYDIR;
constexpr int kMaxUnusedWatches = 1 << 20;
constexpr int kUnusedPerDrain =
    4096;  // below fs.inotify.max_queued_events (16384), for each leaves an IN_IGNORED event

struct WatchLine {
  int watch;
  uint64_t inode;
  uint64_t device;  // the kernel's own numbering: major << 20 | minor
  uint32_t mask;
  std::string_view text;
};

bool recognise(const TargetFile& file) { return file.is_anonymous("inotify") || file.is_anonymous("[inotify]"); }

// "inotify wd:1 ino:3c51a sdev:fe00000 mask:2 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:1ac5030000000000"
WatchLine parse_watch(std::string_view line) {
  return {static_cast<int>(parse_hex(word_after(line, " wd:"))), parse_hex(word_after(line, " ino:")),
          parse_hex(word_after(line, " sdev:")), static_cast<uint32_t>(parse_hex(word_after(line, " mask:"))), line};
}

// Whether a watch on `path` is a watch on that inode, in the kernel's own numbers (on overlayfs and btrfs stat has
// others).
bool watches_inode(const std::string& path, const WatchLine& watch, bool do_not_follow) {
  Fd probe(::inotify_init1(IN_CLOEXEC | IN_NONBLOCK));
  if (!probe ||
      ::inotify_add_watch(probe.get(), path.c_str(), IN_DELETE_SELF | (do_not_follow ? IN_DONT_FOLLOW : 0)) < 0) {
    return false;
  }
  auto info = read_whole_file(fmt::format("/proc/self/fdinfo/{}", probe.get()));
  if (!info.ok()) return false;
  auto lines = fdinfo_lines(*info, "inotify ");
  if (lines.size() != 1) return false;
  WatchLine there = parse_watch(lines[0]);
  return there.inode == watch.inode && there.device == watch.device;
}

bool leads_to(const std::string& path, const WatchLine& watch, bool do_not_follow) {
  struct stat there;
  if (::fstatat(AT_FDCWD, path.c_str(), &there, do_not_follow ? AT_SYMLINK_NOFOLLOW : 0) != 0) return false;
  uint64_t device = (uint64_t{major(there.st_dev)} << 20) | minor(there.st_dev);
  if (there.st_ino == watch.inode && device == watch.device) return true;
  return watches_inode(path, watch, do_not_follow);
}

Result<Fd> open_mount_of(const SaveContext& context, uint64_t device) {
  std::string wanted = fmt::format("{}:{}", device >> 20, device & 0xfffff);
  std::string mounts = VMCKPT_TRY(read_whole_file(fmt::format("/proc/{}/mountinfo", context.pid())));
  for (std::string_view line : split_lines(mounts)) {
    auto words = split_words(line);
    if (words.size() < 5 || words[2] != wanted) continue;
    if (auto fd = open_file(std::string(words[4]), O_RDONLY | O_NONBLOCK); fd.ok()) return fd;
  }
  return error("no mount of device " + wanted);
}

// Needs CAP_DAC_READ_SEARCH in the first user namespace. Empty when it does not work.
std::string path_by_handle(const SaveContext& context, const WatchLine& watch) {
  std::string_view hex = word_after(watch.text, "f_handle:");
  alignas(file_handle) unsigned char buffer[sizeof(file_handle) + MAX_HANDLE_SZ] = {};
  auto* handle = reinterpret_cast<file_handle*>(buffer);
  handle->handle_bytes = static_cast<unsigned>(parse_hex(word_after(watch.text, "fhandle-bytes:")));
  handle->handle_type = static_cast<int>(parse_hex(word_after(watch.text, "fhandle-type:")));
  if (handle->handle_bytes == 0 || handle->handle_bytes > MAX_HANDLE_SZ || hex.size() < handle->handle_bytes * 2)
    return {};
  for (unsigned i = 0; i < handle->handle_bytes; ++i) {
    buffer[sizeof(file_handle) + i] = static_cast<unsigned char>(parse_hex(hex.substr(i * 2, 2)));
  }
  auto mount = open_mount_of(context, watch.device);
  if (!mount.ok()) return {};
  Fd fd(::open_by_handle_at(mount->get(), handle, O_PATH | O_CLOEXEC));
  if (!fd) return {};
  auto path = read_link(fmt::format("/proc/self/fd/{}", fd.get()));
  return path.ok() ? *path : std::string();
}

// Numbers of the recorder's notes that may know the path: those about this file first, then those about a descriptor
// that it may have had before it was duplicated.
std::vector<uint32_t> notes_about(SaveContext& context, const TargetFile& file, const WatchLine& watch) {
  std::vector<uint32_t> notes = context.list_ledger_notes(NoteKind::kInotifyWatch, watch.watch);
  auto is_own = [&](uint32_t number) {
    return std::any_of(file.numbers.begin(), file.numbers.end(),
                       [&](const auto& own) { return own.number == context.ledger_note(number).fd; });
  };
  auto others = std::stable_partition(notes.begin(), notes.end(), is_own);
  context.watch_notes.insert(notes.begin(), others);
  return notes;
}

Result<void> find_path(SaveContext& context, const TargetFile& file, const WatchLine& watch, pb::InotifyWatch* saved) {
  auto accept = [&](const std::string& path) {
    for (bool do_not_follow : {false, true}) {
      if (path.empty() || path[0] != '/' || !leads_to(path, watch, do_not_follow)) continue;
      Fd there(::open(path.c_str(), O_PATH | O_CLOEXEC | (do_not_follow ? O_NOFOLLOW : 0)));
      if (!there) continue;
      const std::string link = fmt::format("/proc/self/fd/{}", there.get());
      auto real = read_link(link);
      if (!real.ok() || !leads_to(link, watch, false) || !leads_to(*real, watch, true)) continue;
      saved->set_path(*real);
      saved->set_do_not_follow(do_not_follow);
      *saved->mutable_origin() = inode_of(there.get());
      return true;
    }
    return false;
  };
  std::string noted;
  for (uint32_t number : notes_about(context, file, watch)) {
    std::string path = context.ledger_note(number).text;
    if (path[0] != '/') {  // given by a program that had locked itself in
      if (auto folder = read_link(fmt::format("/proc/{}/cwd", context.pid())); folder.ok()) path = *folder + "/" + path;
    }
    if (noted.empty()) noted = path;
    if (!accept(path)) continue;
    context.watch_notes.insert(number);
    return {};
  }
  std::string by_handle = path_by_handle(context, watch);
  if (accept(by_handle)) return {};
  for (const TargetFile& other : context.files) {
    if (other.status.st_ino != watch.inode || !other.duplicate) continue;
    if (accept(other.link)) return {};
    if (!leads_to(fmt::format("/proc/self/fd/{}", other.duplicate.get()), watch, false)) continue;
    saved->set_file(other.file_id());
    return {};
  }
  constexpr std::string_view kDeleted = " (deleted)";
  if (by_handle.ends_with(kDeleted)) {
    return error(fmt::format("{} watches inode {} (\"{}\"), which has been removed and is kept by another process",
                             file.describe(), watch.inode, by_handle.substr(0, by_handle.size() - kDeleted.size())),
                 "let the program remove the watch, or checkpoint again when that process has closed the file");
  }
  if (!noted.empty()) {
    return error(fmt::format("{} watches inode {}, which \"{}\" does not lead to any more: it has been renamed or removed",
                             file.describe(), watch.inode, noted),
                 "let the program watch it by its new name or remove the watch; root finds renamed files, too");
  }
  return error(fmt::format("{} watches inode {} whose path is not known: the watch was added without libc, or in another "
                           "process",
                           file.describe(), watch.inode),
               "checkpoint as root, or let the program hold the watched file or directory open");
}

Result<void> save(SaveContext& context, const TargetFile& file, int fd, pb::OpenFile* saved) {
  pb::Inotify* inotify = saved->MutableExtension(pb::inotify);
  std::vector<WatchLine> watches;
  for (std::string_view line : fdinfo_lines(file.fdinfo, "inotify ")) watches.push_back(parse_watch(line));
  std::sort(watches.begin(), watches.end(), [](const auto& a, const auto& b) { return a.watch < b.watch; });
  for (const WatchLine& watch : watches) {
    pb::InotifyWatch* entry = inotify->add_watches();
    entry->set_watch(watch.watch);
    entry->set_inode(watch.inode);
    entry->set_mask(watch.mask & kWatchBits);
    VMCKPT_TRY(find_path(context, file, watch, entry));
  }
  int unread = 0;
  if (::ioctl(fd, FIONREAD, &unread) == 0 && unread > 0) {
    context.note(fmt::format("{} has {} bytes of events that the program has not read; they are not in the image",
                             file.describe(), unread));
  }
  return {};
}

// Notes of watches that are not there would fill the recorder's table.
Result<void> save_links(SaveContext& context) {
  std::vector<uint32_t> stale;
  for (const auto& [key, number] : context.notes_by_key) {
    bool ended = context.ledger_note(number).kind == NoteKind::kInotifyWatch && context.watch_notes.count(number) == 0;
    if (ended) stale.push_back(number);
  }
  std::sort(stale.begin(), stale.end());
  return mark_notes_stale(context.pid(), context.save.ledger, stale);
}

Result<Fd> find_watched(const FileAccess& access, const pb::InotifyWatch& watch) {
  return access.locate(watch.path(), watch.do_not_follow() ? O_NOFOLLOW : 0, watch.origin());
}

Error watched_by(const pb::OpenFile& file, Error failed) {
  failed.what = fmt::format("{} watches a file: {}", describe(file), failed.what);
  return failed;
}

// A watch outlasts the right to read the file: that very file the caller's rights may watch.
int watch_found(const FileAccess& access, int inotify, int found, const pb::Inode& then, uint32_t mask) {
  const std::string link = fmt::format("/proc/self/fd/{}", found);
  int got = -1;
  auto add = [&] { return got = ::inotify_add_watch(inotify, link.c_str(), mask); };
  if (access.as_target(add) >= 0) return got;
  return errno == EACCES && access.is_foreign() && is_same_inode(then, inode_of(found)) ? add() : -1;
}

void check(CheckContext& context) {
  for (const pb::OpenFile& file : context.image.open_files()) {
    for (const pb::InotifyWatch& watch : file.GetExtension(pb::inotify).watches()) {
      if (watch.has_file()) continue;
      struct stat now;
      if (::fstatat(AT_FDCWD, watch.path().c_str(), &now, watch.do_not_follow() ? AT_SYMLINK_NOFOLLOW : 0) != 0) {
        context.problem(errno_error(fmt::format("\"{}\", which {} watches, is missing", watch.path(), describe(file)),
                                    "put it back where it was"));
      } else if (auto found = find_watched(context.access, watch); !found.ok()) {
        context.problem(watched_by(file, found.error()));
      }
    }
  }
}

void drain(int inotify) {
  char events[4096];
  while (::read(inotify, events, sizeof events) > 0) {}
}

// Uses up watch descriptors so that the next one given out is `next`.
Result<void> skip_watches(const pb::OpenFile& file, int inotify, int given, int next) {
  if (next - given > kMaxUnusedWatches) {
    return error(
        fmt::format("{} has the watch descriptor {}, too far from the one before to be reached", describe(file), next));
  }
  if (next == given) return {};
  Fd private_file(::memfd_create("vmckpt-unused-watch", MFD_CLOEXEC));
  if (!private_file) return errno_error("make a file to watch for " + describe(file));
  std::string path = fmt::format("/proc/self/fd/{}", private_file.get());
  for (int used = 0; given < next; ++given) {
    int watch = ::inotify_add_watch(inotify, path.c_str(), IN_MOVE_SELF);
    if (watch < 0 || ::inotify_rm_watch(inotify, watch) != 0)
      return errno_error("use up watch descriptors of " + describe(file));
    if (++used % kUnusedPerDrain == 0) drain(inotify);
  }
  return {};
}

Result<void> add_watches(const RestoreContext& context, const pb::OpenFile& file, int inotify) {
  int next = 1;  // idr_alloc_cyclic starts at 1
  for (const pb::InotifyWatch& watch : file.GetExtension(pb::inotify).watches()) {
    VMCKPT_TRY(skip_watches(file, inotify, next, watch.watch()));
    std::string path = watch.path();
    int got = -1;
    if (watch.has_file()) {  // the target's own by now
      path = fmt::format("/proc/self/fd/{}", context.fd(watch.file()));
      got = ::inotify_add_watch(inotify, path.c_str(), watch.mask());
    } else {
      auto found = find_watched(context.restore.access, watch);
      if (!found.ok()) return watched_by(file, found.error());
      got = watch_found(context.restore.access, inotify, found->get(), watch.origin(), watch.mask());
    }
    if (got < 0) return errno_error(fmt::format("watch \"{}\" for {}", path, describe(file)));
    if (got != watch.watch()) {
      return error(fmt::format("{} got watch descriptor {} instead of {} for \"{}\"", describe(file), got,
                               watch.watch(), path),
                   got < watch.watch() ? "two watched paths have become one file: put back what was there" : "");
    }
    next = watch.watch() + 1;
  }
  drain(inotify);
  return {};
}

Result<void> restore(RestoreContext& context) {
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (!file.HasExtension(pb::inotify)) continue;
    Fd fd(::inotify_init1(IN_CLOEXEC | IN_NONBLOCK));
    if (!fd) return errno_error("make the inotify file of " + describe(file));
    VMCKPT_TRY(add_watches(context, file, fd.get()));
    VMCKPT_TRY(context.put(file, std::move(fd)));
  }
  return {};
}

}  // namespace

const DescriptorModule kInotifyModule{"inotify", recognise, save, save_links, check, restore};

}  // namespace vmckpt
