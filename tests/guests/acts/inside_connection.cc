// A TCP connection over loopback and a Unix connection, both of whose ends are in the process. They may live on or
// come back closed, but alike at both ends: never a hang, never content that was not sent.

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

  act::intermission();

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
