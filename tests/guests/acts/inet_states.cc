// TCP and UDP beyond listening and being connected: shut down one way, not accepted yet, still connecting, bound to an
// address that the host does not have, a port with a connection in TIME_WAIT, options that act on routing and buffers,
// multicast groups.

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include "act.h"

static sockaddr_in address_of(const char* host, int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  inet_pton(AF_INET, host, &address.sin_addr);
  return address;
}

static int bind_to(int fd, const char* host, int port) {
  sockaddr_in address = address_of(host, port);
  return bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address);
}

static int connect_to(int fd, const char* host, int port) {
  sockaddr_in address = address_of(host, port);
  return connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address);
}

static int port_of(int fd) {
  sockaddr_in address{};
  socklen_t bytes = sizeof address;
  MUST(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &bytes));
  return ntohs(address.sin_port);
}

static std::string name_of(int fd) {
  sockaddr_in address{};
  socklen_t bytes = sizeof address;
  MUST(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &bytes));
  return std::string(inet_ntoa(address.sin_addr)) + ":" + std::to_string(ntohs(address.sin_port));
}

static int tcp(int flags = SOCK_NONBLOCK) { return MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | flags, 0)); }
static int udp() { return MUST(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)); }

static int option(int fd, int level, int name) {
  int value = -1;
  socklen_t bytes = sizeof value;
  getsockopt(fd, level, name, &value, &bytes);
  return value;
}

static void set(int fd, int level, int name, int value) { MUST(setsockopt(fd, level, name, &value, sizeof value)); }

// Root can take a port from connections that linger; others would have to wait.
static bool shares_ports() { return geteuid() != 0 && act::args.empty(); }

static int tcp_listener(int backlog = 8) {
  int fd = tcp();
  if (shares_ports()) set(fd, SOL_SOCKET, SO_REUSEADDR, 1);
  MUST(bind_to(fd, "127.0.0.1", 0));
  MUST(listen(fd, backlog));
  return fd;
}

static int tcp_client(int listener) {
  int fd = tcp(0);
  MUST(connect_to(fd, "127.0.0.1", port_of(listener)));
  MUST(fcntl(fd, F_SETFL, O_NONBLOCK));
  return fd;
}

static int accept_now(int listener) {
  pollfd ready{listener, POLLIN, 0};
  poll(&ready, 1, 5000);
  return accept4(listener, nullptr, nullptr, SOCK_NONBLOCK);
}

static std::string read_soon(int fd) {
  pollfd ready{fd, POLLIN, 0};
  poll(&ready, 1, 5000);
  return act::read_text(fd);
}

constexpr int kSoBufLock = 72;

