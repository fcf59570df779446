// Private mappings of objects that no path leads to: a memfd, a deleted file that is open, and shared anonymous memory (which
// only /proc/self/map_files leads to, with the right to follow it). Pages that were not written show the object, also what is
// written to it later and after MADV_DONTNEED; pages that were written are the mapping's own.

#include "act.h"

constexpr size_t kPage = 4096, kPages = 16, kBytes = kPages * kPage;

struct Pair {
  const char* what;
  char* shared;       // the object
  char* own;          // its private mapping
};

static char* map(int fd, int flags, int protection = PROT_READ | PROT_WRITE) {
  return static_cast<char*>(MUST(mmap(nullptr, kBytes, protection, flags, fd, 0)));
}

// As long as there is one, the object can be reached in another way.
static Pair make(const char* what, int fd, uint64_t seed) {
  char* shared = map(fd, MAP_SHARED);
  act::fill(shared, kBytes, seed);
  Pair pair{what, shared, map(fd, MAP_PRIVATE)};
  pair.own[3 * kPage] = 'w';  // page 3 is its own from now on
  volatile char looked_at = pair.own[4 * kPage];
  (void)looked_at;
  return pair;
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  const uint64_t seed = act::random_u64();
  std::vector<Pair> pairs;
  int memfd = MUST(static_cast<int>(syscall(SYS_memfd_create, "private", 0)));
  MUST(ftruncate(memfd, kBytes));
  pairs.push_back(make("memfd", memfd, seed));
  int closed = MUST(static_cast<int>(syscall(SYS_memfd_create, "private, closed", 0)));
  MUST(ftruncate(closed, kBytes));
  pairs.push_back(make("memfd without a descriptor", closed, seed));
  close(closed);
  int deleted = MUST(open("private, deleted", O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  MUST(ftruncate(deleted, kBytes));
  pairs.push_back(make("deleted file", deleted, seed));
  MUST(unlink("private, deleted"));
  char* anonymous = map(-1, MAP_SHARED | MAP_ANONYMOUS);
  char link[80];
  std::snprintf(link, sizeof link, "/proc/self/map_files/%lx-%lx", reinterpret_cast<unsigned long>(anonymous),
                reinterpret_cast<unsigned long>(anonymous + kBytes));
  if (int fd = open(link, O_RDWR); fd >= 0) {  // needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN
    pairs.push_back(make("shared anonymous memory", fd, seed));
    close(fd);
  }

  act::intermission();

  std::vector<uint64_t> words(kBytes / 8);
  act::fill(words.data(), kBytes, seed);
  const auto* expected = reinterpret_cast<const char*>(words.data());
  for (const Pair& pair : pairs) {
    const std::string what = pair.what;
    act::expect_equal(what + ": permissions", std::string("rw-p"), act::permissions_at(pair.own));
    for (size_t page : {0, 1, 4, 15}) {
      act::expect_equal(what + ": page " + std::to_string(page) + ", which was not written", 0,
                        memcmp(pair.own + page * kPage, expected + page * kPage, kPage));
    }
    act::expect_equal(what + ": page that was written", 'w', pair.own[3 * kPage]);
    act::expect_equal(what + ": the rest of it", 0, memcmp(pair.own + 3 * kPage + 1, expected + 3 * kPage + 1, kPage - 1));
    act::expect_equal(what + ": the object does not have that", expected[3 * kPage], pair.shared[3 * kPage]);
    pair.shared[5 * kPage] = 'l';
    act::expect_equal(what + ": a later write shows", 'l', pair.own[5 * kPage]);
    pair.shared[3 * kPage] = 'x';
    act::expect_equal(what + ": not in the page that is its own", 'w', pair.own[3 * kPage]);
    MUST(madvise(pair.own + 3 * kPage, kPage, MADV_DONTNEED));
    act::expect_equal(what + ": the object shows again where that is given up", 'x', pair.own[3 * kPage]);
    pair.own[6 * kPage] = 'p';
    act::expect_equal(what + ": a write stays private", expected[6 * kPage], pair.shared[6 * kPage]);
    // As before, for whoever is checkpointed once more.
    act::fill(pair.shared, kBytes, seed);
  }
  char through_fd = 0;
  pairs[0].shared[9] = 'd';
  MUST(pread(memfd, &through_fd, 1, 9));
  act::expect_equal("descriptor and mappings are one", 'd', through_fd);
  return act::finish();
}
