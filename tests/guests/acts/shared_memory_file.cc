// Memory that is a file with a path: a segment of POSIX shared memory, named by the first argument and kept. It is filled from a
// seed that is in it, so that anybody can see whether content is of one moment.

#include "act.h"

constexpr size_t kPage = 4096, kBytes = 512 * kPage, kFilled = 400 * kPage;

int main(int argc, char** argv) {
  act::begin(argc, argv);
  const std::string path = "/dev/shm/" + act::args.at(0);
  const bool keep_open = act::args.size() > 1;
  int fd = MUST(open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0640));
  MUST(ftruncate(fd, kBytes));
  auto* memory = static_cast<char*>(MUST(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)));
  auto* window = static_cast<char*>(MUST(mmap(nullptr, kPage, PROT_READ, MAP_SHARED, fd, 7 * kPage)));
  uint64_t seed = act::random_u64();
  act::fill(memory, kFilled, seed);  // the rest is a hole
  if (!keep_open) close(fd);

  act::intermission();

  act::expect_filled("the segment", memory, kFilled, seed);
  act::expect_zero("what was not written", memory + kFilled, kBytes - kFilled);
  memory[7 * kPage] = 'w';
  act::expect_equal("a write shows in the other mapping", 'w', window[0]);
  struct stat info {};
  MUST(stat(path.c_str(), &info));
  act::expect_equal("size", kBytes, info.st_size);
  act::expect_equal("mode", 0640u, info.st_mode & 07777);
  int again = MUST(open(path.c_str(), O_RDWR));
  char through_fd = 0;
  MUST(pread(keep_open ? fd : again, &through_fd, 1, 7 * kPage));
  act::expect_equal("and in the file", 'w', through_fd);
  MUST(unlink(path.c_str()));
  return act::finish();
}
