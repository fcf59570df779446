// Whose sockets others see (SO_PEERCRED): one made before the program gave up its rights, one after. As an ordinary user both are
// the same.

#include <grp.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "act.h"

static std::string maker_of(int fd) {
  ucred maker{};
  socklen_t bytes = sizeof maker;
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &maker, &bytes) != 0) return strerror(errno);
  return std::to_string(maker.uid) + " " + std::to_string(maker.gid) + (maker.pid == getpid() ? "" : " of another process");
}

struct Sockets {
  int listener, pair[2];
};

static Sockets make(const std::string& name) {
  Sockets made;
  made.listener = MUST(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  memcpy(address.sun_path, name.c_str(), name.size());
  MUST(bind(made.listener, reinterpret_cast<sockaddr*>(&address), sizeof address));
  MUST(listen(made.listener, 8));
  MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, made.pair));
  return made;
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  Sockets before = make("before");
  act::drop_rights();
  MUST(mkdir("own", 0755));
  Sockets after = make("own/after");
  std::vector<std::string> makers;
  for (const Sockets& made : {before, after}) {
    for (int fd : {made.listener, made.pair[0], made.pair[1]}) makers.push_back(maker_of(fd));
  }

  act::intermission();

  size_t next = 0;
  for (const Sockets& made : {before, after}) {
    for (int fd : {made.listener, made.pair[0], made.pair[1]}) act::expect_equal("maker", makers[next++], maker_of(fd));
  }
  return act::finish();
}