int main(int argc, char** argv) {
  act::begin(argc, argv);

  int udp_peer = udp();
  MUST(bind_to(udp_peer, "127.0.0.1", 0));
  int mute = udp(), deaf = udp();
  for (int fd : {mute, deaf}) MUST(connect_to(fd, "127.0.0.1", port_of(udp_peer)));
  MUST(shutdown(mute, SHUT_WR));
  MUST(shutdown(deaf, SHUT_RD));

  int server = tcp_listener();
  int reader_gone = tcp_client(server), reader_gone_peer = MUST(accept_now(server));
  MUST(shutdown(reader_gone, SHUT_RD));
  int never = tcp();
  shutdown(never, SHUT_RD);

  int waiting = tcp_client(server), waiting_done = tcp_client(server);
  MUST(shutdown(waiting_done, SHUT_WR));

  // The queue of this listener is full, so that the last client stays between SYN and connection.
  int full = tcp_listener(0);
  int fills = tcp_client(full);
  int connecting = tcp();
  connect_to(connecting, "127.0.0.1", port_of(full));
  tcp_info info{};
  socklen_t info_bytes = sizeof info;
  MUST(getsockopt(connecting, IPPROTO_TCP, TCP_INFO, &info, &info_bytes));
  bool was_connecting = info.tcpi_state == TCP_SYN_SENT;

  // The program ends this connection first, so that its port lingers.
  int lingering = tcp_listener();
  int short_lived = tcp_client(lingering), short_lived_peer = MUST(accept_now(lingering));
  close(short_lived_peer);
  read_soon(short_lived);

  int foreign = tcp();
  set(foreign, IPPROTO_IP, IP_FREEBIND, 1);
  MUST(bind_to(foreign, "198.51.100.7", 0));
  set(foreign, IPPROTO_IP, IP_FREEBIND, 0);
  MUST(listen(foreign, 3));
  std::string foreign_name = name_of(foreign);

  set(foreign, SOL_SOCKET, SO_DONTROUTE, 1);
  int locked = udp();
  bool has_lock = option(locked, SOL_SOCKET, kSoBufLock) >= 0;
  int tcp_locked = tcp(), tcp_unlocked = tcp_listener();
  if (has_lock) {
    set(locked, SOL_SOCKET, SO_SNDBUF, option(locked, SOL_SOCKET, SO_SNDBUF) / 2);
    set(tcp_locked, SOL_SOCKET, SO_RCVBUF, 50000);
    set(tcp_locked, SOL_SOCKET, kSoBufLock, 1);
  }

  int member = udp();
  ip_mreqn any_source{};
  inet_pton(AF_INET, "239.1.2.3", &any_source.imr_multiaddr);
  inet_pton(AF_INET, "127.0.0.1", &any_source.imr_address);
  MUST(setsockopt(member, IPPROTO_IP, IP_ADD_MEMBERSHIP, &any_source, sizeof any_source));
  ip_mreq_source one_source{};
  inet_pton(AF_INET, "239.1.2.4", &one_source.imr_multiaddr);
  inet_pton(AF_INET, "127.0.0.1", &one_source.imr_interface);
  inet_pton(AF_INET, "127.0.0.5", &one_source.imr_sourceaddr);
  MUST(setsockopt(member, IPPROTO_IP, IP_ADD_SOURCE_MEMBERSHIP, &one_source, sizeof one_source));
  int no_member = udp();

  int raw = socket(AF_INET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 253);
  int raw_peer = raw < 0 ? -1 : MUST(socket(AF_INET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 253));
  if (raw >= 0) {
    MUST(bind_to(raw, "127.0.0.3", 0));
    MUST(connect_to(raw_peer, "127.0.0.3", 0));
    set(raw_peer, IPPROTO_IP, IP_TTL, 33);
  }

  act::intermission();

  act::expect_errno("the mute one sends", EPIPE, send(mute, "x", 1, MSG_NOSIGNAL));
  act::expect_equal("the deaf one sends", static_cast<ssize_t>(1), send(deaf, "x", 1, MSG_NOSIGNAL));
  act::expect_equal("it arrives", std::string("x"), read_soon(udp_peer));
  pollfd end{deaf, POLLRDHUP, 0};
  act::expect_equal("the deaf one is at its end", 1, poll(&end, 1, 0));
  act::expect_errno("the mute one reads on", EAGAIN, recv(mute, nullptr, 0, 0));

  act::expect_equal("after SHUT_RD", std::string(), act::read_text(reader_gone));
  act::write_text(reader_gone, "speaks");
  act::expect_equal("its peer", std::string("speaks"), read_soon(reader_gone_peer));
  act::expect_equal("its peer can write", static_cast<ssize_t>(1), send(reader_gone_peer, "x", 1, MSG_NOSIGNAL));
  act::expect_errno("never connected", ENOTCONN, shutdown(never, SHUT_WR));
  act::expect_equal("connects at last", 0,
                    connect_to(never, "127.0.0.1", port_of(server)) == 0 || errno == EINPROGRESS ? 0 : errno);

  int accepted = accept_now(server), accepted_done = accept_now(server);
  act::expect("two were waiting", accepted >= 0 && accepted_done >= 0);
  act::write_text(waiting, "still here");
  act::expect_equal("the first speaks", std::string("still here"), read_soon(accepted));
  act::expect_equal("the second has finished", std::string(), read_soon(accepted_done));
  act::write_text(accepted_done, "but reads");
  act::expect_equal("the second reads", std::string("but reads"), read_soon(waiting_done));

  if (was_connecting) {
    int one = accept_now(full), two = accept_now(full);
    act::expect("the connecting one arrives", one >= 0 && two >= 0);
    pollfd done{connecting, POLLOUT, 0};
    act::expect_equal("connected", 1, poll(&done, 1, 10000));
    act::expect_equal("without an error", 0, option(connecting, SOL_SOCKET, SO_ERROR));
    act::write_text(connecting, "hello");
    act::expect_equal("passes data", std::string("hello"), read_soon(two));
  }
  act::expect("the one before is connected", option(fills, SOL_SOCKET, SO_ERROR) == 0);

  int visitor = tcp_client(lingering);
  act::expect("the port that lingered", accept_now(lingering) >= 0);
  act::expect_equal("SO_REUSEADDR", shares_ports() ? 1 : 0, option(lingering, SOL_SOCKET, SO_REUSEADDR));
  close(visitor);
  act::expect_equal("an address of elsewhere", foreign_name, name_of(foreign));
  act::expect_equal("IP_FREEBIND", 0, option(foreign, IPPROTO_IP, IP_FREEBIND));
  act::expect_equal("SO_DONTROUTE", 1, option(foreign, SOL_SOCKET, SO_DONTROUTE));
  if (has_lock) {
    act::expect_equal("locked", 1, option(locked, SOL_SOCKET, kSoBufLock));
    act::expect_equal("locked otherwise", 1, option(tcp_locked, SOL_SOCKET, kSoBufLock));
    act::expect_equal("not locked", 0, option(tcp_unlocked, SOL_SOCKET, kSoBufLock));
    act::expect_equal("of a connection", 0, option(accepted, SOL_SOCKET, kSoBufLock));
  }
  act::expect_errno("is a member", EADDRINUSE, setsockopt(member, IPPROTO_IP, IP_ADD_MEMBERSHIP, &any_source, sizeof any_source));
  act::expect_errno("is a member for one source", EADDRNOTAVAIL,
                    setsockopt(member, IPPROTO_IP, IP_ADD_SOURCE_MEMBERSHIP, &one_source, sizeof one_source));
  act::expect_errno("another is none", EADDRNOTAVAIL,
                    setsockopt(no_member, IPPROTO_IP, IP_DROP_MEMBERSHIP, &any_source, sizeof any_source));
  act::expect_equal("leaves", 0, setsockopt(member, IPPROTO_IP, IP_DROP_MEMBERSHIP, &any_source, sizeof any_source));
  if (raw >= 0) {
    act::expect_equal("sends raw", static_cast<ssize_t>(3), send(raw_peer, "raw", 3, 0));
    std::string packet = read_soon(raw);
    act::expect_equal("receives raw", std::string("raw"), packet.size() > 20 ? packet.substr(20) : packet);
    act::expect_equal("time to live", 33, packet.size() > 20 ? packet[8] : -1);
  }
  return act::finish();
}
