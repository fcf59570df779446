// Guard regions (MADV_GUARD_INSTALL, Linux 6.13): pages that fault until the guard is removed, in memory of every kind, beside
// and between pages with content. They are no mappings of their own, and what lies beside them is untouched.

#include <setjmp.h>

#include "act.h"

constexpr int kGuardInstall = 102, kGuardRemove = 103;  // include/uapi/asm-generic/mman-common.h
constexpr size_t kPage = 4096, kPages = 600;

static sigjmp_buf back;

static bool faults(volatile char* address) {
  struct sigaction action {}, before {};
  action.sa_handler = [](int) { siglongjmp(back, 1); };
  sigaction(SIGSEGV, &action, &before);
  volatile bool faulted = true;
  if (sigsetjmp(back, 1) == 0) {
    (void)*address;
    faulted = false;
  }
  sigaction(SIGSEGV, &before, nullptr);
  return faulted;
}

struct Memory {
  const char* what;
  char* start;
  bool zero_after_removal;  // otherwise the file's content shows again
};

static char* map(int protection, int flags, int fd = -1) {
  return static_cast<char*>(MUST(mmap(nullptr, kPages * kPage, protection, flags, fd, 0)));
}

static bool try_guard(char* page) { return madvise(page, kPage, kGuardInstall) == 0; }

int main(int argc, char** argv) {
  act::begin(argc, argv);
  uint64_t seed = act::random_u64();
  std::vector<Memory> memories;
  memories.push_back({"anonymous memory", map(PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS), true});
  if (!try_guard(memories[0].start)) act::skip("guard regions (Linux 6.13)");
  MUST(madvise(memories[0].start, kPage, kGuardRemove));
  memories.push_back(
      {"memory that was reserved only", map(PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE), true});
  memories.push_back({"memory without rights", map(PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS), true});
  memories.push_back({"memory not copied by fork", map(PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS), true});
  int fd = MUST(open("guarded file", O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  std::vector<uint64_t> content(kPages * kPage / 8);
  act::fill(content.data(), kPages * kPage, seed);
  MUST(write(fd, content.data(), kPages * kPage));
  char* probe = map(PROT_READ, MAP_SHARED, fd);
  if (try_guard(probe)) {  // Linux 6.15
    memories.push_back({"private file mapping", map(PROT_READ | PROT_WRITE, MAP_PRIVATE, fd), false});
    memories.push_back({"shared file mapping", map(PROT_READ | PROT_WRITE, MAP_SHARED, fd), false});
    int memfd = MUST(static_cast<int>(syscall(SYS_memfd_create, "guarded", 0)));
    MUST(ftruncate(memfd, kPages * kPage));
    memories.push_back({"shared memory", map(PROT_READ | PROT_WRITE, MAP_SHARED, memfd), false});
  }
  munmap(probe, kPages * kPage);
  close(fd);
  auto fill_all = [&](const Memory& memory) {
    if (memory.start != memories[1].start) act::fill(memory.start, kPages * kPage, seed);
  };
  for (const Memory& memory : memories) {
    fill_all(memory);
    // The first page, one alone, a few, across the chunk that a checkpoint reads at once (256 pages), the last.
    for (size_t page : {0, 2, 10, 11, 12, 250, 599}) MUST(madvise(memory.start + page * kPage, kPage, kGuardInstall));
    MUST(madvise(memory.start + 300 * kPage, 250 * kPage, kGuardInstall));
  }
  MUST(mprotect(memories[2].start, kPages * kPage, PROT_NONE));
  MUST(madvise(memories[3].start, kPages * kPage, MADV_DONTFORK));
  const std::string before = act::permissions_at(memories[0].start);

  act::intermission();

  MUST(mprotect(memories[2].start, kPages * kPage, PROT_READ | PROT_WRITE));
  act::expect_equal("permissions", before, act::permissions_at(memories[0].start));
  std::vector<uint64_t> expected(kPages * kPage / 8);
  act::fill(expected.data(), kPages * kPage, seed);
  for (const Memory& memory : memories) {
    const bool empty = memory.start == memories[1].start;
    for (size_t page = 0; page < kPages; ++page) {
      const bool guarded = page == 0 || page == 2 || (page >= 10 && page <= 12) || page == 250 || page == 599 ||
                           (page >= 300 && page < 550);
      const std::string what = std::string(memory.what) + ", page " + std::to_string(page);
      char* start = memory.start + page * kPage;
      if (guarded) {
        act::expect_equal(what + " faults", true, faults(start));
      } else if (empty) {
        act::expect_zero(what, start, kPage);
      } else if (memcmp(start, expected.data() + page * kPage / 8, kPage) != 0) {
        act::fail(what, "its content", "another one");
      }
    }
    MUST(madvise(memory.start, kPages * kPage, kGuardRemove));
    if (memory.zero_after_removal)
      act::expect_zero(std::string(memory.what) + " once the guard has gone", memory.start + 300 * kPage, 250 * kPage);
    else
      act::expect_equal(std::string(memory.what) + " once the guard has gone", 0,
                        memcmp(memory.start + 300 * kPage, expected.data() + 300 * kPage / 8, 250 * kPage));
  }
  return act::finish();
}
