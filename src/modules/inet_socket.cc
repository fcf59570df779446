// TCP and UDP over IPv4 and IPv6 (and unprivileged ICMP and raw sockets, which look like UDP).
//
// Made by socket(2) and accept(2); changed by bind, listen, connect, shutdown and all that sends and receives. Saved:
// addresses, TCP state, backlog, options, unread bytes of a stream (MSG_PEEK leaves them where they are).
//
//   TCP listener            bound to the same address and listening; connections from outside that are not accepted yet
//                           are lost (noted), those from inside are made again
//   TCP, connecting         connects again (noted)
//   TCP, both ends inside   a fresh connection with the unread bytes and, if they are free, the old ports. Bytes that
//                           have not reached the other end yet cannot be read: refused, they arrive within a moment
//   TCP, other end outside  a connection that the other end has reset: the program reads what is left, then gets
//                           ECONNRESET, and writing gives EPIPE; noted. Reset rather than end of file, because an end
//                           of file would say that the peer had sent everything
//   TCP, peer had finished  the unread bytes, then end of file as before; writing gives EPIPE
//   UDP and raw             bound and connected to the same addresses, member of the same multicast groups; waiting
//                           datagrams are lost, as they may always be
//
// What is shut down: TCP tells by its state and by poll, UDP through NETLINK_SOCK_DIAG (only connected sockets are in its
// table; of others poll tells that reading is shut down).
//
// Preflight tries every address that is needed. A UDP port from the range that the kernel gives out by itself may be
// another one after the restart (noted): the program did not choose it. An address that was bound although the host does
// not have it is bound so again. A port that connections of the killed target hold (TIME_WAIT; only a listener without
// SO_REUSEADDR minds) is taken from them, which needs CAP_NET_ADMIN; others are told how long to wait. Restore:
// inet_socket_restore.cc. Sources: tcp(7), udp(7), ip(7), ipv6(7), raw(7), sock_diag(7), net/ipv4/tcp.c, af_inet.c.
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
#include "modules/inet_diag.h"
#include "modules/inet_socket.pb.h"
#include "modules/multicast.h"
#include "modules/socket_options.h"
#include "modules/socket_queue.h"

