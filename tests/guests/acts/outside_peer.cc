// A stream connection to a peer outside the process: "tcp PORT" or "unix PATH" names an echo server. Resumed, it lives
// on; restarted, it must look like a connection that was closed (end of file or an error, never a hang), also to
// poll and epoll. Says ALIVE or CLOSED, which the test compares with its variant; anything else fails.

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "act.h"

static int connect_to_peer(const std::string& kind, const std::string& where) {
  if (kind == "tcp") {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(std::stoi(where)));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    MUST(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address));
    return fd;
  }
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  where.copy(address.sun_path, sizeof address.sun_path - 1);
  int fd = MUST(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  MUST(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address));
  return fd;
}

static void write_all(int fd, const std::string& text) { MUST(act::write_text(fd, text)); }

// "ALIVE" when the peer echoes, "CLOSED" when the connection is over, else what was seen.
static std::string state_of(int fd) {
  ssize_t sent = send(fd, "ping", 4, MSG_NOSIGNAL);
  if (sent < 0 && (errno == EPIPE || errno == ECONNRESET || errno == ENOTCONN)) return "CLOSED";
  pollfd ready{fd, POLLIN, 0};
  if (poll(&ready, 1, 3000) != 1) return "a hang";
  char buffer[16];
  ssize_t got = recv(fd, buffer, sizeof buffer, 0);
  if (got == 0) return "CLOSED";
  if (got < 0) return errno == ECONNRESET || errno == ENOTCONN ? "CLOSED" : strerror(errno);
  return std::string(buffer, static_cast<size_t>(got)) == "ping" ? "ALIVE" : "an odd answer";
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  if (act::args.size() < 2) act::skip("arguments: tcp PORT or unix PATH");
  int first = connect_to_peer(act::args[0], act::args[1]), second = connect_to_peer(act::args[0], act::args[1]);
  write_all(first, "hello");
  act::expect_equal("echo before", std::string("hello"), act::read_text(first));
  int epoll = MUST(epoll_create1(0));
  epoll_event event{};
  event.events = EPOLLIN | EPOLLRDHUP;
  event.data.u64 = 5;
  MUST(epoll_ctl(epoll, EPOLL_CTL_ADD, second, &event));

  act::intermission();

  std::string state = state_of(first);
  if (state != "ALIVE" && state != "CLOSED") act::fail("connection", "ALIVE or CLOSED", state);
  int events = epoll_wait(epoll, &event, 1, state == "CLOSED" ? 3000 : 0);
  act::expect_equal("epoll reports the closed connection", state == "CLOSED" ? 1 : 0, events);
  act::expect_equal("state of the second connection", state, state_of(second));
  int fresh = connect_to_peer(act::args[0], act::args[1]);
  act::expect_equal("a new connection", std::string("ALIVE"), state_of(fresh));
  std::puts(state.c_str());
  return act::finish();
}
