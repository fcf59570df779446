// Listening Unix sockets, one under a path, one under an abstract name, and one bound relative to a directory that is
// no longer the working one: they accept connections afterwards, and say the same name.

#include <sys/socket.h>
#include <sys/un.h>

#include <thread>

#include "act.h"

static std::pair<sockaddr_un, socklen_t> address(const std::string& name) {
  sockaddr_un where{};
  where.sun_family = AF_UNIX;
  memcpy(where.sun_path, name.data(), name.size());
  bool abstract = name[0] == '\0';
  return {where, static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + name.size() + (abstract ? 0 : 1))};
}

static int listen_at(const std::string& name, int type) {
  int fd = MUST(socket(AF_UNIX, type | SOCK_CLOEXEC, 0));
  auto [where, bytes] = address(name);
  MUST(bind(fd, reinterpret_cast<sockaddr*>(&where), bytes));
  MUST(listen(fd, 7));
  return fd;
}

static std::string own_name(int fd) {
  sockaddr_un where{};
  socklen_t bytes = sizeof where;
  MUST(getsockname(fd, reinterpret_cast<sockaddr*>(&where), &bytes));
  return std::string(where.sun_path, bytes - offsetof(sockaddr_un, sun_path));
}

static void expect_accepts(const std::string& what, int listener, const std::string& name, int type) {
  std::thread client([&] {
    int fd = MUST(socket(AF_UNIX, type, 0));
    auto [where, bytes] = address(name);
    if (connect(fd, reinterpret_cast<sockaddr*>(&where), bytes) != 0) {
      act::fail(what + ": connect", "success", strerror(errno));
      shutdown(listener, SHUT_RDWR);
      return;
    }
    act::write_text(fd, "hello");
    act::expect_equal(what + ": answer", std::string("welcome"), act::read_text(fd));
    close(fd);
  });
  int accepted = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
  if (accepted >= 0) {
    act::expect_equal(what + ": greeting", std::string("hello"), act::read_text(accepted));
    act::write_text(accepted, "welcome");
    close(accepted);
  }
  client.join();
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  std::string abstract_name = std::string(1, '\0') + "vmckpt-act-" + std::to_string(act::random_u64());
  int by_path = listen_at("socket", SOCK_STREAM);
  MUST(chmod("socket", 0700));
  int abstract = listen_at(abstract_name, SOCK_STREAM | SOCK_NONBLOCK);
  int packets = listen_at("packets", SOCK_SEQPACKET);
  MUST(mkdir("elsewhere", 0755));
  MUST(chdir("elsewhere"));  // the names of the sockets were relative
  int relative = listen_at("../relative", SOCK_STREAM);
  std::string name_by_path = own_name(by_path), name_abstract = own_name(abstract);

  act::intermission();

  act::expect_equal("name", name_by_path, own_name(by_path));
  act::expect("abstract name", name_abstract == own_name(abstract));
  int listening = 0;
  socklen_t bytes = sizeof listening;
  MUST(getsockopt(by_path, SOL_SOCKET, SO_ACCEPTCONN, &listening, &bytes));
  act::expect_equal("listening", 1, listening);
  act::expect_errno("nobody connects to the non-blocking one", EAGAIN, accept(abstract, nullptr, nullptr));
  MUST(fcntl(abstract, F_SETFL, 0));
  expect_accepts("by path", by_path, "../socket", SOCK_STREAM);
  expect_accepts("abstract", abstract, abstract_name, SOCK_STREAM);
  expect_accepts("sequenced packets", packets, "../packets", SOCK_SEQPACKET);
  expect_accepts("relative", relative, "../relative", SOCK_STREAM);
  struct stat info {};
  MUST(stat("../socket", &info));
  act::expect_equal("mode of the socket file", 0700u, info.st_mode & 0777);
  return act::finish();
}