namespace vmckpt {
namespace {

bool recognise(const TargetFile& file) {
  if (file.socket_domain != AF_INET && file.socket_domain != AF_INET6) return false;
  if (file.socket_type == SOCK_STREAM) return file.socket_protocol == IPPROTO_TCP;
  if (file.socket_type == SOCK_RAW) return true;
  return file.socket_type == SOCK_DGRAM &&
         (file.socket_protocol == IPPROTO_UDP || file.socket_protocol == IPPROTO_UDPLITE ||
          file.socket_protocol == IPPROTO_ICMP || file.socket_protocol == IPPROTO_ICMPV6);
}

std::string local_address(int fd, int type) {
  sockaddr_storage address{};
  socklen_t bytes = sizeof address;
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &bytes) != 0) return {};
  std::string text(reinterpret_cast<char*>(&address), bytes);
  if (type == SOCK_RAW) {  // its port is the number of the protocol, bound or not
    text = with_port(text, 0);
    return address_text(text) == "0.0.0.0" || address_text(text) == "::" ? std::string() : text;
  }
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

// Whether an address is bound that this host does not have (IP_FREEBIND, or net.ipv4.ip_nonlocal_bind at that time).
bool is_not_local(const pb::InetSocket& socket) {
  if (socket.local_address().empty() || is_any_or_loopback(socket.local_address())) return false;
  std::string address = with_port(socket.local_address(), 0);
  Fd probe(::socket(socket.family(), SOCK_DGRAM | SOCK_CLOEXEC, 0));
  return probe && ::bind(probe.get(), reinterpret_cast<const sockaddr*>(address.data()),
                         static_cast<socklen_t>(address.size())) != 0 && errno == EADDRNOTAVAIL;
}

bool poll_hang_up(int fd) {
  pollfd ask{fd, POLLRDHUP, 0};
  return ::poll(&ask, 1, 0) == 1 && (ask.revents & POLLRDHUP) != 0;
}

Result<void> save_tcp(const TargetFile& file, int fd, pb::InetSocket* socket) {
  tcp_info info{};
  socklen_t bytes = sizeof info;
  if (::getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &bytes) != 0)
    return errno_error("ask for the state of " + file.describe());
  socket->set_state(info.tcpi_state);
  if (info.tcpi_state == TCP_LISTEN) {  // the kernel gives the accept queue in these two fields then
    socket->set_listening(true);
    socket->set_backlog(info.tcpi_sacked);
    socket->set_pending_connections(info.tcpi_unacked);
    return {};
  }
  pollfd ask{fd, POLLRDHUP, 0};
  ::poll(&ask, 1, 0);
  bool no_more_reading = (ask.revents & POLLRDHUP) != 0;
  // A socket that was never connected can be shut down, too.
  bool was_connected = info.tcpi_state != TCP_CLOSE || (no_more_reading && tcp_traffic(fd).segments_sent != 0);
  socket->set_peer(was_connected ? pb::PEER_OUTSIDE : pb::PEER_NONE);
  if (!was_connected) {
    socket->set_shutdown(no_more_reading ? kNoMoreReading : 0);
    return {};
  }
  socket->set_error_pending((ask.revents & POLLERR) != 0);
  bool finished_sending = info.tcpi_state == TCP_FIN_WAIT1 || info.tcpi_state == TCP_FIN_WAIT2 ||
                          info.tcpi_state == TCP_CLOSING || info.tcpi_state == TCP_LAST_ACK ||
                          info.tcpi_state == TCP_TIME_WAIT;
  // In these states the peer has not sent its FIN: the program itself has shut reading down.
  bool peer_goes_on = info.tcpi_state == TCP_ESTABLISHED || info.tcpi_state == TCP_FIN_WAIT1 ||
                      info.tcpi_state == TCP_FIN_WAIT2 || info.tcpi_state == TCP_SYN_SENT;
  socket->set_shutdown((!no_more_reading ? 0 : peer_goes_on ? kNoMoreReading : kPeerHasFinished) |
                       (finished_sending ? kNoMoreSending : 0));
  if (info.tcpi_state != TCP_SYN_SENT) socket->set_unread(VMCKPT_TRY(peek_stream(file, fd)));
  socket->set_unsent_bytes(info.tcpi_state == TCP_CLOSE ? 0 : ask_amount(fd, SIOCOUTQNSD));
  if (info.tcpi_state == TCP_CLOSE || info.tcpi_state == TCP_TIME_WAIT) socket->set_peer(pb::PEER_CLOSED);
  return {};
}

Result<void> save(SaveContext& context, const TargetFile& file, int fd, pb::OpenFile* saved) {
  pb::InetSocket* socket = saved->MutableExtension(pb::inet_socket);
  socket->set_family(file.socket_domain);
  socket->set_type(file.socket_type);
  socket->set_protocol(file.socket_protocol);
  socket->set_inode(file.status.st_ino);
  socket->set_local_address(local_address(fd, file.socket_type));
  socket->set_peer_address(peer_address(fd));
  socket->set_not_local(is_not_local(*socket));
  VMCKPT_TRY(save_socket_options(context, file, fd, socket->mutable_options()));
  if (file.socket_type == SOCK_STREAM) return save_tcp(file, fd, socket);
  if (poll_hang_up(fd)) socket->set_shutdown(kNoMoreReading);
  socket->set_queued_datagram_bytes(ask_amount(fd, FIONREAD));
  if (socket->queued_datagram_bytes() != 0) {
    context.note(
        fmt::format("{} has datagrams that the program has not read; they are not in the image", file.describe()));
  }
  return {};
}

bool is_connection(const TargetFile& file) {
  const pb::InetSocket& socket = inet_state(*file.saved);
  return file.saved->HasExtension(pb::inet_socket) && socket.type() == SOCK_STREAM && socket.peer() == pb::PEER_OUTSIDE &&
         !socket.peer_address().empty();
}

