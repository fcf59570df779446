// POSIX shared memory that is unlinked as soon as it is mapped: with its descriptor kept, and with the mapping only.

#include "act.h"

constexpr size_t kBytes = 256 * 1024;

static char* make(const std::string& name, uint64_t seed, int* fd) {
  *fd = MUST(shm_open(name.c_str(), O_RDWR | O_CREAT | O_EXCL, 0600));
  MUST(ftruncate(*fd, kBytes));
  auto* start = static_cast<char*>(MUST(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0)));
  act::fill(start, kBytes, seed);
  return start;
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  uint64_t seed = act::random_u64();
  std::string unlinked_name = "/vmckpt-act-unlinked-" + std::to_string(act::random_u64());
  int unlinked_fd, plain_fd;
  char* unlinked = make(unlinked_name, seed, &unlinked_fd);
  auto* twin = static_cast<char*>(MUST(mmap(nullptr, kBytes, PROT_READ, MAP_SHARED, unlinked_fd, 0)));
  MUST(shm_unlink(unlinked_name.c_str()));
  // Of the second one only the mapping is left.
  std::string closed_name = "/vmckpt-act-closed-" + std::to_string(act::random_u64());
  char* closed = make(closed_name, seed + 1, &plain_fd);
  MUST(shm_unlink(closed_name.c_str()));
  close(plain_fd);

  act::intermission();

  act::expect_filled("unlinked object", unlinked, kBytes, seed);
  unlinked[77] = 'w';
  act::expect_equal("a write is seen in the other mapping", 'w', twin[77]);
  char through_fd = 0;
  MUST(pread(unlinked_fd, &through_fd, 1, 77));
  act::expect_equal("and through the descriptor", 'w', through_fd);
  struct stat info {};
  MUST(fstat(unlinked_fd, &info));
  act::expect_equal("size", kBytes, info.st_size);
  act::expect_equal("links", 0u, info.st_nlink);
  MUST(ftruncate(unlinked_fd, kBytes * 2));
  act::expect_filled("object without a descriptor", closed, kBytes, seed + 1);
  return act::finish();
}
