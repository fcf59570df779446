// Shared by the parts of the TCP and UDP module: inet_socket.cc (save, check), inet_socket_restore.cc and
// inet_address.cc. Addresses are sockaddr_in or sockaddr_in6 as bytes, as the image has them.
#pragma once

#include <string>

#include "modules/descriptor_module.h"
#include "modules/inet_socket.pb.h"

namespace vmckpt {

constexpr uint32_t kPeerHasFinished = 1;  // bits of InetSocket.shutdown
constexpr uint32_t kNoMoreSending = 2;
constexpr uint32_t kNoMoreReading = 4;

inline const pb::InetSocket& inet_state(const pb::OpenFile& file) { return file.GetExtension(pb::inet_socket); }

unsigned port_of(const std::string& address);
std::string with_port(const std::string& address, unsigned port);
bool same_endpoint(const std::string& a, const std::string& b);  // IPv4 and IPv4-in-IPv6 compare equal
std::string endpoint_text(const std::string& address);           // "127.0.0.1:80", "[::1]:80"
std::string address_text(const std::string& address);            // without the port
bool is_any_or_loopback(const std::string& address);

// Options that decide whether an address can be bound.
Result<void> prepare_bind(const pb::OpenFile& file, int fd);

// Why its address cannot be bound when only connections are in the way that linger in the kernel.
Error lingering_error(const pb::OpenFile& file);

// A datagram socket whose port the kernel has chosen, as far as its number shows.
bool may_change_port(const pb::InetSocket& socket);

Result<void> restore_inet_sockets(RestoreContext& context);

}  // namespace vmckpt