// "0: 0100007F:0001 0200007F:0000 01 ... inode ...": a raw socket without a port tells its peer only here.
void save_raw_peers(SaveContext& context, int family) {
  auto text = read_whole_file(fmt::format("/proc/{}/net/{}", context.pid(), family == AF_INET ? "raw" : "raw6"));
  if (!text.ok()) return;
  for (std::string_view line : split_lines(*text)) {
    auto words = split_words(line);
    if (words.size() < 10 || words[3] != "01") continue;  // TCP_ESTABLISHED: connected
    const TargetFile* file = context.find_socket(static_cast<uint64_t>(parse_number(words[9])));
    if (file == nullptr || !file->saved->HasExtension(pb::inet_socket)) continue;
    uint32_t shown[4] = {};  // numbers as they lie in memory
    for (size_t i = 0; i < 4 && i * 8 + 8 <= words[2].find(':'); ++i) {
      shown[i] = static_cast<uint32_t>(parse_hex(words[2].substr(i * 8, 8)));
    }
    sockaddr_in6 v6{};
    sockaddr_in v4{};
    v6.sin6_family = AF_INET6;
    v4.sin_family = AF_INET;
    std::memcpy(&v6.sin6_addr, shown, sizeof v6.sin6_addr);
    std::memcpy(&v4.sin_addr, shown, sizeof v4.sin_addr);
    const void* address = family == AF_INET ? static_cast<const void*>(&v4) : &v6;
    size_t bytes = family == AF_INET ? sizeof v4 : sizeof v6;
    file->saved->MutableExtension(pb::inet_socket)->set_peer_address(address, bytes);
  }
}

// UDP: what connected sockets have shut down. TCP: where those connect to that are not connected yet.
Result<void> save_what_diag_tells(SaveContext& context) {
  std::set<std::array<int, 3>> questions;  // family, protocol, TCP_* state
  std::set<int> raw_families;
  bool datagrams = false;
  for (const TargetFile& file : context.files) {
    if (!file.saved->HasExtension(pb::inet_socket)) continue;
    const pb::InetSocket& socket = inet_state(*file.saved);
    datagrams |= socket.type() != SOCK_STREAM;
    if (socket.type() == SOCK_RAW && socket.peer_address().empty()) raw_families.insert(socket.family());
    bool udp = socket.type() == SOCK_DGRAM && !socket.peer_address().empty() &&
               (socket.protocol() == IPPROTO_UDP || socket.protocol() == IPPROTO_UDPLITE);
    if (udp) questions.insert({socket.family(), socket.protocol(), TCP_ESTABLISHED});
    if (socket.state() == TCP_SYN_SENT) questions.insert({socket.family(), IPPROTO_TCP, TCP_SYN_SENT});
  }
  for (auto [family, protocol, state] : questions) {
    auto entries = list_inet_sockets(family, protocol, 1u << state, 0);
    if (!entries.ok()) {
      if (protocol == IPPROTO_TCP) return entries.error();
      continue;  // a kernel without the module: shutting UDP down is rare
    }
    for (const InetDiagEntry& entry : *entries) {
      const TargetFile* file = entry.inode != 0 ? context.find_socket(entry.inode) : nullptr;
      if (file == nullptr || !file->saved->HasExtension(pb::inet_socket)) continue;
      pb::InetSocket* socket = file->saved->MutableExtension(pb::inet_socket);
      if (state == TCP_SYN_SENT) socket->set_peer_address(entry.peer_address);
      else
        socket->set_shutdown(((entry.shutdown & 1) != 0 ? kNoMoreReading : 0) | ((entry.shutdown & 2) != 0 ? kNoMoreSending : 0));
    }
  }
  for (int family : raw_families) save_raw_peers(context, family);
  if (!datagrams) return {};
  const std::vector<MulticastGroup> groups = list_multicast_groups(context.pid());
  for (const TargetFile& file : context.files) {
    if (!file.saved->HasExtension(pb::inet_socket) || inet_state(*file.saved).type() == SOCK_STREAM) continue;
    save_memberships(groups, file.duplicate.get(), file.saved->MutableExtension(pb::inet_socket));
  }
  return {};
}

