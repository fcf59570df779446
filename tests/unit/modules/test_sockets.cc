// Sockets: saved in one process, restored in another.
#include "catch.h"

#include <algorithm>

#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "modules/descriptor_round_trip.h"
#include "modules/netlink_diag.h"
#include "modules/netlink_socket.pb.h"

using namespace vmckpt;
using namespace vmckpt::test;

namespace {

struct UnixAddress {
  sockaddr_un address{};
  socklen_t bytes;
  // "@name" is abstract.
  explicit UnixAddress(const std::string& name)
      : bytes(static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + name.size())) {
    address.sun_family = AF_UNIX;
    name.copy(address.sun_path, sizeof address.sun_path);
    if (name[0] == '@') address.sun_path[0] = '\0';
    else ++bytes;
  }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&address); }
};

int unix_server(int type, const std::string& name, int backlog = 5) {
  UnixAddress address(name);
  int fd = ::socket(AF_UNIX, type, 0);
  EXPECT(::bind(fd, address.get(), address.bytes) == 0);
  if (type != SOCK_DGRAM) EXPECT(::listen(fd, backlog) == 0);
  return fd;
}

int unix_client(int type, const std::string& name) {
  UnixAddress address(name);
  int fd = ::socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
  EXPECT(::connect(fd, address.get(), address.bytes) == 0);
  return fd;
}

std::string unix_name(int fd, int (*ask)(int, sockaddr*, socklen_t*)) {
  sockaddr_un address{};
  socklen_t bytes = sizeof address;
  EXPECT(ask(fd, reinterpret_cast<sockaddr*>(&address), &bytes) == 0);
  if (bytes <= sizeof(sa_family_t)) return {};
  return address.sun_path[0] == '\0' ? "@" + std::string(address.sun_path + 1, bytes - sizeof(sa_family_t) - 1)
                                     : address.sun_path;
}
int ask_own(int fd, sockaddr* address, socklen_t* bytes) { return ::getsockname(fd, address, bytes); }
int ask_peer(int fd, sockaddr* address, socklen_t* bytes) { return ::getpeername(fd, address, bytes); }

sockaddr_in loopback(unsigned port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(port));
  return address;
}

unsigned port_of_fd(int fd) {
  sockaddr_storage address{};
  socklen_t bytes = sizeof address;
  EXPECT(::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &bytes) == 0);
  return ntohs(reinterpret_cast<sockaddr_in&>(address).sin_port);
}

