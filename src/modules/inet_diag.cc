#include "modules/inet_diag.h"

#include <cstring>

#include <arpa/inet.h>
#include <linux/inet_diag.h>
#include <linux/rtnetlink.h>
#include <linux/tcp.h>  // its tcp_info is longer than libc's
#include <netinet/in.h>

#include "modules/inet_socket.h"
#include "modules/sock_diag.h"

namespace vmckpt {
namespace {

constexpr const char* kNoDiag = "the kernel needs CONFIG_INET_DIAG and CONFIG_INET_UDP_DIAG";
constexpr int kEstablished = 1, kListen = 10;  // TCP_ESTABLISHED and TCP_LISTEN of libc's netinet/tcp.h

Result<Fd> ask(uint16_t type, uint16_t flags, const inet_diag_req_v2& request) {
  Fd netlink = open_sock_diag();
  if (!netlink) return errno_error("open a socket to ask about TCP and UDP sockets", kNoDiag);
  if (!send_sock_diag(netlink, type, flags, request)) return errno_error("ask about TCP and UDP sockets", kNoDiag);
  return netlink;
}

std::string to_sockaddr(int family, const __be32* address, __be16 port) {
  if (family == AF_INET) {
    sockaddr_in v4{};
    v4.sin_family = AF_INET;
    v4.sin_port = port;
    std::memcpy(&v4.sin_addr, address, sizeof v4.sin_addr);
    return std::string(reinterpret_cast<char*>(&v4), sizeof v4);
  }
  sockaddr_in6 v6{};
  v6.sin6_family = AF_INET6;
  v6.sin6_port = port;
  std::memcpy(&v6.sin6_addr, address, sizeof v6.sin6_addr);
  return std::string(reinterpret_cast<char*>(&v6), sizeof v6);
}

InetDiagEntry read_entry(nlmsghdr* header, int protocol) {
  auto* info = static_cast<inet_diag_msg*>(NLMSG_DATA(header));
  InetDiagEntry entry;
  entry.state = info->idiag_state;
  entry.inode = info->idiag_inode;
  entry.expires_ms = info->idiag_expires;
  entry.peer_address = to_sockaddr(info->idiag_family, info->id.idiag_dst, info->id.idiag_dport);
  inet_diag_req_v2 request{};
  request.sdiag_family = info->idiag_family;
  request.sdiag_protocol = static_cast<uint8_t>(protocol);
  request.idiag_states = ~0u;
  request.id = info->id;
  entry.request.assign(reinterpret_cast<char*>(&request), sizeof request);
  auto left = static_cast<int>(header->nlmsg_len - NLMSG_LENGTH(sizeof *info));
  auto* attribute = reinterpret_cast<rtattr*>(info + 1);
  for (; RTA_OK(attribute, left); attribute = RTA_NEXT(attribute, left)) {
    if (attribute->rta_type == INET_DIAG_SHUTDOWN) entry.shutdown = *static_cast<uint8_t*>(RTA_DATA(attribute));
  }
  return entry;
}

}  // namespace

Result<std::vector<InetDiagEntry>> list_inet_sockets(int family, int protocol, uint32_t states, unsigned port) {
  inet_diag_req_v2 request{};
  request.sdiag_family = static_cast<uint8_t>(family);
  request.sdiag_protocol = static_cast<uint8_t>(protocol);
  request.idiag_ext = 1 << (INET_DIAG_SHUTDOWN - 1);
  request.idiag_states = states;
  request.id.idiag_sport = htons(static_cast<uint16_t>(port));
  const Fd netlink = VMCKPT_TRY(ask(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, request));
  std::vector<InetDiagEntry> entries;
  const bool whole = read_sock_diag_dump<inet_diag_msg>(netlink, [&](nlmsghdr* header) {
    const bool is_wanted = port == 0 || static_cast<inet_diag_msg*>(NLMSG_DATA(header))->id.idiag_sport == request.id.idiag_sport;
    if (is_wanted) entries.push_back(read_entry(header, protocol));
  });
  if (!whole) return errno_error("ask about TCP and UDP sockets", kNoDiag);
  return entries;
}

Result<void> end_lingering_connection(const InetDiagEntry& entry) {
  inet_diag_req_v2 request{};
  std::memcpy(&request, entry.request.data(), sizeof request);
  const Fd netlink = VMCKPT_TRY(ask(SOCK_DESTROY, NLM_F_ACK, request));
  alignas(nlmsghdr) char answer[4096];
  ssize_t got = ::recv(netlink.get(), answer, sizeof answer, 0);
  auto* header = reinterpret_cast<nlmsghdr*>(answer);
  if (got <= 0 || !NLMSG_OK(header, static_cast<unsigned>(got))) return errno_error("end a lingering connection");
  if (header->nlmsg_type != NLMSG_ERROR) return {};
  errno = sock_diag_errno(header);
  if (errno == 0 || errno == ENOENT) return {};
  return errno_error("end a lingering connection");
}

std::vector<InetDiagEntry> list_lingering(const std::string& address) {
  std::vector<InetDiagEntry> all;
  for (int family : {AF_INET, AF_INET6}) {
    auto entries = list_inet_sockets(family, IPPROTO_TCP, ~0u, port_of(address));
    if (!entries.ok()) return {};
    for (InetDiagEntry& entry : *entries) {
      if (entry.inode != 0 || entry.state == kEstablished || entry.state == kListen) return {};
      all.push_back(std::move(entry));
    }
  }
  return all;
}

TcpTraffic tcp_traffic(int fd) {
  tcp_info info{};
  socklen_t bytes = sizeof info;
  if (::getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &bytes) != 0) return {};
  return {info.tcpi_bytes_sent, info.tcpi_segs_out};
}

}  // namespace vmckpt
