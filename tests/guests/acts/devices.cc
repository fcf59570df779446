// Character devices that every program knows, and files of /proc and /sys, which are made anew at each opening.

#include "act.h"

int main(int argc, char** argv) {
  act::begin(argc, argv);
  int null = MUST(open("/dev/null", O_RDWR | O_CLOEXEC)), zero = MUST(open("/dev/zero", O_RDONLY | O_NONBLOCK));
  int full = MUST(open("/dev/full", O_WRONLY)), urandom = MUST(open("/dev/urandom", O_RDONLY));
  int random = MUST(open("/dev/random", O_RDONLY | O_NONBLOCK));
  int own_stat = MUST(open("/proc/self/stat", O_RDONLY | O_CLOEXEC));
  int own_maps = MUST(open("/proc/self/maps", O_RDONLY));
  int memory = MUST(open("/proc/meminfo", O_RDONLY));
  int cpus = MUST(open("/sys/devices/system/cpu/online", O_RDONLY));
  int own_fds = MUST(open("/proc/self/fd", O_RDONLY | O_DIRECTORY));
  act::read_text(own_stat);
  std::string name = act::fd_link(null);

  act::intermission();

  act::expect_equal("name", name, act::fd_link(null));
  act::expect_equal("close-on-exec", FD_CLOEXEC, fcntl(null, F_GETFD));
  act::expect_equal("writing to /dev/null", 5, act::write_text(null, "hello"));
  act::expect_equal("reading /dev/null", std::string(), act::read_text(null));
  act::expect_equal("reading /dev/zero", std::string(100, '\0'), act::read_text(zero, 100));
  act::expect_equal("O_NONBLOCK", O_NONBLOCK, fcntl(zero, F_GETFL) & O_NONBLOCK);
  act::expect_errno("writing to /dev/full", ENOSPC, write(full, "x", 1));
  act::expect("/dev/urandom", act::read_text(urandom, 32) != act::read_text(urandom, 32));
  act::expect_equal("/dev/random", static_cast<size_t>(8), act::read_text(random, 8).size());

  auto from_start = [](int fd) {
    MUST(lseek(fd, 0, SEEK_SET));
    return act::read_text(fd);
  };
  act::expect_equal("/proc/self/stat is this process's", std::to_string(getpid()),
                    from_start(own_stat).substr(0, std::to_string(getpid()).size()));
  act::expect("/proc/self/maps can be read", from_start(own_maps).find(" r") != std::string::npos);
  act::expect("/proc/meminfo can be read", from_start(memory).rfind("MemTotal:", 0) == 0);
  act::expect("a file of /sys can be read", !from_start(cpus).empty());
  act::expect_equal("/proc/self/fd is this process's", name,
                    act::link_text("/proc/self/fd/" + std::to_string(own_fds) + "/" + std::to_string(null)));
  return act::finish();
}