int tcp_server(unsigned port = 0) {
  int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = loopback(port);
  EXPECT(::bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
  EXPECT(::listen(fd, 9) == 0);
  return fd;
}

int tcp_client(unsigned port) {
  int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = loopback(port);
  EXPECT(::connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
  return fd;
}

int option(int fd, int level, int name) {
  int value = -1;
  socklen_t bytes = sizeof value;
  EXPECT(::getsockopt(fd, level, name, &value, &bytes) == 0);
  return value;
}

void set(int fd, int level, int name, int value) { EXPECT(::setsockopt(fd, level, name, &value, sizeof value) == 0); }

void no_sigpipe() { ::signal(SIGPIPE, SIG_IGN); }

void send_descriptor(int over, int fd) {
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  char byte = 'x';
  iovec part{&byte, 1};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof control;
  cmsghdr* rights = CMSG_FIRSTHDR(&header);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(sizeof fd);
  std::memcpy(CMSG_DATA(rights), &fd, sizeof fd);
  EXPECT(::sendmsg(over, &header, 0) == 1);
}

}  // namespace

TEST_CASE("listening Unix sockets listen again under their path or abstract name, with the path's permissions") {
  TemporaryFolder folder;
  std::string path = folder / "server", abstract = fmt::format("@vmckpt-test-{}", ::getpid());
  RoundTrip trip([&] {
    put_at(unix_server(SOCK_STREAM, path, 7), 4);
    EXPECT(::chmod(path.c_str(), 0640) == 0);
    put_at(unix_server(SOCK_SEQPACKET, abstract), 5);
    ::fcntl(4, F_SETFL, O_NONBLOCK);
  });
  REQUIRE(message_of(trip.save()) == "");
  CHECK(trip.notes.empty());
  std::vector<Error> problems = trip.check();
  REQUIRE(problems.size() == 2);  // the program still runs
  CHECK(problems[0].message().find(path) != std::string::npos);
  CHECK(problems[0].message().find("in use by another process") != std::string::npos);
  CHECK(problems[1].message().find(abstract.substr(1)) != std::string::npos);
  trip.kill_target();
  CHECK(trip.check().empty());
  CHECK(trip.restore([&] {
    struct stat status;
    EXPECT(::stat(path.c_str(), &status) == 0 && (status.st_mode & 0777) == 0640);
    EXPECT((::fcntl(4, F_GETFL) & O_NONBLOCK) != 0);
    int client = unix_client(SOCK_STREAM, path);
    int accepted = ::accept(4, nullptr, nullptr);
    write_all(client, "hello");
    EXPECT(read_now(accepted) == "hello");
    int packets = unix_client(SOCK_SEQPACKET, abstract);
    EXPECT(packets >= 0);
  }) == "");
}

TEST_CASE("a socket bound by a relative path is bound again in the folder that the recorder has noted") {
  TemporaryFolder folder;
  RoundTrip trip([&] {
    EXPECT(::chdir((folder / "").c_str()) == 0);
    put_at(unix_server(SOCK_STREAM, "relative"), 4);
    EXPECT(::chdir("/") == 0);
  });
  LedgerNote& note = trip.ledger->notes[0];
  note.kind = NoteKind::kUnixBind;
  note.fd = 4;
  std::snprintf(note.text, sizeof note.text, "%s", (folder / "relative").c_str());
  trip.ledger->notes_used = 1;
  REQUIRE(message_of(trip.save()) == "");
  trip.kill_target();
  CHECK(trip.check().empty());
  CHECK(trip.restore([&] {
    EXPECT(unix_name(4, ask_own) == "relative");
    EXPECT(unix_client(SOCK_STREAM, folder / "relative") >= 0);
  }) == "");
}

TEST_CASE("socket pairs inside the process keep unread data and message boundaries, and saving takes nothing out") {
  std::string large(100'000, 'z');
  RoundTrip trip([&] {
    int number = 10;
    for (int type : {SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET}) {
      int ends[2];
      EXPECT(::socketpair(AF_UNIX, type, 0, ends) == 0);
      put_at(ends[0], number);
      put_at(ends[1], number + 1);
      number += 2;
    }
    write_all(10, "to eleven ");
    write_all(10, large);
    write_all(11, "to ten");
    for (int fd : {12, 14}) {
      write_all(fd, "one");
      write_all(fd, "");
      write_all(fd, "three");
    }
    set(13, SOL_SOCKET, SO_PEEK_OFF, 2);
    set(11, SOL_SOCKET, SO_SNDBUF, 50'000);
    set(11, SOL_SOCKET, SO_PASSCRED, 1);
    ::fcntl(15, F_SETFL, O_NONBLOCK);
  });
  REQUIRE(message_of(trip.save()) == "");
  CHECK(trip.notes.empty());
  CHECK(trip.restore([&] {
    std::string got;
    while (got.size() < large.size() + 10) got += read_now(11);
    EXPECT(got == "to eleven " + large);
    EXPECT(read_now(10) == "to ten");
    char buffer[16];
    EXPECT(option(13, SOL_SOCKET, SO_PEEK_OFF) == 2);
    EXPECT(::recv(13, buffer, sizeof buffer, MSG_PEEK) == 1 && buffer[0] == 'e');
    for (int fd : {13, 15}) {
      EXPECT(read_now(fd) == "one");
      EXPECT(read_now(fd).empty());
      EXPECT(read_now(fd) == "three");
    }
    EXPECT(read_now(15) == "error EAGAIN");
    EXPECT(option(11, SOL_SOCKET, SO_SNDBUF) == 100'000);
    EXPECT(option(11, SOL_SOCKET, SO_PASSCRED) == 1);
    write_all(13, "back");
    EXPECT(read_now(12) == "back");
  }) == "");
}

TEST_CASE("saving takes no message out of a queue, so that the next checkpoint finds them all") {
  RoundTrip trip([] {
    int ends[2];
    EXPECT(::socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends) == 0);
    write_all(ends[0], "one");
    write_all(ends[0], "two");
  });
  REQUIRE(message_of(trip.save()) == "");
  std::string first = comparable(trip.saved);
  REQUIRE(message_of(trip.save()) == "");
  CHECK(comparable(trip.saved) == first);
  CHECK(trip.restore([] {
    EXPECT(read_now(4) == "one");
    EXPECT(read_now(4) == "two");
  }) == "");
}

TEST_CASE("half-closed pairs and pairs whose other end has gone stay so, unread data first") {
  RoundTrip trip([&] {
    no_sigpipe();
    int ends[2];
    EXPECT(::socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    put_at(ends[0], 10);
    put_at(ends[1], 11);
    write_all(10, "last words");
    EXPECT(::shutdown(10, SHUT_WR) == 0);
    EXPECT(::socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    put_at(ends[0], 12);
    write_all(ends[1], "testament");
    ::close(ends[1]);
  });
  REQUIRE(message_of(trip.save()) == "");
  CHECK(trip.notes.empty());
  CHECK(trip.restore([&] {
    no_sigpipe();
    EXPECT(read_now(11) == "last words");
    EXPECT(read_now(11).empty());
    EXPECT(::write(10, "x", 1) == -1 && errno == EPIPE);
    write_all(11, "answer");
    EXPECT(read_now(10) == "answer");
    EXPECT(read_now(12) == "testament");
    EXPECT(read_now(12).empty());
    EXPECT(::write(12, "x", 1) == -1 && errno == EPIPE);
  }) == "");
}

TEST_CASE("connections between a listener and clients of the same process keep their names, accepted or not") {
  TemporaryFolder folder;
  std::string path = folder / "server";
  RoundTrip trip([&] {
    put_at(unix_server(SOCK_STREAM, path, 1), 4);
    put_at(unix_client(SOCK_STREAM, path), 5);
    put_at(::accept(4, nullptr, nullptr), 6);
    write_all(5, "request");
    put_at(unix_client(SOCK_STREAM, path), 8);  // two wait to be accepted, in this order
    put_at(unix_client(SOCK_STREAM, path), 7);
  });
  REQUIRE(message_of(trip.save()) == "");
  CHECK(trip.notes.empty());
  trip.kill_target();
  CHECK(trip.check().empty());
  CHECK(trip.restore([&] {
    EXPECT(unix_name(5, ask_peer) == path);
    EXPECT(unix_name(6, ask_own) == path);
    EXPECT(read_now(6) == "request");
    int first = ::accept(4, nullptr, nullptr);
    write_all(8, "eight");
    EXPECT(read_now(first) == "eight");
    int second = ::accept(4, nullptr, nullptr);
    write_all(7, "seven");
    EXPECT(read_now(second) == "seven");
  }) == "");
}

TEST_CASE("a Unix connection to another process comes back closed, after what had not been read, with a note") {
  TemporaryFolder folder;
  std::string path = folder / "outside";
  Fd server(unix_server(SOCK_STREAM, path));
  RoundTrip trip([&] { put_at(unix_client(SOCK_STREAM, path), 5); });
  Fd accepted(::accept4(server.get(), nullptr, nullptr, SOCK_CLOEXEC));
  write_all(accepted.get(), "unread");
  REQUIRE(message_of(trip.save()) == "");
  CHECK(mentions(trip.notes, "descriptor 5"));
  CHECK(mentions(trip.notes, path));
  trip.compare_generations = false;
  CHECK(trip.restore([&] {
    no_sigpipe();
    EXPECT(read_now(5) == "unread");
    EXPECT(read_now(5).empty());
    EXPECT(::write(5, "x", 1) == -1 && errno == EPIPE);
  }) == "");
  CHECK(poll_now(accepted.get(), POLLIN) == 0);  // the running program's connection was left alone
}

TEST_CASE("datagram sockets keep name, peer and unread messages with their sender") {
  TemporaryFolder folder;
  std::string server = folder / "server", client = folder / "client";
  RoundTrip trip([&] {
    put_at(unix_server(SOCK_DGRAM, server), 4);
    put_at(unix_server(SOCK_DGRAM, client), 5);
    UnixAddress address(server);
    EXPECT(::connect(5, address.get(), address.bytes) == 0);
    write_all(5, "first");
    write_all(5, "second");
  });
  REQUIRE(message_of(trip.save()) == "");
  trip.kill_target();
  CHECK(trip.check().empty());
  CHECK(trip.restore([&] {
    sockaddr_un sender{};
    socklen_t bytes = sizeof sender;
    char text[32];
    EXPECT(::recvfrom(4, text, sizeof text, 0, reinterpret_cast<sockaddr*>(&sender), &bytes) == 5);
    EXPECT(sender.sun_path == client);
    EXPECT(read_now(4) == "second");
    write_all(5, "third");
    EXPECT(read_now(4) == "third");
  }) == "");
}

TEST_CASE("a datagram socket connected to a server outside is connected again, with what that had sent before") {
  TemporaryFolder folder;
  std::string server = folder / "server", client = folder / "client";
  Fd outside(unix_server(SOCK_DGRAM, server));
  RoundTrip trip([&] {
    put_at(unix_server(SOCK_DGRAM, client), 5);
    UnixAddress address(server);
    EXPECT(::connect(5, address.get(), address.bytes) == 0);
  });
  UnixAddress to(client);
  REQUIRE(::sendto(outside.get(), "unread", 6, 0, to.get(), to.bytes) == 6);
  REQUIRE(message_of(trip.save()) == "");
  CHECK(trip.notes.empty());
  trip.kill_target();
  trip.compare_generations = false;
  CHECK(trip.restore([&] {
    EXPECT(read_now(5) == "unread");
    write_all(5, "after the restart");
  }) == "");
  CHECK(read_now(outside.get()) == "after the restart");
  CHECK(mentions(trip.notes, "no longer tell who sent them"));
}

TEST_CASE("file descriptors on their way in a socket are refused") {
  RoundTrip trip([] {
    int ends[2];
    EXPECT(::socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    send_descriptor(ends[0], 0);
  });
  CHECK(message_of(trip.save()).find("has file descriptors on their way to it (SCM_RIGHTS), which cannot be saved") !=
        std::string::npos);
}

TEST_CASE("TCP listeners listen again with their options, over IPv4 and IPv6") {
  RoundTrip trip([] {
    put_at(tcp_server(), 4);
    set(4, SOL_SOCKET, SO_KEEPALIVE, 1);
    set(4, IPPROTO_TCP, TCP_NODELAY, 1);
    set(4, IPPROTO_TCP, TCP_DEFER_ACCEPT, 3);
    sock_filter accept_all[] = {{BPF_RET | BPF_K, 0, 0, 0xffffffff}};
    sock_fprog filter{1, accept_all};
    ::setsockopt(4, SOL_SOCKET, SO_ATTACH_FILTER, &filter, sizeof filter);  // some hosts allow it to root only
    int v6 = ::socket(AF_INET6, SOCK_STREAM, 0);
    set(v6, IPPROTO_IPV6, IPV6_V6ONLY, 1);
    sockaddr_in6 any{};
    any.sin6_family = AF_INET6;
    EXPECT(::bind(v6, reinterpret_cast<sockaddr*>(&any), sizeof any) == 0);
    EXPECT(::listen(v6, 3) == 0);
    put_at(v6, 5);
    put_at(::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), 6);  // fresh
  });
  REQUIRE(message_of(trip.save()) == "");
  CHECK(trip.notes.empty());
  std::vector<Error> problems = trip.check();
  REQUIRE(problems.size() == 2);
  CHECK(problems[0].message().find("EADDRINUSE") != std::string::npos);
  trip.kill_target();
  CHECK(trip.check().empty());
  CHECK(trip.restore([&] {
    EXPECT(option(4, SOL_SOCKET, SO_KEEPALIVE) == 1);
    EXPECT(option(4, IPPROTO_TCP, TCP_NODELAY) == 1);
    EXPECT(option(4, IPPROTO_TCP, TCP_DEFER_ACCEPT) == 3);
    EXPECT(option(4, SOL_SOCKET, SO_REUSEADDR) == 0);
    EXPECT(option(5, IPPROTO_IPV6, IPV6_V6ONLY) == 1);
    set(4, IPPROTO_TCP, TCP_DEFER_ACCEPT, 0);
    int client = tcp_client(port_of_fd(4));
    int accepted = ::accept(4, nullptr, nullptr);
    write_all(client, "hi");
    EXPECT(read_now(accepted) == "hi");
  }) == "");
}

TEST_CASE("a TCP connection within the process is rebuilt with unread data, ports and half-closed state") {
  std::string large(200'000, 'q');
  RoundTrip trip([&] {
    put_at(tcp_server(), 4);
    put_at(tcp_client(port_of_fd(4)), 5);
    put_at(::accept(4, nullptr, nullptr), 6);
    put_at(tcp_client(port_of_fd(4)), 7);
    put_at(::accept(4, nullptr, nullptr), 8);
    set(5, IPPROTO_TCP, TCP_NODELAY, 1);
    write_all(5, "to the server");
    EXPECT(::shutdown(5, SHUT_WR) == 0);
    set(7, SOL_SOCKET, SO_RCVBUF, 1'000'000);
    EXPECT(::send(8, large.data(), large.size(), MSG_DONTWAIT) == static_cast<ssize_t>(large.size()));
    ::usleep(50'000);
  });
  REQUIRE(message_of(trip.save()) == "");
  trip.kill_target();
  CHECK(trip.check().empty());
  CHECK(trip.restore([&] {
    EXPECT(read_now(6) == "to the server");
    EXPECT(read_now(6).empty());
    write_all(6, "answer");
    EXPECT(read_now(5) == "answer");
    EXPECT(option(5, IPPROTO_TCP, TCP_NODELAY) == 1);
    std::string got;
    while (got.size() < large.size()) got += read_now(7);
    EXPECT(got == large);
    EXPECT(port_of_fd(6) == port_of_fd(4));
    int fresh = tcp_client(port_of_fd(4));
    EXPECT(fresh >= 0 && ::accept(4, nullptr, nullptr) >= 0);
  }) == "");
}

TEST_CASE("a TCP connection to another process comes back reset, after what had not been read, with a note") {
  Fd server(tcp_server());
  unsigned port = port_of_fd(server.get());
  RoundTrip trip([&] {
    put_at(tcp_client(port), 5);
    put_at(tcp_client(port), 6);
    ::fcntl(5, F_SETFL, O_NONBLOCK);
    set(5, SOL_SOCKET, SO_KEEPALIVE, 1);
  });
  Fd first(::accept4(server.get(), nullptr, nullptr, SOCK_CLOEXEC)),
      second(::accept4(server.get(), nullptr, nullptr, SOCK_CLOEXEC));
  write_all(first.get(), "unread");
  write_all(second.get(), "all there is");
  REQUIRE(::shutdown(second.get(), SHUT_WR) == 0);
  ::usleep(20'000);
  REQUIRE(message_of(trip.save()) == "");
  CHECK(mentions(trip.notes,
                 fmt::format("descriptor 5 (\"{}\") is connected to 127.0.0.1:{}", trip.saved.open_files(1).name(), port)));
  CHECK(poll_now(first.get(), POLLIN) == 0);
  trip.compare_generations = false;
  auto verify = [] {
    no_sigpipe();
    EXPECT((::fcntl(5, F_GETFL) & O_NONBLOCK) != 0);
    EXPECT(option(5, SOL_SOCKET, SO_KEEPALIVE) == 1);
    EXPECT((poll_now(5, POLLIN) & (POLLIN | POLLHUP)) == (POLLIN | POLLHUP));
    EXPECT(read_now(5) == "unread");
    EXPECT(read_now(5) == "error ECONNRESET");
    EXPECT(read_now(5).empty());
    EXPECT(::write(5, "x", 1) == -1 && errno == EPIPE);
    EXPECT(read_now(6) == "all there is");
    EXPECT(read_now(6).empty());  // the other end had said everything
    EXPECT(::write(6, "x", 1) == -1 && errno == EPIPE);
  };
  CHECK(trip.restore(verify) == "");
  CHECK(poll_now(first.get(), POLLIN) == 0);
}

TEST_CASE("a connection that was lost at one restart stays lost over the next") {
  // What the first restart leaves: reset, before and after the program has seen it.
  RoundTrip trip([] {
    Fd server(tcp_server());
    for (int number : {5, 6}) {
      put_at(tcp_client(port_of_fd(server.get())), number);
      Fd accepted(::accept(server.get(), nullptr, nullptr));
      linger at_once{1, 0};
      ::setsockopt(accepted.get(), SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    }
    (void)server;
    ::usleep(20'000);
    EXPECT(read_now(6) == "error ECONNRESET");
  });
  REQUIRE(message_of(trip.save()) == "");
  CHECK(trip.notes.empty());
  CHECK(trip.restore([] {
    no_sigpipe();
    EXPECT(read_now(5) == "error ECONNRESET");
    EXPECT(read_now(6).empty());
    EXPECT(::write(6, "x", 1) == -1 && errno == EPIPE);
  }) == "");
}

TEST_CASE("UDP sockets are bound and connected to the same addresses") {
  RoundTrip trip([] {
    for (int number : {4, 5}) {
      int fd = ::socket(AF_INET, SOCK_DGRAM, 0);
      sockaddr_in address = loopback(0);
      EXPECT(::bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
      put_at(fd, number);
    }
    sockaddr_in peer = loopback(port_of_fd(4));
    EXPECT(::connect(5, reinterpret_cast<sockaddr*>(&peer), sizeof peer) == 0);
    set(5, SOL_SOCKET, SO_BROADCAST, 1);
  });
  REQUIRE(message_of(trip.save()) == "");
  trip.kill_target();
  CHECK(trip.check().empty());
  CHECK(trip.restore([] {
    write_all(5, "ping");
    EXPECT(read_now(4) == "ping");
    EXPECT(option(5, SOL_SOCKET, SO_BROADCAST) == 1);
  }) == "");
}

namespace {

// Asks for the list of interfaces; the answer lies in the socket, and more of it is to come if there are many.
void ask_for_interfaces(int fd) {
  struct {
    nlmsghdr head;
    rtgenmsg body;
  } request{};
  request.head.nlmsg_len = sizeof request;
  request.head.nlmsg_type = RTM_GETLINK;
  request.head.nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP;
  EXPECT(::send(fd, &request, sizeof request, 0) == sizeof request);
}

}  // namespace

TEST_CASE("a netlink socket keeps its address; a restart is refused where another socket has it") {
  RoundTrip trip([] {
    put_at(::socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE), 6);
    sockaddr_nl own{};
    own.nl_family = AF_NETLINK;
    own.nl_pid = 0x7654321;
    EXPECT(::bind(6, reinterpret_cast<sockaddr*>(&own), sizeof own) == 0);
  });
  REQUIRE(message_of(trip.save()) == "");
  const std::vector<Error> problems = trip.check();
  REQUIRE(problems.size() == 1);
  CHECK(problems[0].message().find("give descriptor 6") == 0);
  CHECK(problems[0].message().find("its netlink address 124076833 again") != std::string::npos);
  trip.kill_target();
  CHECK(trip.check().empty());
  CHECK(trip.restore([] {
    sockaddr_nl own{};
    socklen_t bytes = sizeof own;
    EXPECT(::getsockname(6, reinterpret_cast<sockaddr*>(&own), &bytes) == 0);
    EXPECT(own.nl_pid == 0x7654321);
    ask_for_interfaces(6);
    char answer[1 << 15];
    EXPECT(::recv(6, answer, sizeof answer, 0) > 0);
  }) == "");
}

TEST_CASE("a netlink address that the kernel had chosen becomes another one where it is taken, with a note") {
  RoundTrip trip([] {
    put_at(::socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE), 6);
    sockaddr_nl own{};
    own.nl_family = AF_NETLINK;
    EXPECT(::bind(6, reinterpret_cast<sockaddr*>(&own), sizeof own) == 0);
  });
  trip.compare_generations = false;
  REQUIRE(message_of(trip.save()) == "");
  const auto taken = static_cast<uint32_t>(trip.pid());
  CHECK(trip.check().empty());
  CHECK(trip.restore([taken] {
    sockaddr_nl own{};
    socklen_t bytes = sizeof own;
    EXPECT(::getsockname(6, reinterpret_cast<sockaddr*>(&own), &bytes) == 0);
    EXPECT(own.nl_pid != 0 && own.nl_pid != taken);
    ask_for_interfaces(6);
    char answer[1 << 15];
    EXPECT(::recv(6, answer, sizeof answer, 0) > 0);
  }) == "");
}

TEST_CASE("a netlink socket that is connected to the kernel is so again, and one that listens everywhere does") {
  if (list_netlink_sockets().empty()) {
    WARN("skipped: this kernel has no CONFIG_NETLINK_DIAG");
    return;
  }
  auto facts_of = [](int fd) {
    struct stat status {};
    EXPECT(::fstat(fd, &status) == 0);
    const auto all = list_netlink_sockets();
    const auto found = all.find(status.st_ino);
    EXPECT(found != all.end());
    return found->second;
  };
  const bool may_listen = ::geteuid() == 0;
  RoundTrip trip([&] {
    sockaddr_nl kernel{};
    kernel.nl_family = AF_NETLINK;
    for (int number : {6, 7}) {
      put_at(::socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE), number);
      EXPECT(::bind(number, reinterpret_cast<sockaddr*>(&kernel), sizeof kernel) == 0);
    }
    EXPECT(::connect(6, reinterpret_cast<sockaddr*>(&kernel), sizeof kernel) == 0);
    const int on = 1;
    EXPECT(::setsockopt(7, SOL_NETLINK, NETLINK_LISTEN_ALL_NSID, &on, sizeof on) == 0 || !may_listen);
    EXPECT(facts_of(6).connected && !facts_of(7).connected);
  });
  trip.compare_generations = false;
  REQUIRE(message_of(trip.save()) == "");
  trip.kill_target();
  CHECK(trip.check().empty());
  CHECK(trip.restore([&] {
    EXPECT(facts_of(6).connected && !facts_of(7).connected);
    EXPECT(!facts_of(6).listens_everywhere && facts_of(7).listens_everywhere == may_listen);
    ask_for_interfaces(6);
    char answer[1 << 15];
    EXPECT(::recv(6, answer, sizeof answer, 0) > 0);
  }) == "");
}

TEST_CASE("a socket of another network namespace is refused, bound or not") {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(::unshare(CLONE_NEWNET) == 0 ? 0 : 1);
  int status = -1;
  if (::waitpid(child, &status, 0) != child || status != 0) {
    WARN("skipped: making a network namespace needs CAP_SYS_ADMIN");
    return;
  }
  for (auto [domain, type] :
       {std::pair{AF_NETLINK, SOCK_RAW}, {AF_INET, SOCK_DGRAM}, {AF_INET6, SOCK_STREAM}, {AF_UNIX, SOCK_STREAM}}) {
    INFO("domain " << domain);
    RoundTrip trip([domain = domain, type = type] {
      const int here = ::open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
      EXPECT(::unshare(CLONE_NEWNET) == 0);
      put_at(::socket(domain, type, 0), 6);
      EXPECT(::setns(here, CLONE_NEWNET) == 0);
      ::close(here);
    });
    const std::string message = message_of(trip.save());
    CHECK(message.find("is a socket of another network namespace than the program's") != std::string::npos);
    CHECK(message.find("descriptor 6") == 0);
  }
}

TEST_CASE("a netlink socket that no checkpoint could have saved is not made") {
  RoundTrip trip([] { put_at(::socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE), 6); });
  REQUIRE(message_of(trip.save()) == "");
  trip.kill_target();
  REQUIRE(trip.check().empty());
  pb::OpenFile* file = nullptr;
  for (pb::OpenFile& each : *trip.saved.mutable_open_files()) {
    if (each.HasExtension(pb::netlink_socket)) file = &each;
  }
  REQUIRE(file != nullptr);
  pb::NetlinkSocket* socket = file->MutableExtension(pb::netlink_socket);
  const pb::NetlinkSocket sound = *socket;
  auto expect_refusal = [&] {
    const std::vector<Error> problems = trip.check();
    REQUIRE(problems.size() == 1);
    CHECK(problems[0].message().find("is no netlink socket that vmckpt saves") != std::string::npos);
    *socket = sound;
  };
  socket->set_protocol(NETLINK_AUDIT);
  expect_refusal();
  socket->set_type(SOCK_STREAM);
  expect_refusal();
  for (uint32_t group : {5u, 5u}) socket->add_groups(group);
  expect_refusal();
  pb::SocketOption* option = socket->add_netlink_options();
  option->set_level(SOL_SOCKET);
  option->set_name(SO_MARK);
  option->set_value("mark");
  expect_refusal();
}

TEST_CASE("a netlink socket with an answer that the program has not read is refused") {
  RoundTrip trip([] {
    put_at(::socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE), 6);
    ask_for_interfaces(6);
  });
  CHECK(message_of(trip.save())
            .find("is a netlink socket with unread messages, which only the kernel can send; checkpoint again") !=
        std::string::npos);
}

TEST_CASE("netlink sockets of other protocols are refused by name") {
  RoundTrip netlink([] { put_at(::socket(AF_NETLINK, SOCK_RAW, NETLINK_GENERIC), 6); });
  std::string message = message_of(netlink.save());
  CHECK(message.find("descriptor 6 (\"socket:[") == 0);
  CHECK(
      message.find("is a netlink socket of a protocol for which the kernel keeps more than it shows, which cannot be saved; ") !=
      std::string::npos);
}

TEST_CASE("a raw socket is bound and connected again, with its filter of ICMP types") {
  Fd allowed(::socket(AF_INET, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_ICMP));
  if (!allowed) {
    WARN("raw sockets need CAP_NET_RAW");
    return;
  }
  constexpr int kIcmpFilter = 1;
  RoundTrip trip([] {
    sockaddr_in own{}, peer{};
    own.sin_family = peer.sin_family = AF_INET;
    own.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    peer.sin_addr.s_addr = htonl(INADDR_LOOPBACK + 1);
    put_at(::socket(AF_INET, SOCK_RAW, IPPROTO_ICMP), 6);
    EXPECT(::bind(6, reinterpret_cast<sockaddr*>(&own), sizeof own) == 0);
    EXPECT(::connect(6, reinterpret_cast<sockaddr*>(&peer), sizeof peer) == 0);
    uint32_t hidden = ~1u;
    EXPECT(::setsockopt(6, SOL_RAW, kIcmpFilter, &hidden, sizeof hidden) == 0);
  });
  REQUIRE(message_of(trip.save()) == "");
  CHECK(trip.check().empty());
  CHECK(trip.restore([] {
    sockaddr_in own{};
    socklen_t bytes = sizeof own;
    EXPECT(::getsockname(6, reinterpret_cast<sockaddr*>(&own), &bytes) == 0);
    EXPECT(own.sin_addr.s_addr == htonl(INADDR_LOOPBACK));
    uint32_t hidden = 0;
    bytes = sizeof hidden;
    EXPECT(::getsockopt(6, SOL_RAW, kIcmpFilter, &hidden, &bytes) == 0);
    EXPECT(hidden == ~1u);
    EXPECT(::send(6, "echo here", 9, 0) == 9);  // it is connected
  }) == "");
}
