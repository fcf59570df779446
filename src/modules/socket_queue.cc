// Reading a queue without changing it: MSG_PEEK copies from the front of the queue and leaves it as it is. That is
// enough for a stream, which is peeked in one go. Datagrams, and streams whose parts differ in their credentials, need
// SO_PEEK_OFF (unix(7), Linux 3.4) to look further: it is set while we look and put back as it was. The socket belongs
// to a stopped process, so nobody sees it in between.
//
// One flaw: the kernel marks an empty datagram as peeked and SO_PEEK_OFF passes over it from then on, so an empty
// datagram that stays unread is in the image of the first checkpoint that meets it and missing in later ones.
//
// A peek of a message with descriptors would receive copies of them; they are closed at once.
// Sources: recv(2), unix(7), socket(7), net/unix/af_unix.c (unix_stream_read_generic, __unix_dgram_recvmsg).
#include "modules/socket_queue.h"

#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "modules/socket.pb.h"

namespace vmckpt {
namespace {

constexpr size_t kMaxMessages = 100'000;  // far above net.unix.max_dgram_qlen; stops a loop that does not advance

class PeekOffset {
 public:
  explicit PeekOffset(int fd) : fd_(fd) {
    socklen_t bytes = sizeof before_;
    int start = 0;
    set_ = ::getsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &before_, &bytes) == 0 &&
           ::setsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &start, sizeof start) == 0;
  }
  ~PeekOffset() {
    if (set_) ::setsockopt(fd_, SOL_SOCKET, SO_PEEK_OFF, &before_, sizeof before_);
  }
  PeekOffset(const PeekOffset&) = delete;
  PeekOffset& operator=(const PeekOffset&) = delete;
  bool set() const { return set_; }

 private:
  int fd_;
  int before_ = -1;
  bool set_ = false;
};

struct Peeked {
  size_t bytes = 0;  // of the whole message, which may be longer than the buffer
  std::string sender;
  bool has_descriptors = false;
  bool nothing = false;
};

bool close_received_descriptors(msghdr& header) {
  bool any = false;
  for (cmsghdr* part = CMSG_FIRSTHDR(&header); part != nullptr; part = CMSG_NXTHDR(&header, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    any = true;
    size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
      ::close(fd);
    }
  }
  return any;
}

Result<Peeked> peek(const TargetFile& file, int fd, std::string& buffer) {
  // MSG_TRUNC gives the length of the whole packet; on a TCP stream it would mean not to copy anything.
  int whole_length = file.socket_type == SOCK_STREAM ? 0 : MSG_TRUNC;
  alignas(cmsghdr) char control[4096];
  sockaddr_storage sender;
  iovec part{buffer.data(), buffer.size()};
  msghdr header{};
  header.msg_name = &sender;
  header.msg_namelen = sizeof sender;
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof control;
  ssize_t got = ::recvmsg(fd, &header, MSG_PEEK | MSG_DONTWAIT | whole_length | MSG_CMSG_CLOEXEC);
  Peeked peeked;
  if (got < 0) {
    if (errno == EAGAIN || errno == EWOULDBLOCK) peeked.nothing = true;
    else return errno_error("look at the unread data of " + file.describe());
    return peeked;
  }
  peeked.bytes = static_cast<size_t>(got);
  peeked.has_descriptors = close_received_descriptors(header);
  if (header.msg_namelen > sizeof(sa_family_t)) {
    peeked.sender.assign(reinterpret_cast<char*>(&sender), header.msg_namelen);
  }
  return peeked;
}

Error descriptors_on_their_way(const TargetFile& file) {
  return error(file.describe() + " has file descriptors on their way to it (SCM_RIGHTS), which cannot be saved",
               "checkpoint again when the program has received them");
}

int peek_offset(int fd) {
  int offset = -1;
  socklen_t bytes = sizeof offset;
  return ::getsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &offset, &bytes) == 0 ? offset : -1;
}

