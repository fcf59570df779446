// UDP sockets on the loopback address: bound, unbound, connected; they send and receive afterwards, from the same port
// and with the same options.

#include <netinet/in.h>
#include <sys/socket.h>

#include "act.h"

static sockaddr_in name_of(int fd) {
  sockaddr_in where{};
  socklen_t bytes = sizeof where;
  MUST(getsockname(fd, reinterpret_cast<sockaddr*>(&where), &bytes));
  return where;
}

static int make() { return MUST(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)); }

static int make_bound() {
  int fd = make();
  sockaddr_in where{};
  where.sin_family = AF_INET;
  where.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  MUST(bind(fd, reinterpret_cast<sockaddr*>(&where), sizeof where));
  return fd;
}

static void send_to(int fd, const sockaddr_in& where, const std::string& text) {
  act::expect_equal("sent", text.size(),
                    sendto(fd, text.data(), text.size(), 0, reinterpret_cast<const sockaddr*>(&where), sizeof where));
}

static int option(int fd, int level, int name) {
  int value = -1;
  socklen_t bytes = sizeof value;
  MUST(getsockopt(fd, level, name, &value, &bytes));
  return value;
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  int bound = make_bound(), unbound = make(), connected = make_bound();
  int one = 1, ttl = 33;
  MUST(setsockopt(bound, SOL_SOCKET, SO_BROADCAST, &one, sizeof one));
  MUST(setsockopt(bound, IPPROTO_IP, IP_TTL, &ttl, sizeof ttl));
  MUST(setsockopt(bound, IPPROTO_IP, IP_PKTINFO, &one, sizeof one));
  sockaddr_in bound_name = name_of(bound), connected_name = name_of(connected);
  MUST(connect(connected, reinterpret_cast<sockaddr*>(&bound_name), sizeof bound_name));

  act::intermission();

  act::expect_equal("port", ntohs(bound_name.sin_port), ntohs(name_of(bound).sin_port));
  act::expect_equal("port of the connected one", ntohs(connected_name.sin_port), ntohs(name_of(connected).sin_port));
  act::expect_equal("SO_BROADCAST", 1, option(bound, SOL_SOCKET, SO_BROADCAST));
  act::expect_equal("IP_TTL", 33, option(bound, IPPROTO_IP, IP_TTL));
  act::expect_equal("IP_PKTINFO", 1, option(bound, IPPROTO_IP, IP_PKTINFO));
  send_to(unbound, bound_name, "from the unbound one");
  act::expect_equal("received", std::string("from the unbound one"), act::read_text(bound));
  act::expect_equal("sent by the connected one", 9, act::write_text(connected, "connected"));
  act::expect_equal("received", std::string("connected"), act::read_text(bound));
  send_to(bound, connected_name, "answer");
  act::expect_equal("answer to the connected one", std::string("answer"), act::read_text(connected));
  return act::finish();
}
