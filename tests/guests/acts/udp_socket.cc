// UDP sockets on the loopback address: bound, unbound, connected; they send and receive afterwards, from the same port
// and with the same options.

#include <netinet/in.h>
#include <netinet/udp.h>
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

  struct Switch {
    const char* name;
    int family, level, number, fd = -1;
  };
  Switch switches[] = {
      {"IP_RECVOPTS", AF_INET, IPPROTO_IP, IP_RECVOPTS},
      {"IP_RETOPTS", AF_INET, IPPROTO_IP, IP_RETOPTS},
      {"IP_CHECKSUM", AF_INET, IPPROTO_IP, IP_CHECKSUM},
      {"IP_MINTTL", AF_INET, IPPROTO_IP, IP_MINTTL},
      {"UDP_CORK", AF_INET, IPPROTO_UDP, UDP_CORK},
      {"IPV6_RECVHOPOPTS", AF_INET6, IPPROTO_IPV6, IPV6_RECVHOPOPTS},
      {"IPV6_RECVRTHDR", AF_INET6, IPPROTO_IPV6, IPV6_RECVRTHDR},
      {"IPV6_RECVDSTOPTS", AF_INET6, IPPROTO_IPV6, IPV6_RECVDSTOPTS},
      {"IPV6_MINHOPCOUNT", AF_INET6, IPPROTO_IPV6, IPV6_MINHOPCOUNT},
  };
  for (Switch& s : switches) {
    s.fd = socket(s.family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (s.fd >= 0) MUST(setsockopt(s.fd, s.level, s.number, &one, sizeof one));
  }
  constexpr int kPassRights = 83;  // SO_PASSRIGHTS, Linux 6.16
  int turned_away[2], none = 0;
  MUST(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, turned_away));
  const bool can_turn_away = setsockopt(turned_away[0], SOL_SOCKET, kPassRights, &none, sizeof none) == 0;

  act::intermission();

  for (const Switch& s : switches) {
    if (s.fd >= 0) act::expect_equal(s.name, 1, option(s.fd, s.level, s.number));
  }
  if (can_turn_away) act::expect_equal("SO_PASSRIGHTS", 0, option(turned_away[0], SOL_SOCKET, kPassRights));

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
