// Open regular files: number, path, offset, access mode, status flags, close-on-exec; descriptors that share an offset
// because one was duplicated from the other, and such that do not; awkward names; a number far from the others; a
// read-only one, an O_PATH one, one opened through a symbolic link, one closed standard descriptor.

#include "act.h"

static std::string content_of(const char* path) { return act::file_text(path); }

static void expect_fd(const std::string& what, int fd, off_t offset, int flags, int descriptor_flags) {
  act::expect_equal(what + ": offset", offset, lseek(fd, 0, SEEK_CUR));
  act::expect_equal(what + ": flags", flags, fcntl(fd, F_GETFL));
  act::expect_equal(what + ": close-on-exec", descriptor_flags, fcntl(fd, F_GETFD));
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  act::make_file("readable", "0123456789abcdef");
  int reader = MUST(open("readable", O_RDONLY | O_CLOEXEC));
  MUST(lseek(reader, 5, SEEK_SET));

  int writer = MUST(open("written", O_RDWR | O_CREAT | O_EXCL, 0640));
  MUST(act::write_text(writer, "written before, "));
  int writer_twin = MUST(fcntl(writer, F_DUPFD_CLOEXEC, 120));
  int writer_other = MUST(open("written", O_RDWR));
  MUST(lseek(writer_other, 3, SEEK_SET));

  int appender = MUST(open("log", O_WRONLY | O_CREAT | O_APPEND | O_NONBLOCK | O_NOATIME, 0644));
  MUST(act::write_text(appender, "one\n"));

  const char* awkward_name = "sp ace, \xc3\xbcml\xc3\xa4ut, line\nbreak (deleted)";
  int awkward = MUST(open(awkward_name, O_RDWR | O_CREAT | O_SYNC, 0644));
  MUST(act::write_text(awkward, "awkward"));
  MUST(symlink("readable", "link"));
  int through_link = MUST(open("link", O_RDONLY));
  int path_only = MUST(open("readable", O_PATH));
  int far = MUST(dup2(reader, 777));
  int beyond_end = MUST(open("readable", O_RDONLY));
  MUST(lseek(beyond_end, 1'000'000, SEEK_SET));
  int empty = MUST(open("empty", O_RDWR | O_CREAT, 0600));
  close(STDIN_FILENO);

  std::vector<int> flags;
  for (int fd : {reader, writer, appender, awkward, path_only}) flags.push_back(fcntl(fd, F_GETFL));

  act::intermission();

  act::expect_errno("closed standard input", EBADF, fcntl(STDIN_FILENO, F_GETFD));
  expect_fd("reader", reader, 5, flags[0], FD_CLOEXEC);
  expect_fd("writer", writer, 16, flags[1], 0);
  expect_fd("writer's duplicate", writer_twin, 16, flags[1], FD_CLOEXEC);
  expect_fd("the other writer", writer_other, 3, flags[1], 0);
  expect_fd("appender", appender, 4, flags[2], 0);
  expect_fd("awkward name", awkward, 7, flags[3], 0);
  expect_fd("far away", far, 5, flags[0], 0);
  expect_fd("beyond the end", beyond_end, 1'000'000, flags[0] & ~O_CLOEXEC, 0);
  expect_fd("empty", empty, 0, flags[1], 0);
  act::expect_equal("O_PATH descriptor's flags", flags[4], fcntl(path_only, F_GETFL));
  act::expect_errno("reading an O_PATH descriptor", EBADF, read(path_only, &flags, 1));

  act::expect_equal("read on", std::string("56789"), act::read_text(reader, 5));
  act::expect_equal("its duplicate shares the offset", std::string("abc"), act::read_text(far, 3));
  act::expect_equal("one opened apart does not", std::string("0123"), act::read_text(through_link, 4));
  MUST(act::write_text(writer, "after"));
  MUST(act::write_text(writer_twin, " and after"));
  MUST(act::write_text(writer_other, "XX"));
  act::expect_equal("written file", std::string("wriXXen before, after and after"), content_of("written"));
  MUST(lseek(appender, 0, SEEK_SET));
  MUST(act::write_text(appender, "two\n"));
  act::expect_equal("appended file", std::string("one\ntwo\n"), content_of("log"));
  MUST(act::write_text(awkward, " name"));
  act::expect_equal("file with an awkward name", std::string("awkward name"), content_of(awkward_name));
  act::expect_equal("path", act::link_text("/proc/self/cwd") + "/readable", act::fd_link(through_link));
  return act::finish();
}
