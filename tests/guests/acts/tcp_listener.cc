// Listening TCP sockets on the loopback addresses of IPv4 and IPv6 accept connections afterwards, on the same port and
// with the same options; one that is bound but does not listen yet can start to.

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <thread>

#include "act.h"

struct Option {
  const char* name;
  int level, option, value;  // value to set, -1: only read it
};
constexpr Option kOptions[] = {
    {"SO_REUSEADDR", SOL_SOCKET, SO_REUSEADDR, 1},
    {"SO_KEEPALIVE", SOL_SOCKET, SO_KEEPALIVE, 1},
    {"SO_RCVBUF", SOL_SOCKET, SO_RCVBUF, 70'000},
    {"SO_SNDBUF", SOL_SOCKET, SO_SNDBUF, 50'000},
    {"SO_PRIORITY", SOL_SOCKET, SO_PRIORITY, 3},
    {"SO_OOBINLINE", SOL_SOCKET, SO_OOBINLINE, 1},
    {"TCP_NODELAY", IPPROTO_TCP, TCP_NODELAY, 1},
    {"TCP_KEEPIDLE", IPPROTO_TCP, TCP_KEEPIDLE, 77},
    {"TCP_KEEPINTVL", IPPROTO_TCP, TCP_KEEPINTVL, 7},
    {"TCP_KEEPCNT", IPPROTO_TCP, TCP_KEEPCNT, 5},
    {"TCP_USER_TIMEOUT", IPPROTO_TCP, TCP_USER_TIMEOUT, 12'345},
    {"TCP_DEFER_ACCEPT", IPPROTO_TCP, TCP_DEFER_ACCEPT, -1},
    {"SO_ACCEPTCONN", SOL_SOCKET, SO_ACCEPTCONN, -1},
};

static int get(int fd, const Option& o) {
  int value = -1;
  socklen_t bytes = sizeof value;
  MUST(getsockopt(fd, o.level, o.option, &value, &bytes));
  return value;
}

struct Address {
  sockaddr_storage storage{};
  socklen_t bytes = sizeof(sockaddr_storage);
  sockaddr* raw() { return reinterpret_cast<sockaddr*>(&storage); }
};

static Address loopback(int family) {
  Address address;
  if (family == AF_INET) {
    auto* v4 = reinterpret_cast<sockaddr_in*>(&address.storage);
    v4->sin_family = AF_INET;
    v4->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.bytes = sizeof *v4;
  } else {
    auto* v6 = reinterpret_cast<sockaddr_in6*>(&address.storage);
    v6->sin6_family = AF_INET6;
    v6->sin6_addr = in6addr_loopback;
    address.bytes = sizeof *v6;
  }
  return address;
}

static Address name_of(int fd) {
  Address address;
  MUST(getsockname(fd, address.raw(), &address.bytes));
  return address;
}

static unsigned port_of(const Address& address) {
  return ntohs(reinterpret_cast<const sockaddr_in*>(&address.storage)->sin_port);  // IPv6 has it at the same place
}

static int make_bound(int family) {
  int fd = MUST(socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  for (const Option& o : kOptions) {
    if (o.value >= 0) MUST(setsockopt(fd, o.level, o.option, &o.value, sizeof o.value));
  }
  if (family == AF_INET6) {
    int one = 1;
    MUST(setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one));
  }
  Address where = loopback(family);
  MUST(bind(fd, where.raw(), where.bytes));
  return fd;
}

static void expect_accepts(const std::string& what, int listener) {
  Address where = name_of(listener);
  std::thread client([&] {
    int fd = MUST(socket(where.storage.ss_family, SOCK_STREAM, 0));
    if (connect(fd, where.raw(), where.bytes) != 0) {
      act::fail(what + ": connect", "success", strerror(errno));
      shutdown(listener, SHUT_RDWR);
      return;
    }
    act::write_text(fd, "hello");
    act::expect_equal(what + ": answer", std::string("welcome"), act::read_text(fd));
    close(fd);
  });
  int accepted = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
  if (accepted >= 0) {
    act::expect_equal(what + ": greeting", std::string("hello"), act::read_text(accepted));
    act::write_text(accepted, "welcome");
    close(accepted);
  }
  client.join();
}

static bool has_ipv6() {
  int fd = socket(AF_INET6, SOCK_STREAM, 0);
  if (fd < 0) return false;
  Address where = loopback(AF_INET6);
  bool bound = bind(fd, where.raw(), where.bytes) == 0;
  close(fd);
  return bound;
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  std::vector<std::pair<std::string, int>> listeners = {{"IPv4", make_bound(AF_INET)}};
  if (has_ipv6()) listeners.push_back({"IPv6", make_bound(AF_INET6)});
  for (auto& [name, fd] : listeners) MUST(listen(fd, 17));
  int only_bound = make_bound(AF_INET);
  std::vector<std::vector<int>> options;
  std::vector<Address> names;
  for (auto& [name, fd] : listeners) {
    names.push_back(name_of(fd));
    std::printf("PORT %u\n", port_of(names.back()));
    for (options.emplace_back(); const Option& o : kOptions) options.back().push_back(get(fd, o));
  }

  act::intermission();

  for (size_t i = 0; i < listeners.size(); i++) {
    auto [name, fd] = listeners[i];
    Address now = name_of(fd);
    act::expect(name + ": address and port", memcmp(&now.storage, &names[i].storage, now.bytes) == 0);
    for (size_t o = 0; o < std::size(kOptions); o++) {
      act::expect_equal(name + ": " + kOptions[o].name, options[i][o], get(fd, kOptions[o]));
    }
    act::expect_equal(name + ": close-on-exec", FD_CLOEXEC, fcntl(fd, F_GETFD));
    expect_accepts(name, fd);
    expect_accepts(name + " once more", fd);
    if (name == "IPv6") {
      act::expect_equal("IPV6_V6ONLY", 1, get(fd, {"IPV6_V6ONLY", IPPROTO_IPV6, IPV6_V6ONLY, -1}));
    }
  }
  MUST(listen(only_bound, 1));
  expect_accepts("bound before, listening after", only_bound);
  return act::finish();
}
