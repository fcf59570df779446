// TCP and UDP over IPv4 and IPv6 (and unprivileged ICMP, which looks like UDP).
//
// Made by socket(2) and accept(2); changed by bind, listen, connect, shutdown and all that sends and receives. Saved:
// addresses, TCP state, backlog, options, unread bytes of a stream (MSG_PEEK leaves them where they are).
//
//   TCP listener            bound to the same address and listening; connections not accepted yet are lost (noted)
//   TCP, both ends inside   a fresh connection with the unread bytes and, if they are free, the old ports. Bytes that
//                           have not reached the other end yet cannot be read: refused, they arrive within a moment
//   TCP, other end outside  a connection that the other end has reset: the program reads what is left, then gets
//                           ECONNRESET, and writing gives EPIPE; noted. Reset rather than end of file, because an end
//                           of file would say that the peer had sent everything
//   TCP, peer had finished  the unread bytes, then end of file as before; writing gives EPIPE
//   UDP                     bound and connected to the same addresses; waiting datagrams are lost, as they may always
//   be
//   raw sockets             refused (refused.cc)
//
// Preflight tries every address that is needed. A UDP port from the range that the kernel gives out by itself may be
// another one after the restart (noted): the program did not choose it. Restore: inet_socket_restore.cc.
// Sources: tcp(7), udp(7), ip(7), ipv6(7), net/ipv4/tcp.c.
#include "modules/inet_socket.h"

#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/proc.h"
#include "modules/descriptor_module.h"
#include "modules/socket_options.h"
#include "modules/socket_queue.h"

namespace vmckpt {
namespace {

bool recognise(const TargetFile& file) {
  if (file.socket_domain != AF_INET && file.socket_domain != AF_INET6) return false;
  if (file.socket_type == SOCK_STREAM) return file.socket_protocol == IPPROTO_TCP;
  return file.socket_type == SOCK_DGRAM &&
         (file.socket_protocol == IPPROTO_UDP || file.socket_protocol == IPPROTO_UDPLITE ||
          file.socket_protocol == IPPROTO_ICMP || file.socket_protocol == IPPROTO_ICMPV6);
}

std::string local_address(int fd) {
  sockaddr_storage address{};
  socklen_t bytes = sizeof address;
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &bytes) != 0) return {};
  std::string text(reinterpret_cast<char*>(&address), bytes);
  return port_of(text) == 0 ? std::string() : text;
}

std::string peer_address(int fd) {
  sockaddr_storage address{};
  socklen_t bytes = sizeof address;
  if (::getpeername(fd, reinterpret_cast<sockaddr*>(&address), &bytes) != 0) return {};
  return std::string(reinterpret_cast<char*>(&address), bytes);
}

uint32_t ask_amount(int fd, unsigned long request) {
  int bytes = 0;
  return ::ioctl(fd, request, &bytes) == 0 && bytes > 0 ? static_cast<uint32_t>(bytes) : 0;
}

Result<void> save_tcp(SaveContext& context, const TargetFile& file, int fd, pb::InetSocket* socket) {
  tcp_info info{};
  socklen_t bytes = sizeof info;
  if (::getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &bytes) != 0)
    return errno_error("ask for the state of " + file.describe());
  socket->set_state(info.tcpi_state);
  if (info.tcpi_state == TCP_LISTEN) {  // the kernel gives the accept queue in these two fields then
    socket->set_listening(true);
    socket->set_backlog(info.tcpi_sacked);
    socket->set_pending_connections(info.tcpi_unacked);
    if (info.tcpi_unacked != 0) {
      context.note(fmt::format("{} has {} connections that the program has not accepted; a restart closes them",
                               file.describe(), info.tcpi_unacked));
    }
    return {};
  }
  pollfd ask{fd, POLLRDHUP, 0};
  ::poll(&ask, 1, 0);
  bool was_connected = info.tcpi_state != TCP_CLOSE || (ask.revents & POLLRDHUP) != 0;
  socket->set_peer(was_connected ? pb::PEER_OUTSIDE : pb::PEER_NONE);
  if (!was_connected) return {};
  socket->set_error_pending((ask.revents & POLLERR) != 0);
  bool finished_sending = info.tcpi_state == TCP_FIN_WAIT1 || info.tcpi_state == TCP_FIN_WAIT2 ||
                          info.tcpi_state == TCP_CLOSING || info.tcpi_state == TCP_LAST_ACK ||
                          info.tcpi_state == TCP_TIME_WAIT;
  socket->set_shutdown(((ask.revents & POLLRDHUP) != 0 ? kPeerHasFinished : 0) |
                       (finished_sending ? kNoMoreSending : 0));
  if (info.tcpi_state != TCP_SYN_SENT) socket->set_unread(VMCKPT_TRY(peek_stream(file, fd)));
  socket->set_unsent_bytes(info.tcpi_state == TCP_CLOSE ? 0 : ask_amount(fd, SIOCOUTQNSD));
  if (info.tcpi_state == TCP_CLOSE || info.tcpi_state == TCP_TIME_WAIT) socket->set_peer(pb::PEER_CLOSED);
  return {};
}

Result<void> save(SaveContext& context, const TargetFile& file, int fd, pb::OpenFile* saved) {
  pb::InetSocket* socket = saved->mutable_inet_socket();
  socket->set_family(file.socket_domain);
  socket->set_type(file.socket_type);
  socket->set_protocol(file.socket_protocol);
  socket->set_inode(file.status.st_ino);
  socket->set_local_address(local_address(fd));
  socket->set_peer_address(peer_address(fd));
  VMCKPT_TRY(save_socket_options(context, file, fd, socket->mutable_options()));
  if (file.socket_type == SOCK_STREAM) return save_tcp(context, file, fd, socket);
  socket->set_queued_datagram_bytes(ask_amount(fd, FIONREAD));
  if (socket->queued_datagram_bytes() != 0) {
    context.note(
        fmt::format("{} has datagrams that the program has not read; they are not in the image", file.describe()));
  }
  return {};
}

