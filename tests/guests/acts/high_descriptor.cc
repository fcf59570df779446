// A descriptor just below the limit of open files, where valgrind keeps its own, and many numbers free below it.

#include <sys/resource.h>

#include "act.h"

int main(int argc, char** argv) {
  act::begin(argc, argv);
  rlimit limit {};
  MUST(getrlimit(RLIMIT_NOFILE, &limit));
  limit.rlim_cur = limit.rlim_max;
  MUST(setrlimit(RLIMIT_NOFILE, &limit));
  if (limit.rlim_max < 4096) act::skip("a limit of 4096 open files (ulimit -Hn)");
  const int high = static_cast<int>(limit.rlim_max) - 2;
  const std::string text = act::random_text(100);
  act::make_file("held high", text);
  int fd = MUST(open("held high", O_RDONLY | O_CLOEXEC));
  MUST(dup3(fd, high, O_CLOEXEC));
  MUST(dup2(fd, 40));
  close(fd);

  act::intermission();

  act::expect_equal("what it reads", text, act::read_text(high));
  act::expect_equal("its twin shares the position", std::string(), act::read_text(40));
  act::expect_equal("the number before it is free", -1, fcntl(high - 1, F_GETFD));
  act::expect_equal("the number after the twin is free", -1, fcntl(41, F_GETFD));
  rlimit now {};
  MUST(getrlimit(RLIMIT_NOFILE, &now));
  act::expect_equal("the limit", limit.rlim_max, now.rlim_max);
  return act::finish();
}