// A byte sent with MSG_OOB, and the mark that it leaves in the stream, end every peek: what comes behind cannot be seen.
Result<void> refuse_urgent(const TargetFile& file, int fd) {
  pollfd ask{fd, POLLPRI, 0};
  if (::poll(&ask, 1, 0) <= 0 || (ask.revents & POLLPRI) == 0) return {};
  return error(file.describe() + " has unread urgent data (MSG_OOB), which cannot be saved",
               "checkpoint again when the program has read it");
}

Result<void> save_stream(const TargetFile& file, int fd, SocketMessages* messages) {
  VMCKPT_TRY(refuse_urgent(file, fd));
  int unread = 0;
  if (::ioctl(fd, SIOCINQ, &unread) != 0) return errno_error("ask how much is unread in " + file.describe());
  if (unread <= 0) return {};
  std::string all, buffer(static_cast<size_t>(unread), '\0');
  if (peek_offset(fd) < 0) {
    Peeked peeked = VMCKPT_TRY(peek(file, fd, buffer));
    if (peeked.has_descriptors) return descriptors_on_their_way(file);
    if (peeked.bytes == buffer.size()) {
      messages->Add()->set_data(buffer);
      return {};
    }
  }
  PeekOffset guard(fd);
  while (all.size() < static_cast<size_t>(unread)) {
    Peeked peeked = VMCKPT_TRY(peek(file, fd, buffer));
    if (peeked.has_descriptors) return descriptors_on_their_way(file);
    if (peeked.nothing || peeked.bytes == 0) {
      return error(
          fmt::format("{} has {} unread bytes of which only {} could be copied", file.describe(), unread, all.size()));
    }
    all.append(buffer, 0, peeked.bytes);
  }
  messages->Add()->set_data(all);
  return {};
}

Result<void> save_packets(const TargetFile& file, int fd, SocketMessages* messages) {
  pollfd ask{fd, POLLIN, 0};
  if (::poll(&ask, 1, 0) <= 0 || (ask.revents & POLLIN) == 0) return {};
  if ((ask.revents & POLLERR) != 0) {  // receiving would take the error away from the program
    return error(file.describe() + " has an error to report ahead of its unread messages", "checkpoint again");
  }
  PeekOffset guard(fd);
  if (!guard.set()) return errno_error("look further into the unread messages of " + file.describe());
  // Of all records (unix_inq_len in net/unix/af_unix.c). Behind the last byte, an empty record and the end are the same to a
  // reader.
  int unread = 0;
  if (file.socket_type == SOCK_SEQPACKET && ::ioctl(fd, SIOCINQ, &unread) != 0) {
    return errno_error("ask how much is unread in " + file.describe());
  }
  std::string buffer(size_t{256} << 10, '\0');
  for (size_t count = 0;; ++count) {
    if (count == kMaxMessages) return error(file.describe() + " has too many unread messages");
    Peeked peeked = VMCKPT_TRY(peek(file, fd, buffer));
    if (peeked.has_descriptors) return descriptors_on_their_way(file);
    if (peeked.nothing) return {};
    pollfd now{fd, POLLIN | POLLRDHUP, 0};
    if (peeked.bytes == 0 && unread <= 0 && file.socket_type == SOCK_SEQPACKET && ::poll(&now, 1, 0) > 0 &&
        (now.revents & POLLRDHUP)) {
      return {};
    }
    unread -= static_cast<int>(peeked.bytes);
    if (peeked.bytes > buffer.size()) {
      return error(
          fmt::format("{} has an unread message of {} bytes, more than vmckpt copies", file.describe(), peeked.bytes));
    }
    pb::SocketMessage* message = messages->Add();
    message->set_data(buffer.substr(0, peeked.bytes));
    message->set_sender(peeked.sender);
  }
}

}  // namespace

Result<void> save_socket_queue(const TargetFile& file, int fd, SocketMessages* messages) {
  return file.socket_type == SOCK_STREAM ? save_stream(file, fd, messages) : save_packets(file, fd, messages);
}

Result<std::string> peek_stream(const TargetFile& file, int fd) {
  SocketMessages messages;
  VMCKPT_TRY(save_stream(file, fd, &messages));
  return messages.empty() ? std::string() : std::move(*messages.Mutable(0)->mutable_data());
}

}  // namespace vmckpt
