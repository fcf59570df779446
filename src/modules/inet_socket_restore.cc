// Restore of TCP and UDP sockets. Connections come first: making one needs a listener at its address for a moment,
// which the program's own listener would forbid. All connections are made over the loopback interface or the host's own
// addresses.
#include <algorithm>
#include <cstring>

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "modules/descriptor_module.h"
#include "modules/inet_diag.h"
#include "modules/inet_socket.h"
#include "modules/inet_socket.pb.h"
#include "modules/multicast.h"
#include "modules/socket_options.h"

namespace vmckpt {
namespace {

constexpr int kLoopbackTimeoutMs = 2000;

std::string loopback_address(int family) {
  if (family == AF_INET) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return std::string(reinterpret_cast<char*>(&address), sizeof address);
  }
  // IPv4 within IPv6 works on hosts whose loopback has no IPv6 address too.
  sockaddr_in6 address{};
  address.sin6_family = AF_INET6;
  address.sin6_addr.s6_addr[10] = address.sin6_addr.s6_addr[11] = 0xff;
  address.sin6_addr.s6_addr[12] = 127;
  address.sin6_addr.s6_addr[15] = 1;
  return std::string(reinterpret_cast<char*>(&address), sizeof address);
}

// An IPv4 address as a socket of the other family has it, and back; others as they are.
std::string in_family(int family, const std::string& address) {
  sockaddr_in v4{};
  sockaddr_in6 v6{};
  if (family == AF_INET6 && address.size() == sizeof v4) {
    std::memcpy(&v4, address.data(), sizeof v4);
    v6.sin6_family = AF_INET6;
    v6.sin6_port = v4.sin_port;
    v6.sin6_addr.s6_addr[10] = v6.sin6_addr.s6_addr[11] = 0xff;
    std::memcpy(&v6.sin6_addr.s6_addr[12], &v4.sin_addr, sizeof v4.sin_addr);
    return std::string(reinterpret_cast<char*>(&v6), sizeof v6);
  }
  if (family == AF_INET && address.size() == sizeof v6) {
    std::memcpy(&v6, address.data(), sizeof v6);
    if (!IN6_IS_ADDR_V4MAPPED(&v6.sin6_addr)) return address;
    v4.sin_family = AF_INET;
    v4.sin_port = v6.sin6_port;
    std::memcpy(&v4.sin_addr, &v6.sin6_addr.s6_addr[12], sizeof v4.sin_addr);
    return std::string(reinterpret_cast<char*>(&v4), sizeof v4);
  }
  return address;
}

int bind_to(int fd, const std::string& address) {
  return ::bind(fd, reinterpret_cast<const sockaddr*>(address.data()), static_cast<socklen_t>(address.size()));
}

int connect_to(int fd, const std::string& address) {
  return ::connect(fd, reinterpret_cast<const sockaddr*>(address.data()), static_cast<socklen_t>(address.size()));
}

std::string name_of(int fd) {
  sockaddr_storage address{};
  socklen_t bytes = sizeof address;
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &bytes) != 0) return {};
  return std::string(reinterpret_cast<char*>(&address), bytes);
}

Result<Fd> make_socket(RestoreContext& context, const pb::OpenFile& file) {
  const pb::InetSocket& socket = inet_state(file);
  Fd fd(::socket(socket.family(), socket.type() | SOCK_CLOEXEC, socket.protocol()));
  if (!fd) return errno_error("make the socket of " + describe(file));
  restore_socket_options(context, file, socket.options(), fd.get(), OptionStage::kBeforeBind);
  return fd;
}

void shut_down(int fd, uint32_t shutdown) {
  if ((shutdown & kNoMoreSending) != 0) ::shutdown(fd, SHUT_WR);
  if ((shutdown & kNoMoreReading) != 0) ::shutdown(fd, SHUT_RD);  // a socket that is not connected says ENOTCONN, but does it
}

// Room for what is put back in one go. Only for large amounts: a size that is set stops TCP from adapting it.
void make_room(int fd, size_t bytes) {
  constexpr size_t kUsualRoom = 64 * 1024;
  if (bytes <= kUsualRoom) return;
  int wanted = static_cast<int>(std::min<size_t>(bytes * 2, size_t{1} << 30));
  if (get_option(fd, SOL_SOCKET, SO_RCVBUF) >= wanted) return;
  ::setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &wanted, sizeof wanted);
  if (get_option(fd, SOL_SOCKET, SO_RCVBUF) < wanted)
    ::setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &wanted, sizeof wanted);
}

