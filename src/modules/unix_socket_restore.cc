// Restore of Unix sockets. The order, and why:
//
//   1. sockets with a name of their own, bound; listeners listen    connections need them
//   2. connections within the process                              while no stranger's connection can be in between:
//                                                                  bind, connect and accept follow one another
//   3. connections that wait to be accepted, in their order        after 2, which accepts
//   4. ends whose other end is closed or outside
//   5. queues filled                                                from the other end, while nothing is shut down
//   6. datagram sockets connected                                   after 5: from then on they only take what their
//                                                                   peer sends, who may be outside
//   7. what was shut down or closed, shut down and closed; remaining options; names that had been removed, removed
#include <algorithm>

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "modules/descriptor_module.h"
#include "modules/socket_options.h"
#include "modules/unix_socket.h"

namespace vmckpt {
namespace {

constexpr uint32_t kNoMoreReading = 1, kNoMoreWriting = 2;

// Makes the send buffer large enough for a while: what is put back at once had been sent bit by bit.
class RoomToSend {
 public:
  RoomToSend(int fd, size_t bytes) : fd_(fd), before_(get_option(fd, SOL_SOCKET, SO_SNDBUF)) {
    int wanted = static_cast<int>(std::min<size_t>(bytes * 2 + 4096, size_t{1} << 30));
    if (before_ < wanted) set(wanted);
    else before_ = 0;
  }
  ~RoomToSend() {
    if (before_ != 0) set(before_ / 2);  // the kernel doubles it
  }
  RoomToSend(const RoomToSend&) = delete;
  RoomToSend& operator=(const RoomToSend&) = delete;

 private:
  void set(int bytes) { ::setsockopt(fd_, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes); }

  int fd_;
  int before_;
};

class UnixRestore {
 public:
  explicit UnixRestore(RestoreContext& context) : context_(context) {
    for (const pb::OpenFile& file : context.table.files()) {
      if (file.has_unix_socket()) files_.push_back(&file);
    }
  }

  Result<void> run() {
    for (const pb::OpenFile* file : files_) {
      if (is_bound_anew(file->unix_socket())) VMCKPT_TRY(make_bound(*file));
    }
    for (const pb::OpenFile* file : files_) VMCKPT_TRY(make_connection(*file));
    VMCKPT_TRY(make_waiting_connections());
    for (const pb::OpenFile* file : files_) VMCKPT_TRY(make_end(*file));
    for (const pb::OpenFile* file : files_) VMCKPT_TRY(fill(*file));
    for (const pb::OpenFile* file : files_) VMCKPT_TRY(connect_datagrams(*file));
    for (const pb::OpenFile* file : files_) VMCKPT_TRY(finish(*file));
    return {};
  }

 private:
  const pb::OpenFile* find(uint32_t id) const {
    for (const pb::OpenFile* file : files_) {
      if (file->id() == id) return file;
    }
    return nullptr;
  }

  Result<Fd> make_socket(const pb::OpenFile& file) {
    Fd fd(::socket(AF_UNIX, file.unix_socket().type() | SOCK_CLOEXEC, 0));
    if (!fd) return errno_error("make the socket of " + describe(file));
    restore_socket_options(context_, file, file.unix_socket().options(), fd.get(), OptionStage::kBeforeBind);
    return fd;
  }

  // Calls bind or connect with the address as it was given, from the folder that a relative one was meant from.
  Result<void> with_address(const pb::OpenFile& file, const std::string& address, const std::string& absolute, int fd,
                            int (*call)(int, const sockaddr*, socklen_t), const char* what) {
    std::string given = path_of(address);
    Fd here;
    if (!given.empty() && given[0] != '/') {
      std::string folder = absolute.ends_with("/" + given) ? absolute.substr(0, absolute.size() - given.size()) : "";
      here = VMCKPT_TRY(open_file(".", O_PATH | O_DIRECTORY));
      if (folder.empty()) return error(fmt::format("{}: the folder of \"{}\" is not known", describe(file), given));
      if (::chdir(folder.c_str()) != 0) return errno_error(fmt::format("{}: go to \"{}\"", describe(file), folder));
    }
    int result = call(fd, reinterpret_cast<const sockaddr*>(address.data()), static_cast<socklen_t>(address.size()));
    int failed = errno;
    if (here && ::fchdir(here.get()) != 0) return errno_error("go back to the working directory");
    if (result == 0) return {};
    errno = failed;
    return errno_error(
        fmt::format("{}: {} \"{}\"", describe(file), what, given.empty() ? "its abstract name" : absolute));
  }