// The listener inside at which a connection waits whose other end nobody has.
const TargetFile* find_listener_with_room(SaveContext& context, const pb::InetSocket& client,
                                          std::map<int, uint32_t>* waiting) {
  for (const TargetFile& file : context.files) {
    if (!file.saved->HasExtension(pb::inet_socket)) continue;
    const pb::InetSocket& listener = inet_state(*file.saved);
    if (!listener.listening() || port_of(listener.local_address()) != port_of(client.peer_address())) continue;
    std::string address = address_text(listener.local_address());
    bool there = address == "0.0.0.0" || address == "::" || address == address_text(client.peer_address());
    if (!there || (*waiting)[file.file_id()] >= listener.pending_connections()) continue;
    ++(*waiting)[file.file_id()];
    return &file;
  }
  return nullptr;
}

// Connections within the program that it has not accepted yet. What they have sent lies where nobody can read it.
Result<void> save_waiting_connections(SaveContext& context) {
  std::map<int, uint32_t> waiting;  // by the listener's id
  for (const TargetFile& file : context.files) {
    if (!is_connection(file)) continue;
    pb::InetSocket* socket = file.saved->MutableExtension(pb::inet_socket);
    bool open = socket->state() == TCP_ESTABLISHED || socket->state() == TCP_FIN_WAIT2;
    const TargetFile* listener = open ? find_listener_with_room(context, *socket, &waiting) : nullptr;
    if (listener == nullptr) continue;
    if (tcp_traffic(file.duplicate.get()).bytes_sent != 0) {
      return error(file.describe() + " has sent data over a connection that the program has not accepted yet",
                   "checkpoint again when it has");
    }
    socket->set_peer(pb::PEER_INSIDE);
    socket->set_pending(true);
    socket->set_peer_id(listener->file_id());
  }
  for (const TargetFile& file : context.files) {
    if (!file.saved->HasExtension(pb::inet_socket) || !inet_state(*file.saved).listening()) continue;
    uint32_t lost = inet_state(*file.saved).pending_connections() - waiting[file.file_id()];
    if (lost == 0) continue;
    context.note(fmt::format("{} has {} connections that the program has not accepted; a restart closes them",
                             file.describe(), lost));
  }
  return {};
}

void note_outside(SaveContext& context, const TargetFile& file, pb::InetSocket* socket) {
  if (file.stdio() >= 0) {
    socket->set_peer(pb::PEER_STDIO);
  } else if (socket->state() == TCP_SYN_SENT) {
    context.note(fmt::format("{} is connecting to {} and will connect again after a restart", file.describe(),
                             endpoint_text(socket->peer_address())));
  } else {
    std::string lost = socket->unsent_bytes() != 0
                           ? fmt::format(", {} bytes that were not sent yet with it", socket->unsent_bytes())
                           : "";
    context.note(fmt::format("{} is connected to {}; after a restart that connection is reset{}", file.describe(),
                             endpoint_text(socket->peer_address()), lost));
  }
}

Result<void> save_links(SaveContext& context) {
  std::map<std::pair<std::string, std::string>, const TargetFile*> ends;  // by own and other address
  for (const TargetFile& file : context.files) {
    if (!is_connection(file)) continue;
    const pb::InetSocket& socket = inet_state(*file.saved);
    ends[{endpoint_text(socket.local_address()), endpoint_text(socket.peer_address())}] = &file;
  }
  for (const auto& [addresses, file] : ends) {
    auto other = ends.find({addresses.second, addresses.first});
    if (other == ends.end() || other->second == file) continue;
    pb::InetSocket* socket = file->saved->MutableExtension(pb::inet_socket);
    if (socket->unsent_bytes() != 0) {
      return error(
          fmt::format("{} has {} bytes that have not reached the other end of the connection within the program",
                      file->describe(), socket->unsent_bytes()),
          "checkpoint again when the program has read more");
    }
    socket->set_peer(pb::PEER_INSIDE);
    socket->set_peer_id(other->second->file_id());
  }
  VMCKPT_TRY(save_waiting_connections(context));
  VMCKPT_TRY(save_what_diag_tells(context));
  for (const TargetFile& file : context.files) {
    if (!file.saved->HasExtension(pb::inet_socket) || inet_state(*file.saved).peer() != pb::PEER_OUTSIDE) continue;
    note_outside(context, file, file.saved->MutableExtension(pb::inet_socket));
  }
  return {};
}

// CAP_NET_ADMIN.
bool may_end_connections() {
  constexpr unsigned kNetAdmin = 12;
  auto status = read_status(::getpid());
  return status.ok() && (status_hex(*status, "CapEff") >> kNetAdmin & 1) != 0;
}

