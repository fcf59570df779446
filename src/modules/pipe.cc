// Pipes and FIFOs: a ring of pages with read ends and write ends.
//
// Made by pipe2(2), or open(2) of a FIFO; changed by reads, writes, splice, F_SETPIPE_SZ; O_DIRECT on a write end keeps
// packets apart. Saved: which ends are open, capacity, and the content, copied with tee(2), which takes nothing out.
// tee hands over references to pages, so the scratch pipe needs as many slots as the pipe has.
//
//   both kinds of end inside        rebuilt with content
//   the other end already closed    rebuilt with content, the other end closed again: end of file, or EPIPE
//   the other end outside, 0 to 2   restart's own stdin, stdout or stderr takes its place (unread content is noted)
//   the other end outside           rebuilt with content, the other end closed; noted
//   FIFO                            opened again by its path; content put back when it is empty
//
// Restore order: make the pipe, fill it while it still has a read end, then open further ends through /proc/self/fd
// (each open file description of its own), then close what the target did not have. Ends are opened without blocking;
// flags come right afterwards. Sources: pipe(7), pipe(2), tee(2), fcntl(2).
#include <algorithm>

#include <poll.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "modules/descriptor_module.h"
#include "modules/pipe.pb.h"

namespace vmckpt {
namespace {

bool recognise(const TargetFile& file) { return S_ISFIFO(file.status.st_mode); }

bool has_name(const TargetFile& file) { return file.link[0] == '/' && file.status.st_nlink > 0; }

// Copies the content out of a scratch pipe; a read ends at the end of a packet.
Result<void> read_chunks(const TargetFile& file, int scratch, size_t bytes, pb::PipeBuffer* pipe) {
  std::string all;
  for (size_t left = bytes; left > 0;) {
    std::string chunk(left, '\0');
    ssize_t got = ::read(scratch, chunk.data(), chunk.size());
    if (got <= 0) return errno_error("read the content of " + file.describe());
    chunk.resize(static_cast<size_t>(got));
    left -= static_cast<size_t>(got);
    if (pipe->packets()) *pipe->add_chunks() = std::move(chunk);
    else all += chunk;
  }
  if (!pipe->packets() && !all.empty()) *pipe->add_chunks() = std::move(all);
  return {};
}

Result<void> save_content(const TargetFile& file, int fd, pb::PipeBuffer* pipe) {
  int unread = 0;
  if (::ioctl(fd, FIONREAD, &unread) != 0) return errno_error("ask how much is in " + file.describe());
  if (unread == 0) return {};
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return errno_error("make a pipe to copy " + file.describe());
  Fd read_end(ends[0]), write_end(ends[1]);
  int capacity = static_cast<int>(pipe->capacity_bytes());
  if (::fcntl(ends[1], F_GETPIPE_SZ) < capacity && ::fcntl(ends[1], F_SETPIPE_SZ, capacity) < 0) {
    return errno_error(fmt::format("make a pipe of {} bytes to copy {}", capacity, file.describe()),
                       "raise /proc/sys/fs/pipe-user-pages-soft or pipe-max-size");
  }
  ssize_t copied = ::tee(fd, ends[1], static_cast<size_t>(unread), SPLICE_F_NONBLOCK);
  if (copied < 0) return errno_error("copy the content of " + file.describe());
  if (copied != unread) {
    return error(fmt::format("{} has {} bytes of which only {} could be copied", file.describe(), unread, copied));
  }
  return read_chunks(file, ends[0], static_cast<size_t>(copied), pipe);
}

Result<void> save(SaveContext& context, const TargetFile& file, int fd, pb::OpenFile* saved) {
  auto [known, is_new] =
      context.pipe_ids.try_emplace({file.status.st_dev, file.status.st_ino}, context.pipe_ids.size() + 1);
  if (is_new) {
    pb::PipeBuffer* pipe = context.objects.AddExtension(pb::pipes);
    pipe->set_id(known->second);
    pipe->set_inode(file.status.st_ino);
    if (has_name(file)) {
      pipe->set_path(file.link);
      *pipe->mutable_origin() = inode_of(fd);
    }
    int capacity = ::fcntl(fd, F_GETPIPE_SZ);
    if (capacity < 0) return errno_error("ask for the capacity of " + file.describe());
    pipe->set_capacity_bytes(static_cast<uint32_t>(capacity));
  }
  saved->MutableExtension(pb::pipe)->set_pipe_id(known->second);
  return {};
}

// The side of the pipe that no file of the target has: closed, or open elsewhere? An end inside tells by polling.
pb::Peer find_other_side(const pb::PipeBuffer& pipe, const TargetFile& file, int fd, bool readers_missing) {
  pollfd ask{fd, 0, 0};
  ::poll(&ask, 1, 0);
  if ((ask.revents & (readers_missing ? POLLERR : POLLHUP)) != 0) return pb::PEER_CLOSED;
  if (file.stdio() >= 0 && pipe.path().empty()) return pb::PEER_STDIO;
  return pb::PEER_OUTSIDE;
}

void note_loss(SaveContext& context, const pb::PipeBuffer& pipe, const TargetFile& file) {
  bool lost_reader = pipe.readers() == pb::PEER_OUTSIDE;
  bool lost_writer = pipe.writers() == pb::PEER_OUTSIDE;
  if (!pipe.path().empty() && (lost_reader || lost_writer)) {
    context.note(
        fmt::format("{} is a FIFO whose other end is open in another process, which must open it again after a restart",
                    file.describe()));
  } else if (lost_reader) {
    context.note(fmt::format("{} is a pipe read by another process; after a restart writing to it gives EPIPE",
                             file.describe()));
  } else if (lost_writer) {
    context.note(
        fmt::format("{} is a pipe written by another process; after a restart it is at its end once the rest is read",
                    file.describe()));
  }
  if (pipe.writers() == pb::PEER_STDIO && pipe.chunks_size() > 0) {
    context.note(fmt::format(
        "{} has {} bytes of input that the program has not read; after a restart input comes from restart's "
        "own, without them",
        file.describe(), pipe.chunks(0).size()));
  }
}

// The first end of each kind that is inside; null where there is none.
struct InsideEnds {
  const TargetFile* reader = nullptr;
  const TargetFile* writer = nullptr;
  bool packets = false;
};

Result<void> save_pipe(SaveContext& context, const InsideEnds& ends, pb::PipeBuffer* pipe) {
  pipe->set_packets(ends.packets);
  const TargetFile& first = ends.reader != nullptr ? *ends.reader : *ends.writer;
  int fd = first.duplicate.get();
  pipe->set_readers(ends.reader != nullptr ? pb::PEER_INSIDE : find_other_side(*pipe, first, fd, true));
  pipe->set_writers(ends.writer != nullptr ? pb::PEER_INSIDE : find_other_side(*pipe, first, fd, false));
  // Without a read end inside, the content belongs to whoever reads it outside.
  if (ends.reader != nullptr) VMCKPT_TRY(save_content(*ends.reader, fd, pipe));
  note_loss(context, *pipe, first);
  return {};
}

Result<void> save_links(SaveContext& context) {
  std::vector<InsideEnds> all(static_cast<size_t>(context.objects.ExtensionSize(pb::pipes)));
  for (const TargetFile& file : context.files) {
    if (!file.saved->HasExtension(pb::pipe)) continue;
    InsideEnds& ends = all[file.saved->GetExtension(pb::pipe).pipe_id() - 1];
    if (can_read(file.flags) && ends.reader == nullptr) ends.reader = &file;
    if (can_write(file.flags) && ends.writer == nullptr) ends.writer = &file;
    ends.packets |= can_write(file.flags) && (file.flags & O_DIRECT) != 0;
  }
  for (size_t i = 0; i < all.size(); ++i) {
    VMCKPT_TRY(save_pipe(context, all[i], context.objects.MutableExtension(pb::pipes, static_cast<int>(i))));
  }
  return {};
}

void check(CheckContext& context) {
  for (const pb::PipeBuffer& pipe : context.image.objects().GetRepeatedExtension(pb::pipes)) {
    if (pipe.path().empty()) continue;
    struct stat now;
    auto located = context.access.locate(pipe.path(), 0, pipe.origin());
    if (!located.ok() && located.error().err == ENOENT) {
      context.problem(Error{fmt::format("FIFO \"{}\" is missing", pipe.path()), ENOENT, "create it with mkfifo"});
    } else if (!located.ok()) {
      context.problem(located.error());
    } else if (::fstat(located->get(), &now) != 0 || !S_ISFIFO(now.st_mode)) {
      context.problem(error(fmt::format("\"{}\" was a FIFO and no longer is", pipe.path()), "create it with mkfifo"));
    }
  }
}

std::vector<const pb::OpenFile*> ends_of(const RestoreContext& context, const pb::PipeBuffer& pipe) {
  std::vector<const pb::OpenFile*> ends;
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (file.HasExtension(pb::pipe) && file.GetExtension(pb::pipe).pipe_id() == pipe.id()) ends.push_back(&file);
  }
  return ends;
}

Result<void> attach_ends(RestoreContext& context, const std::vector<const pb::OpenFile*>& ends) {
  int lowest = 2;
  for (const pb::OpenFile* end : ends) {
    if (const int number = context.descriptors.stdio(*end); number >= 0) lowest = std::min(lowest, number);
  }
  for (const pb::OpenFile* end : ends) {
    const int own = context.descriptors.stdio(*end), number = own >= 0 ? own : lowest;
    VMCKPT_TRY(context.put(*end, VMCKPT_TRY(attach_stdio(context, *end, number))));
  }
  return {};
}

Result<void> fill(RestoreContext& context, const pb::PipeBuffer& pipe, int write_end) {
  int capacity = static_cast<int>(pipe.capacity_bytes());
  if (::fcntl(write_end, F_GETPIPE_SZ) != capacity && ::fcntl(write_end, F_SETPIPE_SZ, capacity) < 0) {
    context.note(fmt::format("a pipe has the usual capacity instead of {} bytes: {}", capacity, std::strerror(errno)));
  }
  int flags = O_NONBLOCK | (pipe.packets() ? O_DIRECT : 0);
  if (::fcntl(write_end, F_SETFL, flags) != 0) return errno_error("prepare a pipe");
  for (const std::string& chunk : pipe.chunks()) {
    VMCKPT_TRY(write_exactly(write_end, chunk.data(), chunk.size(), "the content of a pipe"));
  }
  return {};
}

// A pipe open both ways, so that no open blocks and nothing is lost until all ends are there.
struct BothWays {
  Fd read_end;  // the ends as pipe2 gives them; a FIFO has none
  Fd write_end;
  Fd keeper;  // opens further ends
};

// The program may have had the right to one end only: the other is opened for it as the file that it is, through /proc.
Result<Fd> open_fifo(const FileAccess& access, const pb::PipeBuffer& pipe) {
  if (!access.is_foreign()) return access.open(pipe.path(), O_RDWR | O_NONBLOCK, pipe.origin());
  Fd place = VMCKPT_TRY(access.locate(pipe.path(), 0, pipe.origin()));
  struct stat now;
  if (::fstat(place.get(), &now) != 0 || !S_ISFIFO(now.st_mode)) return error(fmt::format("\"{}\" is no FIFO", pipe.path()));
  const bool was_its_own = is_same_inode(pipe.origin(), inode_of(place.get()));
  if (!was_its_own && !access.permits(place.get(), R_OK | W_OK, pipe.origin())) return errno_error("open " + pipe.path());
  return reopen(place.get(), O_RDWR | O_NONBLOCK);
}

Result<BothWays> open_both_ways(RestoreContext& context, const pb::PipeBuffer& pipe) {
  BothWays opened;
  if (!pipe.path().empty()) {
    opened.keeper = VMCKPT_TRY(open_fifo(context.restore.access, pipe));
    int unread = 0;
    bool empty = ::ioctl(opened.keeper.get(), FIONREAD, &unread) == 0 && unread == 0;
    if (empty && pipe.readers() == pb::PEER_INSIDE) VMCKPT_TRY(fill(context, pipe, opened.keeper.get()));
    // A read end that is opened while nobody writes polls as idle; opened beside a writer that leaves, as hung up.
    if (pipe.writers() == pb::PEER_OUTSIDE)
      opened.keeper = VMCKPT_TRY(reopen(opened.keeper.get(), O_RDONLY | O_NONBLOCK));
    return opened;
  }
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return errno_error("make a pipe");
  opened.read_end = Fd(ends[0]);
  opened.write_end = Fd(ends[1]);
  VMCKPT_TRY(fill(context, pipe, opened.write_end.get()));
  opened.keeper = VMCKPT_TRY(reopen(opened.read_end.get(), O_RDWR | O_NONBLOCK));
  return opened;
}

Result<void> restore_pipe(RestoreContext& context, const pb::PipeBuffer& pipe) {
  std::vector<const pb::OpenFile*> ends = ends_of(context, pipe);
  if (pipe.readers() == pb::PEER_STDIO || pipe.writers() == pb::PEER_STDIO) return attach_ends(context, ends);
  BothWays opened = VMCKPT_TRY(open_both_ways(context, pipe));
  for (const pb::OpenFile* end : ends) {
    int access = static_cast<int>(end->status_flags() & O_ACCMODE);
    Fd& original = access == O_RDONLY ? opened.read_end : opened.write_end;
    bool take = original.valid() && access != O_RDWR;
    VMCKPT_TRY(
        context.put(*end, take ? std::move(original) : VMCKPT_TRY(reopen(opened.keeper.get(), access | O_NONBLOCK))));
  }
  return {};
}

Result<void> restore(RestoreContext& context) {
  for (const pb::PipeBuffer& pipe : context.image.objects().GetRepeatedExtension(pb::pipes)) {
    VMCKPT_TRY(restore_pipe(context, pipe));
  }
  return {};
}

}  // namespace

const DescriptorModule kPipeModule{"pipe", recognise, save, save_links, check, restore};

}  // namespace vmckpt