// A listener that exists for one connection, at `address` or, if that is in use, at any port of the loopback interface.
Result<Fd> make_listener(int family, const std::string& address, size_t room) {
  for (const std::string& candidate : {address, with_port(loopback_address(family), 0)}) {
    if (candidate.empty()) continue;
    Fd fd(::socket(family, SOCK_STREAM | SOCK_CLOEXEC, IPPROTO_TCP));
    if (!fd) return errno_error("make a TCP socket");
    VMCKPT_TRY(set_option(fd.get(), SOL_SOCKET, SO_REUSEADDR, 1, "a TCP socket"));
    if (family == AF_INET6) VMCKPT_TRY(set_option(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, 0, "a TCP socket"));
    make_room(fd.get(), room);  // accepted connections inherit it
    if (bind_to(fd.get(), candidate) == 0 && ::listen(fd.get(), 1) == 0) return fd;
  }
  return errno_error("listen on the loopback interface", "the host needs its loopback interface (ip link set lo up)");
}

// The connection that comes from `client`, in case a stranger connects to the same port.
Result<Fd> accept_from(int listener, int client) {
  std::string wanted = name_of(client);
  for (;;) {
    pollfd ready{listener, POLLIN, 0};
    if (::poll(&ready, 1, kLoopbackTimeoutMs) != 1)
      return error("a connection over the loopback interface did not arrive");
    sockaddr_storage peer{};
    socklen_t bytes = sizeof peer;
    Fd fd(::accept4(listener, reinterpret_cast<sockaddr*>(&peer), &bytes, SOCK_CLOEXEC));
    if (!fd && errno != EINTR && errno != ECONNABORTED)
      return errno_error("accept a connection over the loopback interface");
    if (fd && same_endpoint(std::string(reinterpret_cast<char*>(&peer), bytes), wanted)) return fd;
  }
}

struct Connection {
  Fd client;
  Fd accepted;
};

// Connects two fresh sockets, with the addresses they had where these are free. The accepted one is of its listener's family,
// which need not be the client's: an IPv6 socket that listens for both has IPv4 clients.
Result<Connection> connect_pair(RestoreContext& context, const pb::OpenFile& file, int accepted_family,
                                const std::string& client_address, const std::string& accepted_address, size_t client_room,
                                size_t accepted_room) {
  Fd listener = VMCKPT_TRY(make_listener(accepted_family, accepted_address, accepted_room));
  std::string destination = in_family(inet_state(file).family(), name_of(listener.get()));
  for (const std::string& address : {client_address, std::string()}) {
    Connection connection;
    connection.client = VMCKPT_TRY(make_socket(context, file));
    int client = connection.client.get();
    make_room(client, client_room);
    if (!address.empty()) {
      VMCKPT_TRY(set_option(client, SOL_SOCKET, SO_REUSEADDR, 1, describe(file)));
      if (bind_to(client, address) != 0) continue;
    }
    if (connect_to(client, destination) != 0) {
      if (!address.empty()) continue;  // the pair of ports may linger in TIME_WAIT
      return errno_error("connect over the loopback interface for " + describe(file));
    }
    connection.accepted = VMCKPT_TRY(accept_from(listener.get(), client));
    return connection;
  }
  return errno_error("connect over the loopback interface for " + describe(file));
}

