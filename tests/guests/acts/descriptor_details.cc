// Details of pipes, sockets and epoll that a program meets late: how much fits, what has been shut down, what was read by
// half, who shares a port, names with zeros in them, watches that have fired once or watch each other.

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "act.h"

static void set(int fd, int level, int name, int value) { MUST(setsockopt(fd, level, name, &value, sizeof value)); }

static int option(int fd, int level, int name) {
  int value = -1;
  socklen_t bytes = sizeof value;
  getsockopt(fd, level, name, &value, &bytes);
  return value;
}

struct Ends {
  int first, second;
};

static Ends pair_of(int type) {
  int ends[2];
  MUST(socketpair(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends));
  return {ends[0], ends[1]};
}

static Ends pipe_of(int flags) {
  int ends[2];
  MUST(pipe2(ends, O_CLOEXEC | O_NONBLOCK | flags));
  return {ends[0], ends[1]};
}

static int port_of(int fd) {
  sockaddr_in6 address{};
  socklen_t bytes = sizeof address;
  MUST(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &bytes));
  return ntohs(address.sin6_port);
}

static int inet(int family, int type, int port, bool share) {
  int fd = MUST(socket(family, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  set(fd, SOL_SOCKET, SO_REUSEADDR, 1);
  if (share) set(fd, SOL_SOCKET, SO_REUSEPORT, 1);
  if (family == AF_INET6) set(fd, IPPROTO_IPV6, IPV6_V6ONLY, 1);
  sockaddr_in6 address{};
  address.sin6_family = static_cast<sa_family_t>(family);
  address.sin6_port = htons(static_cast<uint16_t>(port));
  if (family == AF_INET) reinterpret_cast<sockaddr_in*>(&address)->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  else address.sin6_addr = in6addr_loopback;
  MUST(bind(fd, reinterpret_cast<sockaddr*>(&address), family == AF_INET ? sizeof(sockaddr_in) : sizeof address));
  if (type == SOCK_STREAM) MUST(listen(fd, 8));
  return fd;
}

static std::string fill(int fd, size_t bytes, uint64_t seed) {
  std::string text(bytes, '\0');
  act::fill(text.data(), bytes / 8 * 8, seed);
  size_t done = 0;
  while (done < bytes) {
    ssize_t put = write(fd, text.data() + done, bytes - done);
    if (put <= 0) break;
    done += static_cast<size_t>(put);
  }
  return text.substr(0, done);
}

static std::string read_all(int fd) {
  std::string all;
  char part[65536];
  for (ssize_t got; (got = read(fd, part, sizeof part)) > 0;) all.append(part, static_cast<size_t>(got));
  return all;
}

static std::vector<uint64_t> ready(int epoll) {
  epoll_event events[16];
  std::vector<uint64_t> found;
  int count = epoll_wait(epoll, events, 16, 0);
  for (int i = 0; i < count; i++) found.push_back(events[i].data.u64 << 32 | events[i].events);
  return found;
}

static void watch(int epoll, int operation, int fd, uint32_t events, uint64_t data) {
  epoll_event event{};
  event.events = events;
  event.data.u64 = data;
  MUST(epoll_ctl(epoll, operation, fd, &event));
}

int main(int argc, char** argv) {
  act::begin(argc, argv);

  Ends small = pipe_of(0), large = pipe_of(0), packets = pipe_of(O_DIRECT);
  MUST(fcntl(small.second, F_SETPIPE_SZ, 4096));
  int large_bytes = MUST(fcntl(large.second, F_SETPIPE_SZ, 262144));
  std::string in_large = fill(large.second, 200000, 1), start = act::read_text(large.first, 1001);
  MUST(act::write_text(packets.second, "one"));
  MUST(act::write_text(packets.second, "two"));
  act::read_text(packets.first, 1);  // drops the rest of the packet
  MUST(act::write_text(packets.second, "three"));

  Ends stream = pair_of(SOCK_STREAM), record = pair_of(SOCK_SEQPACKET), datagram = pair_of(SOCK_DGRAM);
  std::string in_stream = fill(stream.first, 100000, 2);
  MUST(shutdown(stream.first, SHUT_WR));
  for (const char* text : {"first", "", "third"}) {
    MUST(send(record.first, text, strlen(text), 0));
    MUST(send(datagram.first, text, strlen(text), 0));
  }
  MUST(shutdown(record.second, SHUT_WR));
  MUST(shutdown(datagram.first, SHUT_RD));
  set(record.second, SOL_SOCKET, SO_PASSCRED, 1);
  timeval timeout{3, 500000};
  MUST(setsockopt(stream.second, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout));

  sockaddr_un abstract{};
  abstract.sun_family = AF_UNIX;
  std::string name = std::string("\0vmckpt\0act", 11) + std::to_string(act::random_u64());
  memcpy(abstract.sun_path, name.data(), name.size());
  socklen_t abstract_bytes = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + name.size());
  int listener = MUST(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  MUST(bind(listener, reinterpret_cast<sockaddr*>(&abstract), abstract_bytes));
  MUST(listen(listener, 2));

  int udp_one = inet(AF_INET, SOCK_DGRAM, 0, true), udp_two = inet(AF_INET, SOCK_DGRAM, port_of(udp_one), true);
  int tcp_one = inet(AF_INET, SOCK_STREAM, 0, true), tcp_two = inet(AF_INET, SOCK_STREAM, port_of(tcp_one), true);
  int six = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in6 loopback6{};
  loopback6.sin6_family = AF_INET6;
  loopback6.sin6_addr = in6addr_loopback;
  bool has_six = six >= 0 && bind(six, reinterpret_cast<sockaddr*>(&loopback6), sizeof loopback6) == 0;
  close(six);
  int six_listener = has_six ? inet(AF_INET6, SOCK_STREAM, 0, false) : -1;
  int four_same_port = has_six ? inet(AF_INET, SOCK_STREAM, port_of(six_listener), false) : -1;

  int plain = inet(AF_INET, SOCK_STREAM, 0, false);
  int client = MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in to{};
  socklen_t to_bytes = sizeof to;
  MUST(getsockname(plain, reinterpret_cast<sockaddr*>(&to), &to_bytes));
  MUST(connect(client, reinterpret_cast<sockaddr*>(&to), to_bytes));
  pollfd waiting{plain, POLLIN, 0};
  MUST(poll(&waiting, 1, 5000));
  int accepted = MUST(accept4(plain, nullptr, nullptr, SOCK_NONBLOCK));
  set(client, IPPROTO_TCP, TCP_NODELAY, 1);
  set(client, SOL_SOCKET, SO_KEEPALIVE, 1);
  set(client, IPPROTO_TCP, TCP_KEEPIDLE, 77);
  set(client, IPPROTO_IP, IP_TOS, 0x10);
  linger hold{1, 7};
  MUST(setsockopt(client, SOL_SOCKET, SO_LINGER, &hold, sizeof hold));
  set(accepted, SOL_SOCKET, SO_RCVLOWAT, 5);
  set(accepted, IPPROTO_TCP, TCP_USER_TIMEOUT, 12345);

  Ends watched = pipe_of(0), other = pipe_of(0);
  int inner = MUST(epoll_create1(EPOLL_CLOEXEC)), outer = MUST(epoll_create1(EPOLL_CLOEXEC));
  watch(inner, EPOLL_CTL_ADD, watched.first, EPOLLIN | EPOLLONESHOT, 11);
  watch(inner, EPOLL_CTL_ADD, other.first, EPOLLIN | EPOLLEXCLUSIVE, 12);
  watch(inner, EPOLL_CTL_ADD, watched.second, EPOLLOUT | EPOLLONESHOT, 13);
  watch(outer, EPOLL_CTL_ADD, inner, EPOLLIN, 21);
  MUST(act::write_text(watched.second, "x"));
  act::expect_equal("both have fired", static_cast<size_t>(2), ready(inner).size());

  act::intermission();

  act::expect_equal("small capacity", 4096, fcntl(small.first, F_GETPIPE_SZ));
  act::expect_equal("it takes a page", static_cast<size_t>(4096), fill(small.second, 8000, 3).size());
  act::expect_equal("large capacity", large_bytes, fcntl(large.first, F_GETPIPE_SZ));
  act::expect("the rest of the large pipe", start + read_all(large.first) == in_large);
  act::expect_equal("packet", std::string("two"), act::read_text(packets.first));
  act::expect_equal("next packet", std::string("three"), act::read_text(packets.first));

  act::expect("the stream", read_all(stream.second) == in_stream);
  act::expect_equal("its end", std::string(), act::read_text(stream.second));
  act::expect_errno("no more writing", EPIPE, send(stream.first, "x", 1, MSG_NOSIGNAL));
  act::expect_equal("writing the other way", static_cast<ssize_t>(1), send(stream.second, "y", 1, MSG_NOSIGNAL));
  timeval got{};
  socklen_t got_bytes = sizeof got;
  MUST(getsockopt(stream.second, SOL_SOCKET, SO_RCVTIMEO, &got, &got_bytes));
  act::expect_equal("timeout", 3500000, got.tv_sec * 1000000 + got.tv_usec);
  for (int fd : {record.second, datagram.second}) {
    for (const char* text : {"first", "", "third"}) {
      char part[16];
      ssize_t bytes = recv(fd, part, sizeof part, 0);
      act::expect_equal("message", std::string(text), bytes < 0 ? "(none)" : std::string(part, static_cast<size_t>(bytes)));
    }
  }
  act::expect_equal("records end", std::string(), act::read_text(record.first));
  act::expect_errno("records cannot be written", EPIPE, send(record.second, "x", 1, MSG_NOSIGNAL));
  act::expect_equal("credentials", 1, option(record.second, SOL_SOCKET, SO_PASSCRED));
  act::expect_equal("datagrams go on", static_cast<ssize_t>(1), send(datagram.first, "x", 1, MSG_NOSIGNAL));
  act::expect_errno("datagrams do not come back", EPIPE, send(datagram.second, "x", 1, MSG_NOSIGNAL));

  int clients = 0;
  for (; clients < 10; clients++) {
    int fd = MUST(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (connect(fd, reinterpret_cast<sockaddr*>(&abstract), abstract_bytes) != 0) break;
  }
  act::expect_equal("the listener's queue", 3, clients);

  act::expect_equal("one port of two UDP sockets", port_of(udp_one), port_of(udp_two));
  act::expect_equal("one port of two listeners", port_of(tcp_one), port_of(tcp_two));
  act::expect_equal("shared", 1, option(tcp_two, SOL_SOCKET, SO_REUSEPORT));
  if (has_six) {
    act::expect_equal("one port for both families", port_of(six_listener), port_of(four_same_port));
    act::expect_equal("IPv6 only", 1, option(six_listener, IPPROTO_IPV6, IPV6_V6ONLY));
  }
  act::expect_equal("TCP_NODELAY", 1, option(client, IPPROTO_TCP, TCP_NODELAY));
  act::expect_equal("SO_KEEPALIVE", 1, option(client, SOL_SOCKET, SO_KEEPALIVE));
  act::expect_equal("TCP_KEEPIDLE", 77, option(client, IPPROTO_TCP, TCP_KEEPIDLE));
  act::expect_equal("IP_TOS", 0x10, option(client, IPPROTO_IP, IP_TOS));
  linger held{};
  socklen_t held_bytes = sizeof held;
  MUST(getsockopt(client, SOL_SOCKET, SO_LINGER, &held, &held_bytes));
  act::expect("SO_LINGER", held.l_onoff == 1 && held.l_linger == 7);
  act::expect_equal("SO_RCVLOWAT", 5, option(accepted, SOL_SOCKET, SO_RCVLOWAT));
  act::expect_equal("TCP_USER_TIMEOUT", 12345, option(accepted, IPPROTO_TCP, TCP_USER_TIMEOUT));

  act::expect_equal("what has fired is quiet", static_cast<size_t>(0), ready(inner).size());
  act::expect_equal("outside, too", static_cast<size_t>(0), ready(outer).size());
  MUST(act::write_text(other.second, "y"));
  act::expect_equal("the outer one sees the inner one", uint64_t{21} << 32 | EPOLLIN, ready(outer).at(0));
  act::expect_equal("the exclusive one", uint64_t{12} << 32 | EPOLLIN, ready(inner).at(0));
  watch(inner, EPOLL_CTL_MOD, watched.first, EPOLLIN | EPOLLONESHOT, 14);
  act::expect_equal("armed again", static_cast<size_t>(2), ready(inner).size());
  return act::finish();
}