  Result<void> bind_name(const pb::OpenFile& file, int fd) {
    const pb::UnixSocket& socket = file.unix_socket();
    const std::string& path = socket.bound_path();
    if (!path.empty()) {
      struct stat there;
      bool stale =
          ::lstat(path.c_str(), &there) == 0 && S_ISSOCK(there.st_mode) && !is_unix_path_in_use(path, socket.type());
      if (stale) ::unlink(path.c_str());
    }
    // bind makes the file with mode 0777 less umask.
    mode_t before = ::umask(socket.path_exists() ? 0777 & ~socket.path_mode() : 0077);
    auto bound = with_address(file, socket.local_address(), path, fd, ::bind, "bind the socket to");
    ::umask(before);
    return bound;
  }

  Result<void> make_bound(const pb::OpenFile& file) {
    const pb::UnixSocket& socket = file.unix_socket();
    Fd fd = VMCKPT_TRY(make_socket(file));
    VMCKPT_TRY(bind_name(file, fd.get()));
    if (socket.listening() && ::listen(fd.get(), static_cast<int>(std::max(socket.backlog(), 1u))) != 0) {
      return errno_error("listen on the socket of " + describe(file));
    }
    return context_.put(file, std::move(fd));
  }

  // The listener inside that the accepted end of this pair has its name from.
  const pb::OpenFile* find_listener(const pb::UnixSocket& accepted) const {
    for (const pb::OpenFile* file : files_) {
      const pb::UnixSocket& socket = file->unix_socket();
      if (socket.listening() && !socket.local_address().empty() && socket.local_address() == accepted.local_address() &&
          socket.type() == accepted.type()) {
        return file;
      }
    }
    return nullptr;
  }

  Result<void> connect_to(const pb::OpenFile& client, int fd, const pb::OpenFile& listener) {
    return with_address(client, listener.unix_socket().local_address(), listener.unix_socket().bound_path(), fd,
                        ::connect, "connect to");
  }