Result<size_t> send_all(int fd, const std::string& data) {
  size_t sent = 0;
  while (sent < data.size()) {
    ssize_t put = ::send(fd, data.data() + sent, data.size() - sent, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (put < 0 && errno == EAGAIN) break;
    if (put < 0 && errno != EINTR) return errno_error("put unread bytes back into a TCP connection");
    if (put > 0) sent += static_cast<size_t>(put);
  }
  return sent;
}

// Waits until `bytes` have arrived at `fd`, which over loopback takes no time unless the receive buffer is full.
size_t wait_for_bytes(int fd, size_t bytes) {
  int arrived = 0;
  for (int waited_ms = 0; waited_ms < kLoopbackTimeoutMs / 10; ++waited_ms) {
    if (::ioctl(fd, FIONREAD, &arrived) == 0 && static_cast<size_t>(arrived) >= bytes) break;
    ::usleep(1000);
  }
  return static_cast<size_t>(std::max(arrived, 0));
}

void finish_options(RestoreContext& context, const pb::OpenFile& file, int fd) {
  const SocketOptions& options = inet_state(file).options();
  // Was set to bind beside lingering connections. Raw sockets have it from the beginning.
  int reuse = saved_option(options, SOL_SOCKET, SO_REUSEADDR);
  if (inet_state(file).type() != SOCK_RAW) ::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &reuse, sizeof reuse);
  if (inet_state(file).not_local()) {
    int free = saved_option(options, IPPROTO_IP, IP_FREEBIND) | saved_option(options, IPPROTO_IPV6, IPV6_FREEBIND);
    ::setsockopt(fd, IPPROTO_IP, IP_FREEBIND, &free, sizeof free);
  }
  restore_socket_options(context, file, options, fd, OptionStage::kAfterwards);
}

const pb::OpenFile* find_file(const RestoreContext& context, uint32_t id) {
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (file.id() == id && file.HasExtension(pb::inet_socket)) return &file;
  }
  return nullptr;
}

// The end whose port the program listens at was made by accept.
bool was_accepted(const RestoreContext& context, const pb::InetSocket& socket) {
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (inet_state(file).listening() &&
        port_of(inet_state(file).local_address()) == port_of(socket.local_address()))
      return true;
  }
  return false;
}

Result<void> put_unread_back(const pb::OpenFile& file, int other_end) {
  const std::string& unread = inet_state(file).unread();
  size_t sent = VMCKPT_TRY(send_all(other_end, unread));
  if (sent == unread.size()) return {};
  return error(fmt::format("only {} of {} unread bytes could be put back into {}", sent, unread.size(), describe(file)),
               "raise net.core.rmem_max");
}

Result<void> restore_inside(RestoreContext& context, const pb::OpenFile& file) {
  const pb::OpenFile* peer = find_file(context, inet_state(file).peer_id());
  if (peer == nullptr || inet_state(*peer).peer() != pb::PEER_INSIDE || inet_state(*peer).peer_id() != file.id()) {
    return error(describe(file) + " is connected to a descriptor that is not connected to it");
  }
  bool accepted_is_file = was_accepted(context, inet_state(file));
  const pb::OpenFile& client = accepted_is_file ? *peer : file;
  const pb::OpenFile& accepted = accepted_is_file ? file : *peer;
  const pb::InetSocket &client_socket = inet_state(client), &accepted_socket = inet_state(accepted);
  Connection connection = VMCKPT_TRY(connect_pair(context, client, accepted_socket.family(), client_socket.local_address(),
                                                  accepted_socket.local_address(), client_socket.unread().size(),
                                                  accepted_socket.unread().size()));
  int client_fd = connection.client.get(), accepted_fd = connection.accepted.get();
  restore_socket_options(context, accepted, accepted_socket.options(), accepted_fd, OptionStage::kBeforeBind);
  if (!same_endpoint(name_of(client_fd), client_socket.local_address()) ||
      !same_endpoint(name_of(accepted_fd), accepted_socket.local_address())) {
    context.note(fmt::format("the connection between {} and {} has other ports now: {} and {}", describe(client),
                             describe(accepted), endpoint_text(name_of(client_fd)),
                             endpoint_text(name_of(accepted_fd))));
  }
  VMCKPT_TRY(put_unread_back(client, accepted_fd));
  VMCKPT_TRY(put_unread_back(accepted, client_fd));
  bool client_done =
      (client_socket.shutdown() & kNoMoreSending) != 0 || (accepted_socket.shutdown() & kPeerHasFinished) != 0;
  bool accepted_done =
      (accepted_socket.shutdown() & kNoMoreSending) != 0 || (client_socket.shutdown() & kPeerHasFinished) != 0;
  if (client_done) ::shutdown(client_fd, SHUT_WR);
  if (accepted_done) ::shutdown(accepted_fd, SHUT_WR);
  shut_down(client_fd, client_socket.shutdown() & kNoMoreReading);
  shut_down(accepted_fd, accepted_socket.shutdown() & kNoMoreReading);
  VMCKPT_TRY(context.put(client, std::move(connection.client)));
  return context.put(accepted, std::move(connection.accepted));
}

