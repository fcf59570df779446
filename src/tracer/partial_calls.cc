#include "tracer/partial_calls.h"

#include <algorithm>
#include <climits>
#include <cstddef>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <unistd.h>

#include "core/fd.h"
#include "recorder/partial_calls.h"
#include "tracer/remote_memory.h"

namespace vmckpt {
namespace {

enum class Shape { kNone, kBuffer, kVector, kMessage, kFileToFile };  // where a call has its data

struct Kind {
  Shape shape = Shape::kNone;
  bool receives = false;
};

// Not here: splice, vmsplice, recvmmsg and sendmmsg, whose short answers programs must expect in any case (docs/limits.md).
Kind kind_of(uint64_t number) {
  switch (number) {
    case SYS_write: case SYS_sendto: return {Shape::kBuffer};
    case SYS_recvfrom: return {Shape::kBuffer, true};
    case SYS_writev: return {Shape::kVector};
    case SYS_sendmsg: return {Shape::kMessage};
    case SYS_recvmsg: return {Shape::kMessage, true};
    case SYS_sendfile: return {Shape::kFileToFile};
    default: return {};
  }
}

// MSG_... of the call; 0 for calls without.
uint64_t message_flags(const user_regs_struct& regs) {
  switch (regs.orig_rax) {
    case SYS_sendto: case SYS_recvfrom: return regs.r10;
    case SYS_sendmsg: case SYS_recvmsg: return regs.rdx;
    default: return 0;
  }
}

bool has_timeout(int fd, int option) {
  timeval timeout{};
  socklen_t bytes = sizeof timeout;
  return ::getsockopt(fd, SOL_SOCKET, option, &timeout, &bytes) != 0 || timeout.tv_sec != 0 || timeout.tv_usec != 0;
}

// Whether a call on this file moves all of its data unless a signal comes in between: pipe(7), tcp(7), recv(2).
bool moves_all(pid_t pid, int target_fd, const Kind& kind, uint64_t flags) {
  if ((flags & MSG_DONTWAIT) != 0 || (kind.receives && (flags & (MSG_WAITALL | MSG_PEEK)) != MSG_WAITALL)) return false;
  const Fd process(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  const Fd fd(process ? static_cast<int>(::syscall(SYS_pidfd_getfd, process.get(), target_fd, 0)) : -1);
  struct stat info {};
  if (!fd || (::fcntl(fd.get(), F_GETFL) & O_NONBLOCK) != 0 || ::fstat(fd.get(), &info) != 0) return false;
  if (!S_ISSOCK(info.st_mode)) return S_ISFIFO(info.st_mode) || S_ISCHR(info.st_mode);
  int type = 0;
  socklen_t bytes = sizeof type;
  return ::getsockopt(fd.get(), SOL_SOCKET, SO_TYPE, &type, &bytes) == 0 && type == SOCK_STREAM &&
         !has_timeout(fd.get(), kind.receives ? SO_RCVTIMEO : SO_SNDTIMEO);
}

// The segments that are left behind the first `done` bytes; none when they cannot be read or are too many.
std::vector<iovec> segments_left(pid_t pid, RemoteAddr address, uint64_t count, uint64_t done) {
  if (count > IOV_MAX) return {};
  std::vector<iovec> segments(count);
  if (!read_memory(pid, address, segments.data(), count * sizeof(iovec)).ok()) return {};
  auto first = segments.begin();
  while (first != segments.end() && first->iov_len <= done) done -= (first++)->iov_len;
  segments.erase(segments.begin(), first);
  if (segments.empty() || segments.size() > kPartialCallSegments) return {};
  segments.front().iov_base = static_cast<char*>(segments.front().iov_base) + done;
  segments.front().iov_len -= done;
  return segments;
}

// Makes `regs` and `call` those of the rest of a call that has moved `done` bytes. False when nothing is left of it.
bool shorten(pid_t pid, Shape shape, uint64_t done, RemoteAddr call_address, user_regs_struct& regs, PartialCall& call) {
  auto put_segments = [&](RemoteAddr address, uint64_t count) {
    const std::vector<iovec> left = segments_left(pid, address, count, done);
    static_assert(sizeof(iovec) == sizeof call.segments[0]);
    if (!left.empty()) std::memcpy(call.segments, left.data(), left.size() * sizeof(iovec));
    return left.size();
  };
  const RemoteAddr segments = call_address + offsetof(PartialCall, segments);
  switch (shape) {
    case Shape::kBuffer:
      if (done >= regs.rdx) return false;
      regs.rsi += done;
      regs.rdx -= done;
      return true;
    case Shape::kFileToFile:
      if (done >= regs.r10) return false;
      regs.r10 -= done;  // the kernel has moved the file's position, or what rdx points to
      return true;
    case Shape::kVector:
      if (const size_t left = put_segments(RemoteAddr(regs.rsi), regs.rdx); left != 0) {
        regs.rsi = segments.value();
        regs.rdx = left;
        return true;
      }
      return false;
    case Shape::kMessage: {
      msghdr header{};
      static_assert(sizeof header == sizeof call.header);
      if (!read_memory(pid, RemoteAddr(regs.rsi), &header, sizeof header).ok()) return false;
      const size_t left = put_segments(RemoteAddr(reinterpret_cast<uint64_t>(header.msg_iov)), header.msg_iovlen);
      if (left == 0) return false;
      // Name and control data went with the first part, or came with it.
      header = {};
      header.msg_iov = reinterpret_cast<iovec*>(segments.value());
      header.msg_iovlen = left;
      std::memcpy(call.header, &header, sizeof header);
      regs.rsi = (call_address + offsetof(PartialCall, header)).value();
      return true;
    }
    case Shape::kNone: break;
  }
  return false;
}

std::optional<uint64_t> find_free(const PartialCallTable& table) {
  for (uint64_t i = 0; i < kPartialCalls; ++i) {
    if (table.calls[i].in_use == 0) return i;
  }
  return std::nullopt;
}

}  // namespace

bool PartialCalls::go_on_with(StoppedThread& thread) const {
  const Kind kind = kind_of(thread.regs.orig_rax);
  const auto done = static_cast<int64_t>(thread.regs.rax);
  if (!table_ || kind.shape == Shape::kNone || done <= 0) return false;
  // Most have all that they asked for, and this is every thread of every freeze.
  if (kind.shape == Shape::kBuffer && thread.regs.rax >= thread.regs.rdx) return false;
  if (!moves_all(pid_, static_cast<int>(thread.regs.rdi), kind, message_flags(thread.regs))) return false;
  auto table = std::make_unique<PartialCallTable>();
  if (!read_memory(pid_, table_, table.get(), sizeof *table).ok()) return false;

  user_regs_struct regs = thread.regs;
  const bool again = regs.rip == table->returns;  // it was cut short before, and goes on with the rest of the rest
  const RemoteAddr first = table_ + offsetof(PartialCallTable, calls);
  const std::optional<uint64_t> index = again ? (RemoteAddr(regs.rbx) - first) / sizeof(PartialCall) : find_free(*table);
  if (!index || *index >= kPartialCalls) return false;
  const RemoteAddr address = first + *index * sizeof(PartialCall);
  PartialCall& call = table->calls[*index];
  if (!again) call = {0, regs.rip, regs.rbx, regs.rsi, regs.rdx, regs.r10, 1, {}, {}};
  if (!shorten(pid_, kind.shape, regs.rax, address, regs, call)) return false;
  call.done += thread.regs.rax;
  regs.rbx = address.value();
  regs.rip = table->begin;
  regs.rax = regs.orig_rax;
  regs.orig_rax = ~uint64_t{0};
  if (!write_memory(pid_, address, &call, sizeof call).ok()) return false;
  thread.regs = regs;
  thread.disturbed = true;
  return true;
}

}  // namespace vmckpt