// Binds a socket of the same kind for a moment.
void check_address(CheckContext& context, const pb::OpenFile& file) {
  const pb::InetSocket& socket = inet_state(file);
  Fd probe(::socket(socket.family(), socket.type() | SOCK_CLOEXEC, socket.protocol()));
  if (!probe) {
    context.problem(errno_error(fmt::format("a socket like {} cannot be made", describe(file)),
                                socket.type() == SOCK_RAW ? "raw sockets need root (CAP_NET_RAW)"
                                : socket.family() == AF_INET6 ? "this host has no IPv6"
                                                              : ""));
    return;
  }
  if (socket.local_address().empty()) return;
  (void)prepare_bind(file, probe.get());
  const std::string& address = socket.local_address();
  if (::bind(probe.get(), reinterpret_cast<const sockaddr*>(address.data()), static_cast<socklen_t>(address.size())) ==
      0)
    return;
  const int failed = errno;
  if (failed == EADDRINUSE && may_change_port(socket)) return;
  if (failed == EADDRINUSE && socket.type() == SOCK_STREAM && !list_lingering(address).empty()) {
    if (!may_end_connections()) context.problem(lingering_error(file));
    return;  // ended at restart
  }
  errno = failed;
  const char* cure = errno == EADDRINUSE      ? "end the process that uses it"
                     : errno == EADDRNOTAVAIL ? "give this host the address, or let the program listen on all addresses"
                     : errno == EACCES        ? "ports below net.ipv4.ip_unprivileged_port_start need root"
                                              : "";
  context.problem(
      errno_error(fmt::format("address {} ({}) cannot be used again", endpoint_text(address), describe(file)), cure));
}

void check(CheckContext& context) {
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (!file.HasExtension(pb::inet_socket) || inet_state(file).peer() != pb::PEER_NONE) continue;
    if (!inet_state(file).local_address().empty() || inet_state(file).type() == SOCK_RAW) check_address(context, file);
  }
}

}  // namespace

Result<void> prepare_bind(const pb::OpenFile& file, int fd) {
  const SocketOptions& options = inet_state(file).options();
  constexpr std::pair<int, int> kDecisive[] = {{IPPROTO_IPV6, IPV6_V6ONLY},
                                               {SOL_SOCKET, SO_REUSEPORT},
                                               {IPPROTO_IP, IP_FREEBIND},
                                               {IPPROTO_IPV6, IPV6_FREEBIND}};
  for (auto [level, name] : kDecisive) {
    int value = saved_option(options, level, name);
    if (value != 0) VMCKPT_TRY(set_option(fd, level, name, value, describe(file)));
  }
  if (inet_state(file).not_local()) {
    VMCKPT_TRY(set_option(fd, IPPROTO_IP, IP_FREEBIND, 1, describe(file)));
    if (inet_state(file).family() == AF_INET6) VMCKPT_TRY(set_option(fd, IPPROTO_IPV6, IPV6_FREEBIND, 1, describe(file)));
  }
  // Connections of the program that has just ended may linger at this port; a listener in use still forbids it.
  bool reuse = inet_state(file).type() == SOCK_STREAM || saved_option(options, SOL_SOCKET, SO_REUSEADDR) != 0;
  return reuse ? set_option(fd, SOL_SOCKET, SO_REUSEADDR, 1, describe(file)) : Result<void>();
}

Error lingering_error(const pb::OpenFile& file) {
  const std::string& address = inet_state(file).local_address();
  uint32_t left_ms = 0;
  for (const InetDiagEntry& entry : list_lingering(address)) left_ms = std::max(left_ms, entry.expires_ms);
  return error(fmt::format("address {} ({}) is held by connections of the program that has ended (TIME_WAIT), since it does "
                           "not set SO_REUSEADDR",
                           endpoint_text(address), describe(file)),
               left_ms != 0 ? fmt::format("restart in {} seconds, or as root", left_ms / 1000 + 1)
                            : "restart in a minute, or as root");
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

const DescriptorModule kInetSocketModule{"TCP, UDP or raw socket", recognise, save, save_links, check, restore_inet_sockets};

}  // namespace vmckpt