// Closes so that the other end sees a reset.
void reset_connection(Fd fd) {
  linger at_once{1, 0};
  ::setsockopt(fd.get(), SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
}

// A connection whose other end is gone. Ends in the state that the program had seen last, made final by a reset.
Result<void> restore_lost(RestoreContext& context, const pb::OpenFile& file) {
  const pb::InetSocket& socket = inet_state(file);
  Connection connection = VMCKPT_TRY(connect_pair(context, file, socket.family(), {}, {}, socket.unread().size(), 0));
  int fd = connection.client.get(), other = connection.accepted.get();
  VMCKPT_TRY(send_all(other, socket.unread()));
  size_t arrived = wait_for_bytes(fd, socket.unread().size());
  if (arrived < socket.unread().size()) {
    context.note(fmt::format("{} has {} of {} unread bytes: the receive buffer may not be larger here", describe(file),
                             arrived, socket.unread().size()));
  }
  bool had_finished = (socket.shutdown() & kPeerHasFinished) != 0;
  if (had_finished && !socket.error_pending()) ::shutdown(other, SHUT_WR);
  if ((socket.shutdown() & kNoMoreSending) != 0) ::shutdown(fd, SHUT_WR);
  reset_connection(std::move(connection.accepted));
  pollfd gone{fd, POLLRDHUP, 0};
  ::poll(&gone, 1, kLoopbackTimeoutMs);
  if (had_finished && !socket.error_pending()) get_option(fd, SOL_SOCKET, SO_ERROR);  // takes the reset's error away
  shut_down(fd, socket.shutdown() & kNoMoreReading);
  return context.put(file, std::move(connection.client));
}

Result<void> bind_again(RestoreContext& context, const pb::OpenFile& file, int fd) {
  const pb::InetSocket& socket = inet_state(file);
  VMCKPT_TRY(prepare_bind(file, fd));
  if (bind_to(fd, socket.local_address()) == 0) return {};
  if (errno == EADDRINUSE && socket.type() == SOCK_STREAM) {
    std::vector<InetDiagEntry> lingering = list_lingering(socket.local_address());
    for (const InetDiagEntry& entry : lingering) (void)end_lingering_connection(entry);
    if (bind_to(fd, socket.local_address()) == 0) return {};
    if (!lingering.empty()) return lingering_error(file);
  }
  if (errno != EADDRINUSE || !may_change_port(socket)) {
    return errno_error(fmt::format("{}: bind to {}", describe(file), endpoint_text(socket.local_address())));
  }
  if (bind_to(fd, with_port(socket.local_address(), 0)) != 0)
    return errno_error(describe(file) + ": bind to another port");
  context.note(fmt::format("{} was at {} and is at {} now: the port is in use", describe(file),
                           endpoint_text(socket.local_address()), endpoint_text(name_of(fd))));
  return {};
}

Result<void> restore_unconnected(RestoreContext& context, const pb::OpenFile& file) {
  const pb::InetSocket& socket = inet_state(file);
  Fd fd = VMCKPT_TRY(make_socket(context, file));
  restore_socket_options(context, file, socket.options(), fd.get(), OptionStage::kRoute);
  if (!socket.local_address().empty()) VMCKPT_TRY(bind_again(context, file, fd.get()));
  if (socket.type() != SOCK_STREAM && !socket.peer_address().empty() &&
      connect_to(fd.get(), socket.peer_address()) != 0) {
    context.note(fmt::format("{} cannot be connected to {}: {}", describe(file), endpoint_text(socket.peer_address()),
                             std::strerror(errno)));
  }
  if (socket.listening() && ::listen(fd.get(), static_cast<int>(socket.backlog())) != 0) {
    return errno_error(fmt::format("{}: listen at {}", describe(file), endpoint_text(socket.local_address())));
  }
  return context.put(file, std::move(fd));
}

// With its old port where that is free.
void bind_client(const pb::OpenFile& file, int fd) {
  int reuse = 1;
  ::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &reuse, sizeof reuse);
  const std::string& address = inet_state(file).local_address();
  if (!address.empty()) (void)(bind_to(fd, address) == 0 || bind_to(fd, with_port(address, 0)) == 0);
}

