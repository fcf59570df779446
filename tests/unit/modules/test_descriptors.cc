// Files, pipes, terminals and devices: saved in one process, restored in another. Sockets: test_sockets.cc.
#include "catch.h"

#include <algorithm>
#include <thread>

#include <fcntl.h>
#include <mqueue.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "modules/descriptor_round_trip.h"
#include "modules/terminal.pb.h"

using namespace vmckpt;
using namespace vmckpt::test;

namespace {

void make_file(const std::string& path, const std::string& text) {
  int fd = ::open(path.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
  EXPECT(fd >= 0);
  write_all(fd, text);
  ::close(fd);
}

bool same_open_file(int a, int b) {
  // Moving one moves the other: they share the position.
  off_t before = ::lseek(a, 0, SEEK_CUR);
  ::lseek(a, before + 1, SEEK_SET);
  bool same = ::lseek(b, 0, SEEK_CUR) == before + 1;
  ::lseek(a, before, SEEK_SET);
  return same;
}

}  // namespace

TEST_CASE("a regular file comes back at its number with position, access mode and flags") {
  TemporaryFolder folder;
  make_file(folder / "read", "0123456789");
  RoundTrip trip([&] {
    put_at(::open((folder / "read").c_str(), O_RDONLY), 17);
    ::lseek(17, 4, SEEK_SET);
    put_at(::open((folder / "log").c_str(), O_CREAT | O_EXCL | O_WRONLY | O_APPEND | O_NONBLOCK, 0600), 20);
    write_all(20, "one ");
    ::fcntl(20, F_SETFD, FD_CLOEXEC);
    put_at(::open((folder / "cut").c_str(), O_CREAT | O_TRUNC | O_RDWR, 0600), 21);
    write_all(21, "kept");
  });
  REQUIRE(message_of(trip.save()) == "");
  CHECK(trip.check().empty());
  CHECK(trip.notes.empty());
  CHECK(trip.restore([&] {
    EXPECT(read_now(17, 3) == "456");
    EXPECT((::fcntl(17, F_GETFL) & O_ACCMODE) == O_RDONLY);
    EXPECT((::fcntl(17, F_GETFD) & FD_CLOEXEC) == 0);
    EXPECT((::fcntl(20, F_GETFL) & (O_ACCMODE | O_APPEND | O_NONBLOCK)) == (O_WRONLY | O_APPEND | O_NONBLOCK));
    EXPECT((::fcntl(20, F_GETFD) & FD_CLOEXEC) != 0);
    write_all(20, "two");
    int log = ::open((folder / "log").c_str(), O_RDONLY);
    EXPECT(read_now(log) == "one two");
    EXPECT(::lseek(21, 0, SEEK_CUR) == 4);
    EXPECT(::lseek(21, 0, SEEK_SET) == 0);
    EXPECT(read_now(21) == "kept");
  }) == "");
}

TEST_CASE("numbers that shared one open file share it again, and others do not") {
  TemporaryFolder folder;
  make_file(folder / "f", "0123456789");
  RoundTrip trip([&] {
    put_at(::open((folder / "f").c_str(), O_RDONLY), 5);
    ::dup2(5, 50);
    ::fcntl(50, F_SETFD, FD_CLOEXEC);
    put_at(::open((folder / "f").c_str(), O_RDONLY), 6);
    put_at(::eventfd(1, 0), 7);
    ::dup2(7, 8);
    put_at(::eventfd(1, 0), 9);
  });
  REQUIRE(message_of(trip.save()) == "");
  CHECK(trip.restore([&] {
    EXPECT(same_open_file(5, 50));
    EXPECT(!same_open_file(5, 6));
    EXPECT((::fcntl(5, F_GETFD) & FD_CLOEXEC) == 0);
    EXPECT((::fcntl(50, F_GETFD) & FD_CLOEXEC) != 0);
    EXPECT(read_now(8).size() == 8);
    EXPECT((poll_now(7, POLLIN) & POLLIN) == 0);  // emptied through 8
    EXPECT((poll_now(9, POLLIN) & POLLIN) != 0);
  }) == "");
}

TEST_CASE("directories, O_PATH files and files of the program's own /proc folder come back") {
  TemporaryFolder folder;
  REQUIRE(::mkdir((folder / "d").c_str(), 0700) == 0);
  REQUIRE(::symlink("nowhere", (folder / "link").c_str()) == 0);
  RoundTrip trip([&] {
    put_at(::open((folder / "d").c_str(), O_RDONLY | O_DIRECTORY), 4);
    put_at(::open((folder / "link").c_str(), O_PATH | O_NOFOLLOW), 5);
    put_at(::open("/proc/self/maps", O_RDONLY), 6);
    EXPECT(::mkdir((folder / "gone").c_str(), 0700) == 0);
    put_at(::open((folder / "gone").c_str(), O_RDONLY | O_DIRECTORY), 7);
    ::rmdir((folder / "gone").c_str());
  });
  REQUIRE(message_of(trip.save()) == "");
  CHECK(trip.check().empty());
  trip.compare_generations = false;  // the removed folder has another name
  CHECK(trip.restore([&] {
    struct stat status;
    EXPECT(::openat(4, "new", O_CREAT | O_WRONLY, 0600) >= 0);
    EXPECT(::access((folder / "d/new").c_str(), F_OK) == 0);
    EXPECT(::fstat(5, &status) == 0 && S_ISLNK(status.st_mode));
    EXPECT((::fcntl(5, F_GETFL) & O_PATH) != 0);
    EXPECT(!read_now(6).empty());
    EXPECT(::fstat(7, &status) == 0 && S_ISDIR(status.st_mode) && status.st_nlink == 0);
  }) == "");
}

TEST_CASE("missing files and changed ones that are written are problems before anything starts") {
  TemporaryFolder folder;
  for (const char* name : {"missing", "shrunk", "read", "same", "turned"}) make_file(folder / name, "0123456789");
  RoundTrip trip([&] {
    for (const char* name : {"missing", "shrunk", "read", "same", "turned"}) {
      const bool read_only = name == std::string("missing") || name == std::string("read");
      int fd = ::open((folder / name).c_str(), read_only ? O_RDONLY : O_RDWR);
      ::lseek(fd, 8, SEEK_SET);
    }
  });
  REQUIRE(message_of(trip.save()) == "");
  ::unlink((folder / "missing").c_str());
  ::unlink((folder / "turned").c_str());
  ::mkdir((folder / "turned").c_str(), 0700);
  for (const char* name : {"shrunk", "read"}) REQUIRE(::truncate((folder / name).c_str(), 3) == 0);
  std::vector<Error> problems = trip.check();
  REQUIRE(problems.size() == 3);
  CHECK(problems[0].message().find(folder / "missing") != std::string::npos);
  CHECK(problems[0].message().find("ENOENT") != std::string::npos);
  CHECK(problems[1].message().find("was writing to it") != std::string::npos);
  CHECK(problems[2].message().find("is a directory now and was a regular file") != std::string::npos);
  REQUIRE(trip.notes.size() == 1);
  CHECK(mentions(trip.notes, "size 3 bytes, was 10"));
  CHECK(mentions(trip.notes, "position 8"));
}

TEST_CASE(
    "deleted files and memfds come back with their content, and saving does not move the running program's position") {
  TemporaryFolder folder;
  std::string big(300'000, 'x');
  RoundTrip trip([&] {
    put_at(::open((folder / "deleted").c_str(), O_CREAT | O_RDWR, 0600), 4);
    write_all(4, big + "end");
    ::unlink((folder / "deleted").c_str());
    ::lseek(4, 7, SEEK_SET);
    EXPECT(::fchmod(4, 0400) == 0);
    put_at(::memfd_create("box", MFD_CLOEXEC), 5);
    write_all(5, "content");
    ::lseek(5, 3, SEEK_SET);
    put_at(::open("/proc/self/fd/5", O_WRONLY | O_APPEND), 6);  // the same file, opened apart
  });
  REQUIRE(message_of(trip.save()) == "");
  REQUIRE(message_of(trip.save()) == "");  // the second time sees the same positions
  trip.kill_target();
  CHECK(trip.check().empty());
  trip.compare_generations = false;  // a deleted file comes back as a memfd
  CHECK(trip.restore([&] {
    EXPECT(::lseek(4, 0, SEEK_CUR) == 7);
    struct stat status;
    EXPECT(::fstat(4, &status) == 0 && (status.st_mode & 07777) == 0400 && status.st_nlink == 0);
    EXPECT(::lseek(4, -3, SEEK_END) == static_cast<off_t>(big.size()));
    EXPECT(read_now(4) == "end");
    EXPECT(read_now(5) == "tent");
    write_all(6, "+");
    EXPECT(read_now(5) == "+");
    EXPECT((::fcntl(6, F_GETFL) & (O_ACCMODE | O_APPEND)) == (O_WRONLY | O_APPEND));
  }) == "");
}

TEST_CASE("locks of all kinds are taken again, and a lock held by somebody else is a problem before anything starts") {
  TemporaryFolder folder;
  for (const char* name : {"flock", "posix", "ofd"}) make_file(folder / name, "0123456789");
  RoundTrip trip([&] {
    put_at(::open((folder / "flock").c_str(), O_RDWR), 4);
    put_at(::open((folder / "posix").c_str(), O_RDWR), 5);
    put_at(::open((folder / "ofd").c_str(), O_RDWR), 6);
    EXPECT(::flock(4, LOCK_EX) == 0);
    struct flock lock {
      F_WRLCK, SEEK_SET, 2, 3, 0
    };
    EXPECT(::fcntl(5, F_SETLK, &lock) == 0);
    struct flock rest {
      F_RDLCK, SEEK_SET, 8, 0, 0
    };
    EXPECT(::fcntl(6, F_OFD_SETLK, &rest) == 0);
  });
  REQUIRE(message_of(trip.save()) == "");
  CHECK(trip.check().size() == 2);  // the program still runs; its shared lock may be held twice
  CHECK(late_locks(trip.saved).size() == 1);
  trip.kill_target();
  CHECK(trip.check().empty());
  CHECK(trip.restore([&] {
    Fd other(::open((folder / "flock").c_str(), O_RDWR));
    EXPECT(::flock(other.get(), LOCK_SH | LOCK_NB) != 0);
    pid_t child = ::fork();
    if (child == 0) {
      struct flock ask {
        F_WRLCK, SEEK_SET, 4, 1, 0
      };
      int posix = ::open((folder / "posix").c_str(), O_RDWR);
      if (::fcntl(posix, F_GETLK, &ask) != 0 || ask.l_type != F_WRLCK || ask.l_start != 2 || ask.l_len != 3) ::_exit(1);
      struct flock open_file {
        F_WRLCK, SEEK_SET, 100, 1, 0
      };
      int ofd = ::open((folder / "ofd").c_str(), O_RDWR);
      if (::fcntl(ofd, F_OFD_GETLK, &open_file) != 0 || open_file.l_type != F_RDLCK) ::_exit(2);
      ::_exit(0);
    }
    int status = -1;
    ::waitpid(child, &status, 0);
    EXPECT(status == 0);
  }) == "");
}

TEST_CASE("a pipe inside the process keeps its content, capacity and packets, and saving takes nothing out") {
  std::string content(150'000, 'a');
  for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<char>('a' + i % 23);
  RoundTrip trip([&] {
    int ends[2];
    EXPECT(::pipe2(ends, O_NONBLOCK) == 0);
    put_at(ends[1], 31);
    put_at(ends[0], 30);
    EXPECT(::fcntl(31, F_SETPIPE_SZ, 256 * 1024) == 256 * 1024);
    write_all(31, content);
    EXPECT(::pipe2(ends, O_DIRECT) == 0);
    put_at(ends[1], 33);
    put_at(ends[0], 32);
    write_all(33, "first");
    write_all(33, "second");
    put_at(::open("/proc/self/fd/32", O_RDONLY | O_NONBLOCK), 34);  // a read end of its own
  });
  REQUIRE(message_of(trip.save()) == "");
  REQUIRE(message_of(trip.save()) == "");
  CHECK(trip.notes.empty());
  CHECK(trip.restore([&] {
    EXPECT(::fcntl(30, F_GETPIPE_SZ) == 256 * 1024);
    std::string got;
    while (got.size() < content.size()) got += read_now(30);
    EXPECT(got == content);
    EXPECT(read_now(30) == "error EAGAIN");
    EXPECT(read_now(32) == "first");
    EXPECT(read_now(34) == "second");
    EXPECT((::fcntl(33, F_GETFL) & O_DIRECT) != 0);
    EXPECT((::fcntl(32, F_GETFL) & O_NONBLOCK) == 0 && (::fcntl(34, F_GETFL) & O_NONBLOCK) != 0);
  }) == "");
}

TEST_CASE("a pipe whose other end is outside or closed gives end of file or EPIPE after a restart") {
  int to_target[2], from_target[2];
  REQUIRE(::pipe2(to_target, O_CLOEXEC) == 0);
  REQUIRE(::pipe2(from_target, O_CLOEXEC) == 0);
  REQUIRE(::write(to_target[1], "unread", 6) == 6);
  int kept_read = ::fcntl(to_target[0], F_DUPFD_CLOEXEC, 100),
      kept_write = ::fcntl(from_target[1], F_DUPFD_CLOEXEC, 100);
  Fd folder_fd;
  // The process closes everything but 0 to 2, so its ends arrive over /proc.
  std::string read_path = fmt::format("/proc/{}/fd/{}", ::getpid(), kept_read);
  std::string write_path = fmt::format("/proc/{}/fd/{}", ::getpid(), kept_write);
  RoundTrip trip([&] {
    put_at(::open(read_path.c_str(), O_RDONLY), 10);
    put_at(::open(write_path.c_str(), O_WRONLY), 11);
    int ends[2];
    EXPECT(::pipe2(ends, 0) == 0);
    put_at(ends[1], 13);
    put_at(ends[0], 12);
    write_all(13, "rest");
    ::close(13);
    EXPECT(::pipe2(ends, 0) == 0);
    put_at(ends[1], 15);
    ::close(ends[0]);
  });
  REQUIRE(message_of(trip.save()) == "");
  CHECK(trip.notes.size() == 2);
  CHECK(mentions(trip.notes, "descriptor 10"));
  CHECK(mentions(trip.notes, "descriptor 11"));
  trip.compare_generations = false;  // outside becomes closed
  CHECK(trip.restore([&] {
    ::signal(SIGPIPE, SIG_IGN);
    EXPECT(read_now(10) == "unread");
    EXPECT(read_now(10).empty());
    EXPECT(::write(11, "x", 1) == -1 && errno == EPIPE);
    EXPECT(read_now(12) == "rest");
    EXPECT(read_now(12).empty());
    EXPECT((poll_now(12, POLLIN) & POLLHUP) != 0);
    EXPECT(::write(15, "x", 1) == -1 && errno == EPIPE);
  }) == "");
  for (int fd : {to_target[0], to_target[1], from_target[0], from_target[1], kept_read, kept_write}) ::close(fd);
}

TEST_CASE("standard input and output over pipes attach to those of restart") {
  int old_in[2], old_out[2], new_in[2], new_out[2];
  for (int* ends : {old_in, old_out, new_in, new_out}) REQUIRE(::pipe2(ends, O_CLOEXEC) == 0);
  std::string in_path = fmt::format("/proc/{}/fd/{}", ::getpid(), old_in[0]);
  std::string out_path = fmt::format("/proc/{}/fd/{}", ::getpid(), old_out[1]);
  RoundTrip trip([&] {
    put_at(::open(in_path.c_str(), O_RDONLY), 0);
    put_at(::open(out_path.c_str(), O_WRONLY), 1);
    ::dup2(1, 2);
    ::dup2(1, 40);
  });
  REQUIRE(message_of(trip.save()) == "");
  trip.restart_stdio = {new_in[0], new_out[1], new_out[1]};
  REQUIRE(::write(new_in[1], "hello", 5) == 5);
  trip.compare_generations = false;
  CHECK(trip.restore([&] {
    EXPECT(read_now(0) == "hello");
    write_all(1, "out ");
    write_all(2, "err ");
    write_all(40, "dup");
  }) == "");
  CHECK(read_now(new_out[0]) == "out err dup");
  for (int* ends : {old_in, old_out, new_in, new_out}) {
    ::close(ends[0]);
    ::close(ends[1]);
  }
}

TEST_CASE("a FIFO is opened again by its path with its content") {
  TemporaryFolder folder;
  REQUIRE(::mkfifo((folder / "fifo").c_str(), 0600) == 0);
  REQUIRE(::mkfifo((folder / "idle").c_str(), 0600) == 0);
  RoundTrip trip([&] {
    put_at(::open((folder / "fifo").c_str(), O_RDWR), 4);
    put_at(::open((folder / "fifo").c_str(), O_RDONLY | O_NONBLOCK), 5);
    write_all(4, "in the fifo");
    put_at(::open((folder / "idle").c_str(), O_RDONLY | O_NONBLOCK), 6);
  });
  REQUIRE(message_of(trip.save()) == "");
  trip.kill_target();
  CHECK(trip.check().empty());
  CHECK(trip.restore([&] {
    EXPECT(read_now(5) == "in the fifo");
    EXPECT(poll_now(6, POLLIN) == 0);  // idle, not hung up
    int writer = ::open((folder / "idle").c_str(), O_WRONLY | O_NONBLOCK);
    write_all(writer, "hi");
    EXPECT(read_now(6) == "hi");
  }) == "");
  ::unlink((folder / "idle").c_str());
  CHECK(trip.check().size() == 1);
}

TEST_CASE("a pseudo terminal inside the process keeps its settings and modes, and its number if that is free") {
  RoundTrip trip([&] {
    put_at(::posix_openpt(O_RDWR | O_NOCTTY), 10);
    EXPECT(::grantpt(10) == 0 && ::unlockpt(10) == 0);
    put_at(::open(::ptsname(10), O_RDWR | O_NOCTTY | O_NONBLOCK), 11);
    put_at(::open(::ptsname(10), O_WRONLY | O_NOCTTY), 12);
    termios settings;
    EXPECT(::tcgetattr(11, &settings) == 0);
    ::cfmakeraw(&settings);
    settings.c_cc[VMIN] = 7;
    EXPECT(::tcsetattr(11, TCSANOW, &settings) == 0);
    winsize size{42, 137, 5, 6};
    EXPECT(::ioctl(11, TIOCSWINSZ, &size) == 0);
    int on = 1;
    EXPECT(::ioctl(10, TIOCPKT, &on) == 0);
    put_at(::posix_openpt(O_RDWR | O_NOCTTY), 20);  // nobody has its slave, and it is locked
    put_at(::posix_openpt(O_RDWR | O_NOCTTY), 21);  // its slave was there and has gone
    EXPECT(::unlockpt(21) == 0);
    ::close(::open(::ptsname(21), O_RDWR | O_NOCTTY));
  });
  REQUIRE(message_of(trip.save()) == "");
  trip.kill_target();
  ::usleep(20'000);  // the kernel frees the number a little later
  std::string name = trip.saved.objects().GetExtension(pb::terminals, 0).path();
  bool was_free = ::access(name.c_str(), F_OK) != 0;
  CHECK(trip.restore([&] {
    EXPECT(!was_free || ::ptsname(10) == name || ::access(name.c_str(), F_OK) == 0);
    termios settings;
    EXPECT(::tcgetattr(12, &settings) == 0);
    EXPECT((settings.c_lflag & (ICANON | ECHO)) == 0 && settings.c_cc[VMIN] == 7);
    winsize size{};
    EXPECT(::ioctl(10, TIOCGWINSZ, &size) == 0 && size.ws_row == 42 && size.ws_col == 137 && size.ws_xpixel == 5);
    write_all(11, "to master");
    EXPECT(read_now(10) == std::string("\0to master", 10));  // packet mode puts a byte in front
    write_all(10, "to slave");
    EXPECT(read_now(11) == "to slave");
    EXPECT(poll_now(20, POLLIN) == 0);
    EXPECT((poll_now(21, POLLIN) & POLLHUP) != 0);
  }) == "");
}

TEST_CASE("bytes on their way through a raw pseudo terminal are saved, and the running program still gets them") {
  std::string keys(900, 'k'), screen(3000, 's');
  RoundTrip trip([&] {
    put_at(::posix_openpt(O_RDWR | O_NOCTTY), 10);
    EXPECT(::unlockpt(10) == 0);
    put_at(::open(::ptsname(10), O_RDWR | O_NOCTTY), 11);
    termios settings;
    EXPECT(::tcgetattr(11, &settings) == 0);
    ::cfmakeraw(&settings);
    EXPECT(::tcsetattr(11, TCSANOW, &settings) == 0);
    write_all(10, keys + "end");
    write_all(11, screen + "end");
  });
  REQUIRE(message_of(trip.save()) == "");
  std::string first = comparable(trip.saved);
  REQUIRE(message_of(trip.save()) == "");
  CHECK(comparable(trip.saved) == first);
  CHECK(trip.notes.empty());
  trip.kill_target();
  CHECK(trip.restore([&] {
    auto read_all = [](int fd) {
      std::string all;
      while ((poll_now(fd, POLLIN) & POLLIN) != 0) all += read_now(fd);
      return all;
    };
    EXPECT(read_all(11) == keys + "end");
    EXPECT(read_all(10) == screen + "end");
    EXPECT((::fcntl(10, F_GETFL) & O_NONBLOCK) == 0);
  }) == "");
}

TEST_CASE("unread lines of a cooked pseudo terminal are left alone and noted") {
  RoundTrip trip([] {
    put_at(::posix_openpt(O_RDWR | O_NOCTTY), 10);
    EXPECT(::unlockpt(10) == 0);
    put_at(::open(::ptsname(10), O_RDWR | O_NOCTTY), 11);
    write_all(10, "a line\n");
    ::usleep(10'000);
  });
  REQUIRE(message_of(trip.save()) == "");
  REQUIRE(message_of(trip.save()) == "");
  CHECK(mentions(trip.notes, "has 7 bytes of input and 8 bytes of output"));  // the echo ends in \r\n
}

TEST_CASE("the terminal the program was run from is replaced by restart's own, with the saved settings") {
  Fd old_master(::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC)),
      new_master(::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC));
  REQUIRE((::unlockpt(old_master.get()) == 0 && ::unlockpt(new_master.get()) == 0));
  std::string old_slave = ::ptsname(old_master.get()), new_slave = ::ptsname(new_master.get());
  RoundTrip trip([&] {
    put_at(::open(old_slave.c_str(), O_RDWR | O_NOCTTY), 0);
    ::dup2(0, 1);
    put_at(::open(old_slave.c_str(), O_RDWR | O_NOCTTY | O_NONBLOCK), 9);
    termios settings;
    EXPECT(::tcgetattr(0, &settings) == 0);
    ::cfmakeraw(&settings);
    EXPECT(::tcsetattr(0, TCSANOW, &settings) == 0);
  });
  REQUIRE(message_of(trip.save()) == "");
  trip.compare_generations = false;

  SECTION("restart runs on a terminal") {
    Fd own(::open(new_slave.c_str(), O_RDWR | O_NOCTTY | O_CLOEXEC));
    trip.restart_stdio = {-1, own.get(), own.get()};
    CHECK(trip.restore([&] {
      termios settings;
      EXPECT(::tcgetattr(0, &settings) == 0);
      EXPECT((settings.c_lflag & (ICANON | ECHO)) == 0);
      EXPECT((::fcntl(9, F_GETFL) & O_NONBLOCK) != 0 && (::fcntl(0, F_GETFL) & O_NONBLOCK) == 0);
      write_all(1, "here");
    }) == "");
    CHECK(read_now(new_master.get()) == "here");
    CHECK((::fcntl(own.get(), F_GETFL) & O_NONBLOCK) == 0);
  }
  SECTION("restart has no terminal") {
    CHECK(trip.restore([&] {
      EXPECT(::isatty(0) && ::isatty(1) && ::isatty(9));
      write_all(1, "alone");
    }) == "");
    REQUIRE(trip.terminal_master);
    CHECK(read_now(trip.terminal_master.get()) == "alone");
    CHECK(mentions(trip.notes, "restart has none"));
  }
}

TEST_CASE("a pseudo terminal of another process comes back hung up") {
  Fd master(::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC));
  REQUIRE(::unlockpt(master.get()) == 0);
  std::string slave = ::ptsname(master.get());
  RoundTrip trip([&] { put_at(::open(slave.c_str(), O_RDWR | O_NOCTTY), 9); });
  REQUIRE(message_of(trip.save()) == "");
  CHECK(mentions(trip.notes, "belongs to another process"));
  trip.compare_generations = false;
  CHECK(trip.restore([&] {
    EXPECT(read_now(9).empty());
    EXPECT(::write(9, "x", 1) == -1 && errno == EIO);
  }) == "");
}

TEST_CASE("devices without state are opened again, others are refused by name") {
  RoundTrip trip([] {
    put_at(::open("/dev/zero", O_RDONLY), 4);
    put_at(::open("/dev/full", O_WRONLY), 5);
    put_at(::open("/dev/urandom", O_RDONLY | O_NONBLOCK), 6);
  });
  REQUIRE(message_of(trip.save()) == "");
  CHECK(trip.check().empty());
  CHECK(trip.restore([] {
    EXPECT(read_now(4, 3) == std::string(3, '\0'));
    EXPECT(::write(5, "x", 1) == -1 && errno == ENOSPC);
    EXPECT(read_now(6, 5).size() == 5);
  }) == "");
  if (Fd(::open("/dev/kmsg", O_RDONLY | O_NONBLOCK))) {
    RoundTrip refused([] { put_at(::open("/dev/kmsg", O_RDONLY), 4); });
    CHECK(message_of(refused.save()).find("descriptor 4 (\"/dev/kmsg\") is a device that vmckpt has no module for; ") ==
          0);
  }
}

TEST_CASE("objects that cannot be saved are refused with their number, what they are and what to do") {
  RoundTrip queue([] {
    std::string name = fmt::format("/vmckpt-test-{}", ::getpid());
    put_at(::mq_open(name.c_str(), O_RDWR | O_CREAT, 0600, nullptr), 6);
    ::mq_unlink(name.c_str());
  });
  CHECK(message_of(queue.save()).find("descriptor 6") == 0);
  CHECK(message_of(queue.save()).find("POSIX message queue") != std::string::npos);
  RoundTrip table([] {
    std::thread([] {
      ::unshare(CLONE_FILES);
      for (;;) ::pause();
    }).detach();
    ::usleep(20'000);
  });
  CHECK(message_of(table.save()).find("has a descriptor table of its own") != std::string::npos);
}

TEST_CASE("eventfds keep their count and mode") {
  RoundTrip trip([] {
    put_at(::eventfd(0, EFD_NONBLOCK), 4);
    uint64_t large = 0xfffffffffffffffe;
    EXPECT(::write(4, &large, sizeof large) == sizeof large);
    put_at(::eventfd(3, EFD_SEMAPHORE | EFD_CLOEXEC), 5);
  });
  REQUIRE(message_of(trip.save()) == "");
  CHECK(trip.restore([] {
    uint64_t count = 0;
    EXPECT(::read(4, &count, sizeof count) == sizeof count && count == 0xfffffffffffffffe);
    EXPECT((::fcntl(4, F_GETFL) & O_NONBLOCK) != 0 && (::fcntl(5, F_GETFL) & O_NONBLOCK) == 0);
    for (int i = 0; i < 3; ++i) EXPECT(::read(5, &count, sizeof count) == sizeof count && count == 1);
  }) == "");
}

TEST_CASE("signalfds keep their mask") {
  RoundTrip trip([] {
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR2);
    sigaddset(&mask, SIGRTMAX);
    put_at(::signalfd(-1, &mask, SFD_NONBLOCK), 4);
  });
  REQUIRE(message_of(trip.save()) == "");
  CHECK(trip.restore([] {
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR2);
    sigaddset(&mask, SIGUSR1);
    ::sigprocmask(SIG_BLOCK, &mask, nullptr);
    ::raise(SIGUSR1);
    EXPECT(read_now(4) == "error EAGAIN");
    ::raise(SIGUSR2);
    EXPECT(read_now(4).size() == sizeof(signalfd_siginfo));
  }) == "");
}

TEST_CASE("timerfds keep remaining time, interval and expirations that nobody has read") {
  RoundTrip trip([] {
    itimerspec in_a_minute{{7, 0}, {60, 0}}, at_once{{0, 0}, {0, 1}}, often{{3600, 0}, {0, 1}};
    put_at(::timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK), 4);
    EXPECT(::timerfd_settime(4, 0, &in_a_minute, nullptr) == 0);
    put_at(::timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK), 5);
    EXPECT(::timerfd_settime(5, 0, &at_once, nullptr) == 0);
    put_at(::timerfd_create(CLOCK_BOOTTIME, TFD_NONBLOCK), 6);
    EXPECT(::timerfd_settime(6, 0, &often, nullptr) == 0);
    timespec now;
    ::clock_gettime(CLOCK_REALTIME, &now);
    itimerspec tomorrow{{0, 0}, {now.tv_sec + 86400, 0}};
    put_at(::timerfd_create(CLOCK_REALTIME, TFD_NONBLOCK), 7);
    EXPECT(::timerfd_settime(7, TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET, &tomorrow, nullptr) == 0);
    put_at(::timerfd_create(CLOCK_MONOTONIC, 0), 8);  // not armed
    ::usleep(2000);
  });
  REQUIRE(message_of(trip.save()) == "");
  CHECK(trip.restore([] {
    itimerspec left;
    uint64_t ticks = 0;
    EXPECT(::timerfd_gettime(4, &left) == 0 && left.it_value.tv_sec >= 55 && left.it_value.tv_sec <= 60);
    EXPECT(left.it_interval.tv_sec == 7);
    EXPECT(::read(5, &ticks, sizeof ticks) == sizeof ticks && ticks == 1);
    EXPECT(::read(6, &ticks, sizeof ticks) == sizeof ticks && ticks == 1);
    EXPECT(::timerfd_gettime(6, &left) == 0 && left.it_value.tv_sec > 3500 && left.it_interval.tv_sec == 3600);
    EXPECT(::timerfd_gettime(7, &left) == 0 && left.it_value.tv_sec > 86000 && left.it_value.tv_sec <= 86400);
    EXPECT(::timerfd_gettime(8, &left) == 0 && left.it_value.tv_sec == 0 && left.it_value.tv_nsec == 0);
  }) == "");
}

