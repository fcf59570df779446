// Mappings of a file that has been removed (as after a package upgrade): shared and private, with and without an open
// descriptor; the two shared mappings are still one memory.

#include "act.h"

constexpr size_t kBytes = 128 * 1024;

static int make(const char* name, uint64_t seed) {
  int fd = MUST(open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
  std::vector<uint64_t> content(kBytes / 8);
  act::fill(content.data(), kBytes, seed);
  MUST(write(fd, content.data(), kBytes));
  return fd;
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  uint64_t seed = act::random_u64();
  auto map = [](int fd, int flags) {
    return static_cast<char*>(MUST(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, flags, fd, 0)));
  };
  int closed_fd = make("to be deleted", seed);
  char *shared = map(closed_fd, MAP_SHARED), *twin = map(closed_fd, MAP_SHARED);
  char* private_mapping = map(closed_fd, MAP_PRIVATE);
  private_mapping[0] = 'p';
  close(closed_fd);
  MUST(unlink("to be deleted"));

  int open_fd = make("to be deleted, but open", seed + 1);
  char* open_shared = map(open_fd, MAP_SHARED);
  MUST(unlink("to be deleted, but open"));

  int replaced_fd = make("to be replaced", seed + 2);
  char* replaced = map(replaced_fd, MAP_PRIVATE);
  close(replaced_fd);
  act::make_file("another one", "not what is mapped\n");
  MUST(rename("another one", "to be replaced"));

  act::intermission();

  act::expect_filled("shared mapping", shared, kBytes, seed);
  twin[4096] = 'w';
  act::expect_equal("a write is seen in the other shared mapping", 'w', shared[4096]);
  act::expect_equal("page modified in the private mapping", 'p', private_mapping[0]);
  uint64_t words[2];
  memcpy(words, private_mapping + 8, sizeof words);
  uint64_t expected_seed = seed;
  act::next_word(expected_seed);
  act::expect_equal("second word of the private mapping", act::next_word(expected_seed), words[0]);
  act::expect_filled("mapping of an open deleted file", open_shared, kBytes, seed + 1);
  open_shared[5] = 'w';
  char through_fd = 0;
  MUST(pread(open_fd, &through_fd, 1, 5));
  act::expect_equal("mapping and descriptor are one", 'w', through_fd);
  act::expect_filled("mapping of a replaced file", replaced, kBytes, seed + 2);
  act::expect_errno("the deleted name is still gone", ENOENT, access("to be deleted", F_OK));
  act::expect_equal("the replacement is untouched", std::string("not what is mapped\n"),
                    act::file_text("to be replaced"));
  return act::finish();
}
