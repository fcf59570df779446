// TCP connections over loopback, also between an IPv4 and an IPv6 socket, and a Unix connection, both of whose ends are in the
// process. They may live on or come back closed, but alike at both ends: never a hang, never content that was not sent.

#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "act.h"

struct Connection {
  std::string name;
  int client, server;
};

static Connection connect_over(const std::string& name, int family, sockaddr* address, socklen_t bytes) {
  int listener = MUST(socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  MUST(bind(listener, address, bytes));
  MUST(listen(listener, 1));
  MUST(getsockname(listener, address, &bytes));
  int client = MUST(socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  MUST(connect(client, address, bytes));
  int server = MUST(accept(listener, nullptr, nullptr));
  close(listener);
  return {name, client, server};
}

// What one end reads within a second: text, "" for the end of the connection, "(error)".
static std::string receive(int fd) {
  pollfd ready{fd, POLLIN, 0};
  if (poll(&ready, 1, 1000) != 1) return "(hang)";
  return act::read_text(fd);
}

static bool closed(const std::string& got) { return got.empty() || got == "(Connection reset by peer)"; }

// An IPv6 socket that takes IPv4 clients too; -1 where there is no IPv6.
static int listen_for_both() {
  int listener = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0), off = 0, on = 1;
  if (listener < 0) return -1;
  MUST(setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on));
  MUST(setsockopt(listener, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off));
  sockaddr_in6 any{};
  any.sin6_family = AF_INET6;
  if (bind(listener, reinterpret_cast<sockaddr*>(&any), sizeof any) != 0) return -1;
  MUST(listen(listener, 1));
  return listener;
}

static in_port_t port_of(int fd) {
  sockaddr_in6 address{};
  socklen_t bytes = sizeof address;
  MUST(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &bytes));
  return address.sin6_port;
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  sockaddr_in tcp{};
  tcp.sin_family = AF_INET;
  tcp.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  sockaddr_un local{};
  local.sun_family = AF_UNIX;
  strcpy(local.sun_path, "connection");
  Connection connections[] = {
      connect_over("TCP", AF_INET, reinterpret_cast<sockaddr*>(&tcp), sizeof tcp),
      connect_over("Unix", AF_UNIX, reinterpret_cast<sockaddr*>(&local), sizeof local),
  };
  for (const Connection& c : connections) MUST(act::write_text(c.client, "on its way"));
  const int both = listen_for_both();
  int old_client = -1, old_server = -1;
  if (both >= 0) {
    tcp.sin_port = port_of(both);
    old_client = MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    MUST(connect(old_client, reinterpret_cast<sockaddr*>(&tcp), sizeof tcp));
    old_server = MUST(accept(both, nullptr, nullptr));
  }

  act::intermission();

  if (both >= 0) {
    sockaddr_in6 peer{};
    socklen_t bytes = sizeof peer;
    MUST(getpeername(old_server, reinterpret_cast<sockaddr*>(&peer), &bytes));
    act::expect_equal("family of an IPv6 socket with an IPv4 client", AF_INET6, peer.sin6_family);
    act::expect("its client's address", IN6_IS_ADDR_V4MAPPED(&peer.sin6_addr));
    bytes = sizeof peer;
    MUST(getpeername(old_client, reinterpret_cast<sockaddr*>(&peer), &bytes));
    act::expect_equal("family of the client", AF_INET, peer.sin6_family);
    MUST(act::write_text(old_client, "across"));
    act::expect_equal("content across families", std::string("across"), receive(old_server));
  }

  for (const Connection& c : connections) {
    std::string got = receive(c.server);
    if (got == "on its way") {
      MUST(act::write_text(c.server, "back"));
      act::expect_equal(c.name + ": answer", std::string("back"), receive(c.client));
    } else if (closed(got)) {
      got = receive(c.client);
      act::expect_equal(c.name + ": the other end is closed too", true, closed(got));
      act::expect(c.name + ": writing fails", send(c.client, "x", 1, MSG_NOSIGNAL) < 0);
    } else {
      act::fail(c.name + ": server's end", "content or a closed connection", got);
    }
  }
  return act::finish();
}