TEST_CASE("epoll keeps all registrations with their data, also those whose number has been closed or reused") {
  RoundTrip trip([] {
    auto add = [](int epoll, int fd, uint32_t events, uint64_t data) {
      epoll_event event{};
      event.events = events;
      event.data.u64 = data;
      EXPECT(::epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == 0);
    };
    put_at(::epoll_create1(EPOLL_CLOEXEC), 10);
    put_at(::epoll_create1(0), 11);
    put_at(::eventfd(1, 0), 20);
    put_at(::eventfd(0, 0), 21);
    put_at(::eventfd(5, 0), 22);
    put_at(::eventfd(1, 0), 23);
    add(10, 20, EPOLLIN | EPOLLET, 0x1122334455667788);
    add(10, 21, EPOLLIN, 21);
    add(10, 22, EPOLLIN, 22);
    ::dup2(22, 30);               // lives on as 30 ...
    put_at(::eventfd(9, 0), 22);  // ... and 22 is another file now
    add(10, 22, EPOLLOUT, 2222);
    add(10, 23, EPOLLIN, 23);
    ::dup2(23, 31);
    ::close(23);
    add(10, 11, EPOLLIN, 11);  // nested
    add(11, 21, EPOLLIN, 2121);
    put_at(::eventfd(1, 0), 24);
    add(10, 24, EPOLLIN | EPOLLONESHOT, 24);
    epoll_event fired[16];
    EXPECT(::epoll_wait(10, fired, 16, 0) == 5);  // disarms 24
  });
  REQUIRE(message_of(trip.save()) == "");
  CHECK(trip.restore([] {
    auto wait = [](int epoll) {
      epoll_event fired[16];
      int count = ::epoll_wait(epoll, fired, 16, 0);
      std::vector<uint64_t> data;
      for (int i = 0; i < count; ++i) data.push_back(uint64_t{fired[i].data.u64});  // epoll_event is packed: no reference to it
      std::sort(data.begin(), data.end());
      return data;
    };
    EXPECT((wait(10) == std::vector<uint64_t>{22, 23, 2222, 0x1122334455667788}));
    uint64_t one = 1;
    EXPECT(::write(21, &one, sizeof one) == sizeof one);
    EXPECT((wait(11) == std::vector<uint64_t>{2121}));
    EXPECT((wait(10) == std::vector<uint64_t>{11, 21, 22, 23, 2222}));
    epoll_event again{};
    again.events = EPOLLIN | EPOLLONESHOT;
    again.data.u64 = 24;
    EXPECT(::epoll_ctl(10, EPOLL_CTL_MOD, 24, &again) == 0);
    EXPECT(wait(10).size() == 6);
    EXPECT(::fcntl(23, F_GETFD) == -1);
  }) == "");
}

