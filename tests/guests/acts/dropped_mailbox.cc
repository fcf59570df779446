// A datagram that waits at a socket in a folder of the program's user, who has no other rights. As an ordinary user from the
// start.

#include <grp.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "act.h"

int main(int argc, char** argv) {
  act::begin(argc, argv);
  act::drop_rights();
  MUST(mkdir("own", 0755));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  strcpy(address.sun_path, "own/box");
  int box = MUST(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  MUST(bind(box, reinterpret_cast<sockaddr*>(&address), sizeof address));
  int sender = MUST(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  MUST(sendto(sender, "letter", 6, 0, reinterpret_cast<sockaddr*>(&address), sizeof address));
  close(sender);

  act::intermission();

  act::expect_equal("unread", std::string("letter"), act::read_text(box));
  return act::finish();
}
