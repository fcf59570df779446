// Locks on files: flock(2), record locks of the process (fcntl), record locks of the open file description (OFD), each
// shared and exclusive. Another process still meets them, finds who holds them, and gets them once they are released.

#include <sys/file.h>

#include "act.h"

static struct flock range(short type, off_t start, off_t length) {
  struct flock lock {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = start;
  lock.l_len = length;
  return lock;
}

static int open_locked() { return MUST(open("locked file", O_RDWR | O_CLOEXEC)); }

static int set_lock(int command, short type, off_t start, off_t length) {
  int fd = open_locked();
  struct flock lock = range(type, start, length);
  return fcntl(fd, command, &lock) == 0 ? 0 : errno;
}

static int try_flock(int operation) {
  int fd = open_locked();
  return flock(fd, operation | LOCK_NB) == 0 ? 0 : errno;
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  act::make_file("locked file", std::string(1000, 'x'));
  int by_process = open_locked(), by_description = open_locked(), by_flock = open_locked();
  for (auto [type, start] : {std::pair<short, off_t>{F_WRLCK, 0}, {F_RDLCK, 100}}) {
    struct flock lock = range(type, start, 10);
    MUST(fcntl(by_process, F_SETLK, &lock));
    lock = range(type, start + 500, 10);
    MUST(fcntl(by_description, F_OFD_SETLK, &lock));
  }
  MUST(flock(by_flock, LOCK_EX));
  act::make_file("other file", "");
  int shared_flock = MUST(open("other file", O_RDONLY));
  MUST(flock(shared_flock, LOCK_SH));
  pid_t pid = getpid();

  act::intermission();

  auto child_gets = [](auto body) { return std::string(strerror(act::in_child(body))); };
  auto again = std::string(strerror(EAGAIN)), fine = std::string(strerror(0));
  act::expect_equal("process lock, exclusive", again, child_gets([] { return set_lock(F_SETLK, F_RDLCK, 0, 1); }));
  act::expect_equal("process lock, shared: read", fine, child_gets([] { return set_lock(F_SETLK, F_RDLCK, 100, 1); }));
  act::expect_equal("process lock, shared: writing", again,
                    child_gets([] { return set_lock(F_SETLK, F_WRLCK, 109, 1); }));
  act::expect_equal("behind the range", fine, child_gets([] { return set_lock(F_SETLK, F_WRLCK, 110, 1); }));
  act::expect_equal("OFD lock, exclusive", again, child_gets([] { return set_lock(F_OFD_SETLK, F_RDLCK, 505, 1); }));
  act::expect_equal("OFD lock, shared: writing", again,
                    child_gets([] { return set_lock(F_OFD_SETLK, F_WRLCK, 600, 1); }));
  act::expect_equal("OFD lock, shared: read", fine, child_gets([] { return set_lock(F_OFD_SETLK, F_RDLCK, 600, 1); }));
  act::expect_equal("holder of the process lock", 0, act::in_child([pid] {
    struct flock lock = range(F_WRLCK, 0, 1);
    return fcntl(open_locked(), F_GETLK, &lock) == 0 && lock.l_pid == pid ? 0 : 1;
  }));
  act::expect_equal("flock, exclusive", again, child_gets([] { return try_flock(LOCK_SH); }));
  act::expect_equal("flock, shared: share", 0,
                    act::in_child([] { return flock(open("other file", O_RDONLY), LOCK_SH | LOCK_NB); }));
  act::expect_equal("flock, shared: exclusive", 1, act::in_child([] {
    return flock(open("other file", O_RDONLY), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK ? 1 : 0;
  }));

  MUST(flock(by_flock, LOCK_UN));
  act::expect_equal("flock, after release", fine, child_gets([] { return try_flock(LOCK_EX); }));
  struct flock unlock = range(F_UNLCK, 0, 0);
  MUST(fcntl(by_process, F_SETLK, &unlock));
  act::expect_equal("process lock, after release", fine, child_gets([] { return set_lock(F_SETLK, F_WRLCK, 0, 1); }));
  close(by_description);
  act::expect_equal("OFD lock, after closing", fine, child_gets([] { return set_lock(F_OFD_SETLK, F_WRLCK, 500, 1); }));
  return act::finish();
}
