// Unix sockets whose names and files went apart: renamed, removed, replaced by a file or by a second socket, a removed
// folder; owner and mode of the file; connections that were shut down early or are not accepted yet, and their names.

#include <sys/socket.h>
#include <sys/un.h>

#include "act.h"

static sockaddr_un address_of(const std::string& name) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  memcpy(address.sun_path, name.c_str(), name.size());
  return address;
}

static int bound(const std::string& name, int type = SOCK_STREAM) {
  int fd = MUST(socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  sockaddr_un address = address_of(name);
  MUST(bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address));
  return fd;
}

static int listener(const std::string& name) {
  int fd = bound(name);
  MUST(listen(fd, 8));
  return fd;
}

static int try_connect(int fd, const std::string& name) {
  sockaddr_un address = address_of(name);
  return connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address);
}

static int client(const std::string& name, int type = SOCK_STREAM) {
  int fd = MUST(socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  MUST(try_connect(fd, name));
  return fd;
}

static std::string name_of(int fd, int (*ask)(int, sockaddr*, socklen_t*)) {
  sockaddr_un address{};
  socklen_t bytes = sizeof address;
  if (ask(fd, reinterpret_cast<sockaddr*>(&address), &bytes) != 0) return strerror(errno);
  return bytes <= sizeof(sa_family_t) ? "" : address.sun_path;
}
static int ask_own(int fd, sockaddr* address, socklen_t* bytes) { return getsockname(fd, address, bytes); }
static int ask_peer(int fd, sockaddr* address, socklen_t* bytes) { return getpeername(fd, address, bytes); }
static std::string own_name(int fd) { return name_of(fd, ask_own); }
static std::string peer_name(int fd) { return name_of(fd, ask_peer); }

static std::string file_of(const std::string& path) {
  struct stat status;
  if (lstat(path.c_str(), &status) != 0) return strerror(errno);
  char text[64];
  std::snprintf(text, sizeof text, "%o %u %u", status.st_mode, status.st_uid, status.st_gid);
  return text;
}

static void expect_reachable(const std::string& what, int listening, const std::string& path) {
  int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  act::expect_equal(what + " is reachable", 0, try_connect(fd, path));
  int accepted = accept4(listening, nullptr, nullptr, SOCK_NONBLOCK);
  act::expect(what + " accepts", accepted >= 0);
  act::write_text(fd, "hello");
  act::expect_equal(what + " passes data", std::string("hello"), act::read_text(accepted));
  close(accepted);
  close(fd);
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  std::string here = act::link_text("/proc/self/cwd");

  int owned = listener(here + "/owned");
  MUST(chmod("owned", 0751));
  if (geteuid() == 0) MUST(chown("owned", 4711, 4712));
  std::string owned_file = file_of("owned");

  int renamed = listener(here + "/renamed.tmp");
  MUST(rename("renamed.tmp", "renamed"));
  int removed = listener(here + "/removed");
  MUST(unlink("removed"));
  int removed_relative = bound("removed relative", SOCK_DGRAM);
  MUST(unlink("removed relative"));
  int replaced = listener(here + "/replaced");
  MUST(unlink("replaced"));
  act::make_file("replaced", "a file");
  int first = listener(here + "/second");
  MUST(unlink("second"));
  int second = listener(here + "/second");
  MUST(mkdir("folder", 0755));
  int homeless = listener(here + "/folder/socket");
  MUST(unlink("folder/socket"));
  MUST(rmdir("folder"));

  // Shut down before it was connected: the other end feels nothing of it.
  int server = listener(here + "/server");
  int deaf = MUST(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  MUST(shutdown(deaf, SHUT_RD));
  MUST(try_connect(deaf, here + "/server"));
  int deaf_peer = MUST(accept4(server, nullptr, nullptr, SOCK_NONBLOCK));
  int alone = MUST(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  MUST(shutdown(alone, SHUT_RD));

  // Not accepted yet: two clients, the second one has a name and has finished sending.
  int waiting = client(here + "/server");
  int waiting_named = bound(here + "/client");
  MUST(try_connect(waiting_named, here + "/server"));
  MUST(shutdown(waiting_named, SHUT_WR));

  // A listener that is gone has named both ends.
  int gone = listener(here + "/gone");
  int orphan = client(here + "/gone");
  int orphan_peer = MUST(accept4(gone, nullptr, nullptr, SOCK_NONBLOCK));
  act::write_text(orphan, "unread");
  close(gone);
  MUST(unlink("gone"));

  act::intermission();

  act::expect_equal("owner and mode", owned_file, file_of("owned"));
  expect_reachable("the one with an owner", owned, "owned");
  act::expect_equal("name of the renamed", here + "/renamed.tmp", own_name(renamed));
  expect_reachable("the renamed", renamed, "renamed");
  act::expect_equal("the old name", std::string("No such file or directory"), file_of("renamed.tmp"));
  act::expect_equal("name of the removed", here + "/removed", own_name(removed));
  act::expect_equal("file of the removed", std::string("No such file or directory"), file_of("removed"));
  act::expect_equal("name of the removed relative one", std::string("removed relative"), own_name(removed_relative));
  act::expect_equal("name of the replaced", here + "/replaced", own_name(replaced));
  act::expect_equal("the file in its place", std::string("a file"), act::file_text("replaced"));
  act::expect_equal("name of the first", here + "/second", own_name(first));
  act::expect_equal("name of the second", here + "/second", own_name(second));
  expect_reachable("the second", second, "second");
  act::expect_errno("the first has no visitors", EAGAIN, accept(first, nullptr, nullptr));
  act::expect_equal("name of the homeless", here + "/folder/socket", own_name(homeless));
  act::expect_equal("its folder", std::string("No such file or directory"), file_of("folder"));

  act::expect_equal("the deaf end reads its end", std::string(), act::read_text(deaf));
  act::expect_errno("nobody can write to it", EPIPE, send(deaf_peer, "x", 1, MSG_NOSIGNAL));
  act::expect_equal("the deaf end speaks", static_cast<ssize_t>(4), act::write_text(deaf, "word"));
  act::expect_equal("its peer hears it", std::string("word"), act::read_text(deaf_peer));
  act::expect_equal("a deaf peer reads on", std::string("(Resource temporarily unavailable)"), act::read_text(deaf_peer));
  act::expect_equal("connecting the one alone", 0, try_connect(alone, "owned"));
  int alone_peer = accept4(owned, nullptr, nullptr, SOCK_NONBLOCK);
  act::expect_errno("nobody can write to that", EPIPE, send(alone_peer, "x", 1, MSG_NOSIGNAL));

  int accepted = accept4(server, nullptr, nullptr, SOCK_NONBLOCK);
  act::expect("the first in the queue", accepted >= 0);
  act::write_text(waiting, "first");
  act::expect_equal("it was the first", std::string("first"), act::read_text(accepted));
  int accepted_named = accept4(server, nullptr, nullptr, SOCK_NONBLOCK);
  act::expect("the second in the queue", accepted_named >= 0);
  act::expect_equal("name of the second", here + "/client", peer_name(accepted_named));
  act::expect_equal("the second has finished", std::string(), act::read_text(accepted_named));
  act::write_text(accepted_named, "answer");
  act::expect_equal("the second reads", std::string("answer"), act::read_text(waiting_named));
  act::expect_errno("nobody else was there", EAGAIN, accept(server, nullptr, nullptr));

  act::expect_equal("name of the accepted end", here + "/gone", own_name(orphan_peer));
  act::expect_equal("name of its client's peer", here + "/gone", peer_name(orphan));
  act::expect_equal("name of the client", std::string(), own_name(orphan));
  act::expect_equal("unread data", std::string("unread"), act::read_text(orphan_peer));
  act::expect_equal("no file of the gone", std::string("No such file or directory"), file_of("gone"));
  return act::finish();
}
