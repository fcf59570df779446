// What the kernel knows about TCP and UDP sockets beyond getsockopt, also about those that no process has any more:
// NETLINK_SOCK_DIAG (sock_diag(7)), and the longer part of TCP_INFO.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/result.h"

namespace vmckpt {

struct InetDiagEntry {
  int state = 0;            // TCP_*
  uint64_t inode = 0;       // 0: no process has it; the kernel finishes the connection
  uint32_t shutdown = 0;    // bit 0: no more reading, bit 1: no more writing
  uint32_t expires_ms = 0;  // of a connection that lingers
  std::string peer_address; // sockaddr
  std::string request;      // names this socket in a later question
};

// Sockets of this family and protocol whose state is in `states` (bit 1 << TCP_*), at local port `port`; 0: at any.
Result<std::vector<InetDiagEntry>> list_inet_sockets(int family, int protocol, uint32_t states, unsigned port);

// Ends a connection that no process has any more. Needs CAP_NET_ADMIN and CONFIG_INET_DIAG_DESTROY (Linux 4.5).
Result<void> end_lingering_connection(const InetDiagEntry& entry);

// Connections that have ended and hold the port of `address` (sockaddr) for a while; empty if a process holds it, too.
std::vector<InetDiagEntry> list_lingering(const std::string& address);

struct TcpTraffic {
  uint64_t bytes_sent = 0;     // Linux 4.19
  uint32_t segments_sent = 0;  // Linux 4.2
};
TcpTraffic tcp_traffic(int fd);

}  // namespace vmckpt
