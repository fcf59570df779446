// Unconnected Unix datagram sockets: one bound to a path, one to an abstract name, one to nothing. All send and
// receive afterwards, and can be connected.

#include <sys/socket.h>
#include <sys/un.h>

#include "act.h"

static std::pair<sockaddr_un, socklen_t> address(const std::string& name) {
  sockaddr_un where{};
  where.sun_family = AF_UNIX;
  memcpy(where.sun_path, name.data(), name.size());
  return {where, static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + name.size() + (name[0] == '\0' ? 0 : 1))};
}

static int make() { return MUST(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)); }

static int make_bound(const std::string& name) {
  int fd = make();
  auto [where, bytes] = address(name);
  MUST(bind(fd, reinterpret_cast<sockaddr*>(&where), bytes));
  return fd;
}

static void expect_delivery(const std::string& what, int from, int to, const std::string& name) {
  auto [where, bytes] = address(name);
  ssize_t sent = sendto(from, what.data(), what.size(), 0, reinterpret_cast<sockaddr*>(&where), bytes);
  act::expect_equal(what + ": sent", what.size(), sent);
  act::expect_equal(what + ": received", what, act::read_text(to));
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  std::string abstract_name = std::string(1, '\0') + "vmckpt-act-" + std::to_string(act::random_u64());
  int by_path = make_bound("datagrams"), abstract = make_bound(abstract_name), unbound = make();

  act::intermission();

  expect_delivery("to a path", unbound, by_path, "datagrams");
  expect_delivery("to an abstract name", by_path, abstract, abstract_name);
  expect_delivery("from an abstract name", abstract, by_path, "datagrams");
  act::expect_equal("flags", O_RDWR | O_NONBLOCK, fcntl(by_path, F_GETFL));
  auto [where, bytes] = address(abstract_name);
  MUST(connect(unbound, reinterpret_cast<sockaddr*>(&where), bytes));
  MUST(act::write_text(unbound, "connected afterwards"));
  act::expect_equal("connected afterwards", std::string("connected afterwards"), act::read_text(abstract));
  return act::finish();
}