bool is_connection(const TargetFile& file) {
  return file.saved->has_inet_socket() && file.saved->inet_socket().type() == SOCK_STREAM &&
         file.saved->inet_socket().peer() == pb::PEER_OUTSIDE && !file.saved->inet_socket().peer_address().empty();
}

Result<void> save_links(SaveContext& context) {
  std::map<std::pair<std::string, std::string>, const TargetFile*> ends;  // by own and other address
  for (const TargetFile& file : context.files) {
    if (!is_connection(file)) continue;
    const pb::InetSocket& socket = file.saved->inet_socket();
    ends[{endpoint_text(socket.local_address()), endpoint_text(socket.peer_address())}] = &file;
  }
  for (const auto& [addresses, file] : ends) {
    auto other = ends.find({addresses.second, addresses.first});
    if (other == ends.end() || other->second == file) continue;
    pb::InetSocket* socket = file->saved->mutable_inet_socket();
    if (socket->unsent_bytes() != 0) {
      return error(
          fmt::format("{} has {} bytes that have not reached the other end of the connection within the program",
                      file->describe(), socket->unsent_bytes()),
          "checkpoint again when the program has read more");
    }
    socket->set_peer(pb::PEER_INSIDE);
    socket->set_peer_id(static_cast<uint32_t>(other->second->id()));
  }
  for (const TargetFile& file : context.files) {
    if (!file.saved->has_inet_socket() || file.saved->inet_socket().peer() != pb::PEER_OUTSIDE) continue;
    pb::InetSocket* socket = file.saved->mutable_inet_socket();
    if (file.stdio() >= 0) {
      socket->set_peer(pb::PEER_STDIO);
    } else {
      std::string lost = socket->unsent_bytes() != 0
                             ? fmt::format(", {} bytes that were not sent yet with it", socket->unsent_bytes())
                             : "";
      context.note(fmt::format("{} is connected to {}; after a restart that connection is reset{}", file.describe(),
                               endpoint_text(socket->peer_address()), lost));
    }
  }
  return {};
}

// Binds a socket of the same kind for a moment.
void check_address(CheckContext& context, const pb::OpenFile& file) {
  const pb::InetSocket& socket = file.inet_socket();
  Fd probe(::socket(socket.family(), socket.type() | SOCK_CLOEXEC, socket.protocol()));
  if (!probe) {
    context.problem(errno_error(fmt::format("a socket like {} cannot be made", describe(file)),
                                socket.family() == AF_INET6 ? "this host has no IPv6" : ""));
    return;
  }
  (void)prepare_bind(file, probe.get());
  const std::string& address = socket.local_address();
  if (::bind(probe.get(), reinterpret_cast<const sockaddr*>(address.data()), static_cast<socklen_t>(address.size())) ==
      0)
    return;
  if (errno == EADDRINUSE && may_change_port(socket)) return;
  const char* cure = errno == EADDRINUSE      ? "end the process that uses it"
                     : errno == EADDRNOTAVAIL ? "give this host the address, or let the program listen on all addresses"
                     : errno == EACCES        ? "ports below net.ipv4.ip_unprivileged_port_start need root"
                                              : "";
  context.problem(
      errno_error(fmt::format("address {} ({}) cannot be used again", endpoint_text(address), describe(file)), cure));
}

void check(CheckContext& context) {
  for (const pb::OpenFile& file : context.table.files()) {
    if (!file.has_inet_socket() || file.inet_socket().local_address().empty()) continue;
    if (file.inet_socket().peer() == pb::PEER_NONE) check_address(context, file);
  }
}

}  // namespace

Result<void> prepare_bind(const pb::OpenFile& file, int fd) {
  const SocketOptions& options = file.inet_socket().options();
  constexpr std::pair<int, int> kDecisive[] = {{IPPROTO_IPV6, IPV6_V6ONLY},
                                               {SOL_SOCKET, SO_REUSEPORT},
                                               {IPPROTO_IP, IP_FREEBIND},
                                               {IPPROTO_IPV6, IPV6_FREEBIND}};
  for (auto [level, name] : kDecisive) {
    int value = saved_option(options, level, name);
    if (value != 0) VMCKPT_TRY(set_option(fd, level, name, value, describe(file)));
  }
  // Connections of the program that has just ended may linger at this port; a listener in use still forbids it.
  bool reuse = file.inet_socket().type() == SOCK_STREAM || saved_option(options, SOL_SOCKET, SO_REUSEADDR) != 0;
  return reuse ? set_option(fd, SOL_SOCKET, SO_REUSEADDR, 1, describe(file)) : Result<void>();
}

bool may_change_port(const pb::InetSocket& socket) {
  if (socket.type() != SOCK_DGRAM) return false;
  auto range = read_whole_file("/proc/sys/net/ipv4/ip_local_port_range");
  if (!range.ok()) return false;
  auto words = split_words(*range);
  unsigned port = port_of(socket.local_address());
  return words.size() == 2 && port >= static_cast<unsigned>(parse_number(words[0])) &&
         port <= static_cast<unsigned>(parse_number(words[1]));
}

const DescriptorModule kInetSocketModule{"TCP or UDP socket", recognise, save, save_links, check, restore_inet_sockets};

}  // namespace vmckpt