  // Strangers may have connected as soon as the name was there; they are turned away and may try again.
  Result<Fd> accept_own(const pb::OpenFile& file, int listener) {
    for (;;) {
      Fd fd(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
      if (!fd) return errno_error("accept a connection for " + describe(file));
      ucred peer{};
      socklen_t bytes = sizeof peer;
      if (::getsockopt(fd.get(), SOL_SOCKET, SO_PEERCRED, &peer, &bytes) == 0 && peer.pid == ::getpid()) return fd;
    }
  }

  Result<void> make_by_accept(const pb::OpenFile& client, const pb::OpenFile& accepted, const pb::OpenFile& listener) {
    Fd client_fd = VMCKPT_TRY(make_socket(client));
    if (!client.unix_socket().local_address().empty()) VMCKPT_TRY(bind_name(client, client_fd.get()));
    VMCKPT_TRY(connect_to(client, client_fd.get(), listener));
    Fd accepted_fd = VMCKPT_TRY(accept_own(accepted, context_.fd(listener.id())));
    restore_socket_options(context_, accepted, accepted.unix_socket().options(), accepted_fd.get(),
                           OptionStage::kBeforeBind);
    VMCKPT_TRY(context_.put(client, std::move(client_fd)));
    return context_.put(accepted, std::move(accepted_fd));
  }

  Result<std::pair<Fd, Fd>> make_pair_like(const pb::OpenFile& file) {
    int ends[2];
    if (::socketpair(AF_UNIX, file.unix_socket().type() | SOCK_CLOEXEC, 0, ends) != 0) {
      return errno_error("make the socket pair of " + describe(file));
    }
    return std::pair<Fd, Fd>(Fd(ends[0]), Fd(ends[1]));
  }

  bool is_mutual(const pb::OpenFile& file, const pb::OpenFile* peer) const {
    return peer != nullptr && peer->id() != file.id() && peer->unix_socket().peer() == pb::PEER_INSIDE &&
           peer->unix_socket().peer_id() == file.id() && !peer->unix_socket().pending();
  }

  Result<void> make_connection(const pb::OpenFile& file) {
    const pb::UnixSocket& socket = file.unix_socket();
    if (context_.has(file.id()) || socket.peer() != pb::PEER_INSIDE || socket.pending()) return {};
    const pb::OpenFile* peer = find(socket.peer_id());
    if (!is_mutual(file, peer)) {
      if (socket.type() == SOCK_DGRAM) return {};
      return error(fmt::format("{} is connected to descriptor {}, which is not connected to it", describe(file),
                               socket.peer_id()));
    }
    bool named = !socket.local_address().empty() || !peer->unix_socket().local_address().empty();
    if (socket.type() == SOCK_DGRAM && named) return {};  // connected by name later
    if (socket.type() != SOCK_DGRAM) {
      if (const pb::OpenFile* listener = find_listener(socket)) return make_by_accept(*peer, file, *listener);
      if (const pb::OpenFile* listener = find_listener(peer->unix_socket()))
        return make_by_accept(file, *peer, *listener);
    }
    auto [first, second] = VMCKPT_TRY(make_pair_like(file));
    restore_socket_options(context_, file, socket.options(), first.get(), OptionStage::kBeforeBind);
    restore_socket_options(context_, *peer, peer->unix_socket().options(), second.get(), OptionStage::kBeforeBind);
    VMCKPT_TRY(context_.put(file, std::move(first)));
    return context_.put(*peer, std::move(second));
  }

  Result<void> make_waiting_connections() {
    std::vector<const pb::OpenFile*> waiting;
    for (const pb::OpenFile* file : files_) {
      if (file->unix_socket().pending()) waiting.push_back(file);
    }
    std::sort(waiting.begin(), waiting.end(), [](const auto* a, const auto* b) {
      return a->unix_socket().pending_order() < b->unix_socket().pending_order();
    });
    for (const pb::OpenFile* file : waiting) {
      const pb::OpenFile* listener = find(file->unix_socket().peer_id());
      if (listener == nullptr) return error(describe(*file) + " waits at a listener that the image does not have");
      Fd fd = VMCKPT_TRY(make_socket(*file));
      VMCKPT_TRY(connect_to(*file, fd.get(), *listener));
      VMCKPT_TRY(context_.put(*file, std::move(fd)));
    }
    return {};
  }

  Result<void> make_end(const pb::OpenFile& file) {
    const pb::UnixSocket& socket = file.unix_socket();
    if (context_.has(file.id())) return {};
    if (socket.peer() == pb::PEER_STDIO) {
      return context_.put(file, VMCKPT_TRY(attach_stdio(context_, file, static_cast<int>(file.id()))));
    }
    bool by_name = socket.type() == SOCK_DGRAM && !socket.peer_address().empty();
    if (socket.peer() == pb::PEER_NONE || by_name || socket.peer() == pb::PEER_INSIDE) {
      return context_.put(file, VMCKPT_TRY(make_socket(file)));
    }
    auto [end, other] = VMCKPT_TRY(make_pair_like(file));
    restore_socket_options(context_, file, socket.options(), end.get(), OptionStage::kBeforeBind);
    VMCKPT_TRY(context_.put(file, std::move(end)));
    closing_[file.id()] = VMCKPT_TRY(context_.lift(std::move(other)));
    return {};
  }

  Result<void> connect_datagrams(const pb::OpenFile& file) {
    const pb::UnixSocket& socket = file.unix_socket();
    bool connected = socket.peer() == pb::PEER_INSIDE || socket.peer() == pb::PEER_OUTSIDE;
    if (socket.type() != SOCK_DGRAM || !connected) return {};
    if (socket.peer_address().empty()) {
      const std::string& own = socket.local_address();
      if (!own.empty()) context_.note(describe(file) + " was connected to a socket without a name and is not any more");
      return {};
    }
    const pb::OpenFile* peer = socket.peer() == pb::PEER_INSIDE ? find(socket.peer_id()) : nullptr;
    auto done = with_address(file, socket.peer_address(),
                             peer != nullptr ? peer->unix_socket().bound_path() : path_of(socket.peer_address()),
                             context_.fd(file.id()), ::connect, "connect to");
    if (!done.ok()) context_.note(done.error().message() + "; it is not connected now");
    return {};
  }

  // Who may send to `file`: the socket it is connected to, or for a named one anybody.
  int sender_for(const pb::OpenFile& file, const pb::SocketMessage& message, Fd* temporary) {
    const pb::UnixSocket& socket = file.unix_socket();
    if (auto closing = closing_.find(file.id()); closing != closing_.end()) return closing->second.get();
    if (socket.peer() == pb::PEER_INSIDE && !socket.pending()) return context_.fd(socket.peer_id());
    for (const pb::OpenFile* other : files_) {
      if (!message.sender().empty() && other->unix_socket().local_address() == message.sender())
        return context_.fd(other->id());
    }
    *temporary = Fd(::socket(AF_UNIX, socket.type() | SOCK_CLOEXEC, 0));
    return temporary->get();
  }

  Result<void> fill(const pb::OpenFile& file) {
    const pb::UnixSocket& socket = file.unix_socket();
    if (socket.peer() == pb::PEER_STDIO) return {};
    bool lost_sender = false;
    for (const pb::SocketMessage& message : socket.queue()) {
      Fd temporary;
      int sender = sender_for(file, message, &temporary);
      lost_sender |= temporary.valid() && !message.sender().empty();
      bool by_name = socket.type() == SOCK_DGRAM && !socket.local_address().empty();
      VMCKPT_TRY(send_whole(file, sender, message.data(), by_name));
    }
    if (lost_sender) context_.note(describe(file) + ": unread datagrams from outside no longer tell who sent them");
    return {};
  }

  // `by_name`: to the address of `file`; otherwise over the connection.
  Result<void> send_whole(const pb::OpenFile& file, int sender, const std::string& data, bool by_name) {
    RoomToSend room(sender, data.size());
    std::string name = by_name ? address_anywhere(file.unix_socket()) : std::string();
    size_t sent = 0;
    do {
      ssize_t put = ::sendto(sender, data.data() + sent, data.size() - sent, MSG_DONTWAIT | MSG_NOSIGNAL,
                             name.empty() ? nullptr : reinterpret_cast<const sockaddr*>(name.data()),
                             static_cast<socklen_t>(name.size()));
      if (put < 0)
        return errno_error(fmt::format("put {} unread bytes back into {}", data.size() - sent, describe(file)));
      sent += static_cast<size_t>(put);
    } while (sent < data.size());
    return {};
  }

  // The address of a bound socket that is right from any working directory.
  static std::string address_anywhere(const pb::UnixSocket& socket) {
    if (socket.bound_path().empty()) return socket.local_address();
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (socket.bound_path().size() >= sizeof address.sun_path) return socket.local_address();
    std::memcpy(address.sun_path, socket.bound_path().data(), socket.bound_path().size());
    return std::string(reinterpret_cast<char*>(&address), sizeof address);
  }

  Result<void> finish(const pb::OpenFile& file) {
    const pb::UnixSocket& socket = file.unix_socket();
    if (socket.peer() == pb::PEER_STDIO) return {};
    int fd = context_.fd(file.id());
    closing_.erase(file.id());
    if (socket.peer() == pb::PEER_INSIDE && !socket.pending()) {
      if ((socket.shutdown() & kNoMoreWriting) != 0) ::shutdown(fd, SHUT_WR);
      if ((socket.shutdown() & kNoMoreReading) != 0 && socket.type() == SOCK_DGRAM) ::shutdown(fd, SHUT_RD);
    } else if (socket.type() == SOCK_DGRAM && socket.shutdown() != 0) {
      if ((socket.shutdown() & kNoMoreWriting) != 0) ::shutdown(fd, SHUT_WR);
      if ((socket.shutdown() & kNoMoreReading) != 0) ::shutdown(fd, SHUT_RD);
    }
    if (socket.listening() && ::listen(fd, static_cast<int>(socket.backlog())) != 0) {
      return errno_error("listen on the socket of " + describe(file));
    }
    if (is_bound_anew(socket) && !socket.bound_path().empty() && !socket.path_exists())
      ::unlink(socket.bound_path().c_str());
    restore_socket_options(context_, file, socket.options(), fd, OptionStage::kAfterwards);
    return {};
  }

  RestoreContext& context_;
  std::vector<const pb::OpenFile*> files_;
  std::map<uint32_t, Fd> closing_;  // other ends that were closed or outside, kept until unread data is back
};

}  // namespace

Result<void> restore_unix_sockets(RestoreContext& context) { return UnixRestore(context).run(); }

}  // namespace vmckpt