TEST_CASE("inotify keeps its watch descriptors and reports what happens after the restart") {
  TemporaryFolder folder;
  for (const char* name : {"a", "b", "c"}) REQUIRE(::mkdir((folder / name).c_str(), 0700) == 0);
  RoundTrip trip([&] {
    put_at(::inotify_init1(IN_NONBLOCK), 5);
    EXPECT(::inotify_add_watch(5, (folder / "a").c_str(), IN_CREATE) == 1);
    EXPECT(::inotify_add_watch(5, (folder / "b").c_str(), IN_CREATE) == 2);
    EXPECT(::inotify_add_watch(5, (folder / "c").c_str(), IN_CREATE | IN_DELETE) == 3);
    EXPECT(::inotify_rm_watch(5, 1) == 0);
    EXPECT(::inotify_rm_watch(5, 2) == 0);
    EXPECT(::inotify_add_watch(5, (folder / "a").c_str(), IN_CREATE) == 4);
    while (read_now(5).rfind("error", 0) != 0) {}
  });
  int place = 0;
  for (auto [watch, name] : {std::pair{3, "c"}, {4, "a"}}) {
    LedgerNote& note = trip.ledger->notes[place++];
    note.kind = NoteKind::kInotifyWatch;
    note.fd = 5;
    note.value = watch;
    std::snprintf(note.text, sizeof note.text, "%s", (folder / name).c_str());
  }
  trip.ledger->notes_used = 2;
  REQUIRE(message_of(trip.save()) == "");
  CHECK(trip.notes.empty());
  CHECK(trip.check().empty());
  CHECK(trip.restore([&] {
    EXPECT(read_now(5) == "error EAGAIN");
    make_file(folder / "a/new", "");
    std::string events = read_now(5);
    EXPECT(events.size() >= sizeof(inotify_event));
    EXPECT(reinterpret_cast<const inotify_event*>(events.data())->wd == 4);
    EXPECT(::inotify_add_watch(5, (folder / "b").c_str(), IN_CREATE) == 5);
  }) == "");
}

