// eventfd: counters, among them the largest one, semaphores, flags, duplicates.

#include <sys/eventfd.h>

#include "act.h"

static uint64_t take(int fd) {
  uint64_t value = 0;
  if (read(fd, &value, sizeof value) != sizeof value) return UINT64_MAX;
  return value;
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  int counter = MUST(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  uint64_t large = (1ULL << 40) + 7, full = UINT64_MAX - 1;
  MUST(write(counter, &large, 8));
  int twin = MUST(dup(counter));
  int semaphore = MUST(eventfd(3, EFD_SEMAPHORE | EFD_NONBLOCK));
  int at_limit = MUST(eventfd(0, EFD_NONBLOCK));
  MUST(write(at_limit, &full, 8));
  int empty = MUST(eventfd(0, EFD_NONBLOCK));
  int blocking = MUST(eventfd(5, 0));

  act::intermission();

  act::expect_equal("flags", O_RDWR | O_NONBLOCK, fcntl(counter, F_GETFL));
  act::expect_equal("flags of the blocking one", O_RDWR, fcntl(blocking, F_GETFL));
  act::expect_equal("close-on-exec", FD_CLOEXEC, fcntl(counter, F_GETFD));
  act::expect_equal("counter, by the duplicate", large, take(twin));
  act::expect_errno("then empty", EAGAIN, read(counter, &large, 8));
  for (int i = 0; i < 3; i++) act::expect_equal("semaphore", 1u, take(semaphore));
  act::expect_errno("semaphore used up", EAGAIN, read(semaphore, &large, 8));
  uint64_t one = 1;
  act::expect_errno("at its limit", EAGAIN, write(at_limit, &one, 8));
  act::expect_equal("value at its limit", full, take(at_limit));
  act::expect_errno("empty", EAGAIN, read(empty, &large, 8));
  act::expect_equal("blocking", 5u, take(blocking));
  return act::finish();
}
