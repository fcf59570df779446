// Memory that a forked copy of the process does not see, as all guest RAM of QEMU: its content survives, the process
// itself never loses it, and a child made after restart still lacks it (MADV_DONTFORK) or finds zeros
// (MADV_WIPEONFORK).

#include "act.h"

constexpr size_t kBytes = 4 << 20;

static void* map(int flags, int fd = -1) {
  return MUST(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, flags, fd, 0));
}

static std::string child_line_at(void* address) {
  int pipe_fds[2];
  MUST(pipe(pipe_fds));
  act::in_child([&] {
    act::write_text(pipe_fds[1], act::permissions_at(address) + ".");
    return 0;
  });
  std::string text = act::read_text(pipe_fds[0]);
  close(pipe_fds[0]);
  close(pipe_fds[1]);
  return text;
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  uint64_t seed = act::random_u64();
  void* kept_back = map(MAP_PRIVATE | MAP_ANONYMOUS);
  void* shared = map(MAP_SHARED | MAP_ANONYMOUS);
  void* from_memfd = nullptr;
  int memfd = MUST(memfd_create("guest ram", MFD_CLOEXEC));
  MUST(ftruncate(memfd, kBytes));
  from_memfd = map(MAP_SHARED, memfd);
  void* wiped = map(MAP_PRIVATE | MAP_ANONYMOUS);
  act::fill(kept_back, kBytes, seed);
  act::fill(shared, kBytes, seed + 1);
  act::fill(from_memfd, kBytes, seed + 2);
  act::fill(wiped, kBytes, seed + 3);
  for (void* region : {kept_back, shared, from_memfd}) MUST(madvise(region, kBytes, MADV_DONTFORK));
  MUST(madvise(wiped, kBytes, MADV_WIPEONFORK));

  act::intermission();

  act::expect_filled("private memory with MADV_DONTFORK", kept_back, kBytes, seed);
  act::expect_filled("shared memory with MADV_DONTFORK", shared, kBytes, seed + 1);
  act::expect_filled("memfd memory with MADV_DONTFORK", from_memfd, kBytes, seed + 2);
  act::expect_filled("memory with MADV_WIPEONFORK", wiped, kBytes, seed + 3);
  for (void* region : {kept_back, shared, from_memfd}) {
    act::expect_equal("mapped in a child", std::string("."), child_line_at(region));
  }
  act::expect_equal("wiped in a child", 0, act::in_child([&] {
    auto* words = static_cast<uint64_t*>(wiped);
    for (size_t i = 0; i < kBytes / 8; i++) {
      if (words[i] != 0) return 1;
    }
    return 0;
  }));
  act::expect_filled("parent's memory after a child was made", wiped, kBytes, seed + 3);
  return act::finish();
}
