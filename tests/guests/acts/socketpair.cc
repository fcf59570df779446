// Unix socket pairs whose two ends are in the process: stream, datagram and sequenced packets with content in both
// directions, a half-closed one, one whose other end is closed, flags and options.

#include <sys/socket.h>
#include <sys/un.h>

#include "act.h"

struct Pair {
  int a, b;
};

static Pair make(int type) {
  int fds[2];
  MUST(socketpair(AF_UNIX, type, 0, fds));
  return {fds[0], fds[1]};
}

static std::string receive(int fd, size_t bytes = 65536) {
  std::string text(bytes, '\0');
  ssize_t got = recv(fd, text.data(), bytes, MSG_DONTWAIT);
  if (got < 0) return std::string("(") + strerror(errno) + ")";
  text.resize(static_cast<size_t>(got));
  return text;
}

static void send_all(int fd, const std::string& text) { MUST(send(fd, text.data(), text.size(), MSG_NOSIGNAL)); }

static int option(int fd, int name) {
  int value = -1;
  socklen_t bytes = sizeof value;
  MUST(getsockopt(fd, SOL_SOCKET, name, &value, &bytes));
  return value;
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  Pair ended = make(SOCK_SEQPACKET);
  for (const char* text : {"before", "", "behind"}) MUST(send(ended.a, text, strlen(text), 0));
  MUST(shutdown(ended.a, SHUT_WR));
  Pair stream = make(SOCK_STREAM | SOCK_CLOEXEC), datagram = make(SOCK_DGRAM | SOCK_NONBLOCK);
  Pair packets = make(SOCK_SEQPACKET), half_closed = make(SOCK_STREAM), widowed = make(SOCK_STREAM);
  std::string text = act::random_text(40'000), back = act::random_text(7'000);
  send_all(stream.a, text);
  send_all(stream.b, back);
  for (Pair pair : {datagram, packets}) {
    for (const char* message : {"first", "", "third message"}) send_all(pair.a, message);
    send_all(pair.b, "answer");
  }
  send_all(half_closed.a, "before closing");
  MUST(shutdown(half_closed.a, SHUT_WR));
  send_all(half_closed.b, "still open this way");
  send_all(widowed.b, "last words");
  close(widowed.b);

  int one = 1, wanted_bytes = 100'000;
  MUST(setsockopt(stream.a, SOL_SOCKET, SO_PASSCRED, &one, sizeof one));
  MUST(setsockopt(datagram.a, SOL_SOCKET, SO_SNDBUF, &wanted_bytes, sizeof wanted_bytes));
  int send_buffer = option(datagram.a, SO_SNDBUF);
  int twin = MUST(dup(stream.b));

  act::intermission();

  for (const char* text : {"before", "", "behind", ""}) {
    act::expect_equal("record of a finished connection", std::string(text), act::read_text(ended.b));
  }

  act::expect_equal("close-on-exec", FD_CLOEXEC, fcntl(stream.a, F_GETFD));
  act::expect_equal("O_NONBLOCK", O_NONBLOCK, fcntl(datagram.b, F_GETFL) & O_NONBLOCK);
  act::expect_equal("SO_PASSCRED", 1, option(stream.a, SO_PASSCRED));
  act::expect_equal("SO_SNDBUF", send_buffer, option(datagram.a, SO_SNDBUF));
  act::expect_equal("type", SOCK_SEQPACKET, option(packets.b, SO_TYPE));

  act::expect("stream, first part", receive(stream.b, 10'000) == text.substr(0, 10'000));
  act::expect("stream, the rest by the duplicate", receive(twin) == text.substr(10'000));
  act::expect("stream, other direction", receive(stream.a) == back);
  for (Pair pair : {datagram, packets}) {
    std::string name = pair.a == datagram.a ? "datagram" : "sequenced packet";
    for (const char* message : {"first", "", "third message"}) {
      act::expect_equal(name, std::string(message), receive(pair.b));
    }
    act::expect_equal(name + ", other direction", std::string("answer"), receive(pair.a));
    act::expect_equal(name + ": then empty", std::string("(Resource temporarily unavailable)"), receive(pair.b));
    send_all(pair.b, "new");
    act::expect_equal(name + ": sent after restart", std::string("new"), receive(pair.a));
  }
  act::expect_equal("half-closed: content", std::string("before closing"), receive(half_closed.b));
  act::expect_equal("half-closed: end", std::string(), receive(half_closed.b));
  act::expect_equal("half-closed: the other way", std::string("still open this way"), receive(half_closed.a));
  act::expect_errno("half-closed: writing", EPIPE, send(half_closed.a, "x", 1, MSG_NOSIGNAL));
  send_all(half_closed.b, "and goes on");
  act::expect_equal("half-closed: the other way, afterwards", std::string("and goes on"), receive(half_closed.a));
  act::expect_equal("other end closed: content", std::string("last words"), receive(widowed.a));
  act::expect_equal("other end closed: end", std::string(), receive(widowed.a));
  act::expect_errno("other end closed: writing", EPIPE, send(widowed.a, "x", 1, MSG_NOSIGNAL));
  return act::finish();
}