// A connection to a listener inside, which the program has not accepted yet.
Result<void> restore_waiting(RestoreContext& context, const pb::OpenFile& file) {
  const pb::InetSocket& socket = inet_state(file);
  for (bool old_port : {true, false}) {
    Fd fd = VMCKPT_TRY(make_socket(context, file));
    if (old_port) bind_client(file, fd.get());
    if (connect_to(fd.get(), socket.peer_address()) != 0) {
      if (old_port) continue;  // the pair of ports may linger in TIME_WAIT
      return errno_error(fmt::format("connect {} to {}", describe(file), endpoint_text(socket.peer_address())));
    }
    if (!same_endpoint(name_of(fd.get()), socket.local_address())) {
      context.note(fmt::format("{} has another port now: {}", describe(file), endpoint_text(name_of(fd.get()))));
    }
    shut_down(fd.get(), socket.shutdown());
    return context.put(file, std::move(fd));
  }
  return {};
}

// One that was not connected yet when the checkpoint was taken. It tries again; a failure that is known at once is told the
// program as a reset.
Result<void> restore_connecting(RestoreContext& context, const pb::OpenFile& file) {
  const pb::InetSocket& socket = inet_state(file);
  Fd fd = VMCKPT_TRY(make_socket(context, file));
  restore_socket_options(context, file, socket.options(), fd.get(), OptionStage::kRoute);
  bind_client(file, fd.get());
  int flags = ::fcntl(fd.get(), F_GETFL);
  if (flags < 0 || ::fcntl(fd.get(), F_SETFL, flags | O_NONBLOCK) != 0) return errno_error("prepare " + describe(file));
  if (connect_to(fd.get(), socket.peer_address()) != 0 && errno != EINPROGRESS) return restore_lost(context, file);
  shut_down(fd.get(), socket.shutdown());
  return context.put(file, std::move(fd));
}

bool is_connecting(const pb::InetSocket& socket) {
  return socket.state() == TCP_SYN_SENT && !socket.peer_address().empty() && socket.peer() == pb::PEER_OUTSIDE;
}

std::vector<const pb::OpenFile*> list_waiting(const RestoreContext& context) {
  std::vector<const pb::OpenFile*> waiting;
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (file.HasExtension(pb::inet_socket) && inet_state(file).pending()) waiting.push_back(&file);
  }
  // Their order in the listener's queue is not known; that in which they were made is most likely the same.
  std::sort(waiting.begin(), waiting.end(),
            [](const auto* a, const auto* b) { return inet_state(*a).inode() < inet_state(*b).inode(); });
  return waiting;
}

}  // namespace

Result<void> restore_inet_sockets(RestoreContext& context) {
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (!file.HasExtension(pb::inet_socket) || context.has(file.id())) continue;
    if (inet_state(file).pending() || is_connecting(inet_state(file))) continue;
    switch (inet_state(file).peer()) {
      case pb::PEER_INSIDE: VMCKPT_TRY(restore_inside(context, file)); break;
      case pb::PEER_STDIO:
        VMCKPT_TRY(context.put(file, VMCKPT_TRY(attach_stdio(context, file, context.descriptors.stdio(file)))));
        break;
      case pb::PEER_OUTSIDE:
      case pb::PEER_CLOSED: VMCKPT_TRY(restore_lost(context, file)); break;
      default: break;
    }
  }
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (!file.HasExtension(pb::inet_socket) || context.has(file.id())) continue;
    if (inet_state(file).pending() || is_connecting(inet_state(file)))
      continue;
    VMCKPT_TRY(restore_unconnected(context, file));
  }
  for (const pb::OpenFile* file : list_waiting(context)) VMCKPT_TRY(restore_waiting(context, *file));
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (file.HasExtension(pb::inet_socket) && is_connecting(inet_state(file))) VMCKPT_TRY(restore_connecting(context, file));
  }
  // Only now: until the last bind, all sockets of a port must allow sharing it.
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (!file.HasExtension(pb::inet_socket) || inet_state(file).peer() == pb::PEER_STDIO) continue;
    const pb::InetSocket& socket = inet_state(file);
    int fd = context.fd(file.id());
    if (socket.peer() != pb::PEER_NONE && !is_connecting(socket)) {
      restore_socket_options(context, file, socket.options(), fd, OptionStage::kRoute);
    }
    finish_options(context, file, fd);
    restore_memberships(context, file, fd);
    if (socket.peer() == pb::PEER_NONE) shut_down(fd, socket.shutdown());
  }
  return {};
}

}  // namespace vmckpt
