#include <arpa/inet.h>
#include <netinet/in.h>

#include "modules/inet_socket.h"

namespace vmckpt {
namespace {

struct Endpoint {
  in6_addr address{};  // IPv4 as ::ffff:a.b.c.d
  unsigned port = 0;
  bool valid = false;
};

Endpoint parse(const std::string& text) {
  Endpoint endpoint;
  sockaddr_storage storage{};
  if (text.size() > sizeof storage || text.size() < sizeof(sa_family_t)) return endpoint;
  std::memcpy(&storage, text.data(), text.size());
  if (storage.ss_family == AF_INET && text.size() >= sizeof(sockaddr_in)) {
    const auto& v4 = reinterpret_cast<const sockaddr_in&>(storage);
    endpoint.address.s6_addr[10] = endpoint.address.s6_addr[11] = 0xff;
    std::memcpy(&endpoint.address.s6_addr[12], &v4.sin_addr, sizeof v4.sin_addr);
    endpoint.port = ntohs(v4.sin_port);
    endpoint.valid = true;
  } else if (storage.ss_family == AF_INET6 && text.size() >= offsetof(sockaddr_in6, sin6_scope_id)) {
    const auto& v6 = reinterpret_cast<const sockaddr_in6&>(storage);
    endpoint.address = v6.sin6_addr;
    endpoint.port = ntohs(v6.sin6_port);
    endpoint.valid = true;
  }
  return endpoint;
}

}  // namespace

unsigned port_of(const std::string& address) { return parse(address).port; }

std::string with_port(const std::string& address, unsigned port) {
  std::string changed = address;
  uint16_t network_order = htons(static_cast<uint16_t>(port));
  // sin_port and sin6_port are at the same place.
  static_assert(offsetof(sockaddr_in, sin_port) == offsetof(sockaddr_in6, sin6_port));
  if (changed.size() >= sizeof(sockaddr_in))
    std::memcpy(&changed[offsetof(sockaddr_in, sin_port)], &network_order, sizeof network_order);
  return changed;
}

bool same_endpoint(const std::string& a, const std::string& b) {
  Endpoint first = parse(a), second = parse(b);
  return first.valid && second.valid && first.port == second.port &&
         std::memcmp(&first.address, &second.address, sizeof first.address) == 0;
}

std::string address_text(const std::string& address) {
  Endpoint endpoint = parse(address);
  if (!endpoint.valid) return "an unknown address";
  char text[INET6_ADDRSTRLEN];
  bool v4 = IN6_IS_ADDR_V4MAPPED(&endpoint.address);
  ::inet_ntop(v4 ? AF_INET : AF_INET6, &endpoint.address.s6_addr[v4 ? 12 : 0], text, sizeof text);
  return text;
}

std::string endpoint_text(const std::string& address) {
  Endpoint endpoint = parse(address);
  if (!endpoint.valid) return "an unknown address";
  bool v4 = IN6_IS_ADDR_V4MAPPED(&endpoint.address);
  std::string text = v4 ? address_text(address) : "[" + address_text(address) + "]";
  return fmt::format("{}:{}", text, endpoint.port);
}

bool is_any_or_loopback(const std::string& address) {
  Endpoint endpoint = parse(address);
  const in6_addr& a = endpoint.address;
  if (!endpoint.valid || IN6_IS_ADDR_UNSPECIFIED(&a) || IN6_IS_ADDR_LOOPBACK(&a)) return true;
  static constexpr uint8_t kZeros[4] = {};
  return IN6_IS_ADDR_V4MAPPED(&a) && (a.s6_addr[12] == 127 || std::memcmp(&a.s6_addr[12], kZeros, sizeof kZeros) == 0);
}

}  // namespace vmckpt