TEST_CASE("inotify events that nobody has read are noted as lost") {
  TemporaryFolder folder;
  RoundTrip trip([&] {
    put_at(::inotify_init1(IN_NONBLOCK), 5);
    put_at(::open((folder / "").c_str(), O_RDONLY | O_DIRECTORY), 6);  // tells the path without the recorder
    EXPECT(::inotify_add_watch(5, (folder / "").c_str(), IN_CREATE) == 1);
    make_file(folder / "new", "");
  });
  REQUIRE(message_of(trip.save()) == "");
  CHECK(mentions(trip.notes, "bytes of events"));
}

TEST_CASE("a pidfd of the program itself refers to the new process, others to an ended one") {
  RoundTrip trip([] {
    put_at(static_cast<int>(::syscall(SYS_pidfd_open, ::getpid(), 0)), 4);
    put_at(static_cast<int>(::syscall(SYS_pidfd_open, ::getppid(), 0)), 5);
    pid_t child = ::fork();
    if (child == 0) ::_exit(0);
    put_at(static_cast<int>(::syscall(SYS_pidfd_open, child, 0)), 6);
    ::waitpid(child, nullptr, 0);
  });
  REQUIRE(message_of(trip.save()) == "");
  CHECK(trip.notes.size() == 1);
  CHECK(mentions(trip.notes, "descriptor 5"));
  CHECK(trip.restore([] {
    EXPECT(::syscall(SYS_pidfd_send_signal, 4, 0, nullptr, 0) == 0);
    EXPECT((poll_now(4, POLLIN) & POLLIN) == 0);
    for (int fd : {5, 6}) {
      EXPECT(::syscall(SYS_pidfd_send_signal, fd, 0, nullptr, 0) == -1 && errno == ESRCH);
      EXPECT((poll_now(fd, POLLIN) & POLLIN) != 0);
    }
    EXPECT(::waitpid(-1, nullptr, WNOHANG) == -1 && errno == ECHILD);
  }) == "");
}

TEST_CASE("signal-driven input comes back with owner and signal") {
  pid_t owner = ::getpid();
  RoundTrip trip([&] {
    int ends[2];
    EXPECT(::pipe2(ends, 0) == 0);
    f_owner_ex process{F_OWNER_PID, owner};
    EXPECT(::fcntl(ends[0], F_SETOWN_EX, &process) == 0);
    EXPECT(::fcntl(ends[0], F_SETSIG, SIGURG) == 0);  // ignored by default
    EXPECT(::fcntl(ends[0], F_SETFL, O_ASYNC | O_NONBLOCK) == 0);
  });
  REQUIRE(message_of(trip.save()) == "");
  CHECK(trip.restore([&] {
    f_owner_ex process{};
    EXPECT(::fcntl(3, F_GETOWN_EX, &process) == 0 && process.pid == owner && process.type == F_OWNER_PID);
    EXPECT(::fcntl(3, F_GETSIG) == SIGURG);
    EXPECT((::fcntl(3, F_GETFL) & (O_ASYNC | O_NONBLOCK)) == (O_ASYNC | O_NONBLOCK));
  }) == "");
}
