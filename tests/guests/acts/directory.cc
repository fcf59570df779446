// A directory descriptor: it can be used for openat and fchdir, and reading its entries goes on where it stopped, so
// that every entry is seen exactly once.

#include <dirent.h>

#include <set>

#include "act.h"

constexpr int kEntries = 1200;  // more than one getdents buffer

int main(int argc, char** argv) {
  act::begin(argc, argv);
  MUST(mkdir("directory", 0755));
  int path_only = MUST(open("directory", O_PATH | O_DIRECTORY | O_CLOEXEC));
  for (int i = 0; i < kEntries; i++) {
    close(MUST(openat(path_only, ("entry-" + std::to_string(i)).c_str(), O_CREAT | O_WRONLY, 0600)));
  }
  DIR* reading = MUST(opendir("directory"));
  std::multiset<std::string> seen;
  for (int i = 0; i < kEntries / 3; i++) seen.insert(MUST(readdir(reading))->d_name);
  // The kernel's own position, without the C library's buffer.
  int raw = MUST(open("directory", O_RDONLY | O_DIRECTORY));
  char entries[4096];
  long first_part = MUST(getdents64(raw, entries, sizeof entries));
  off_t position = lseek(raw, 0, SEEK_CUR);

  act::intermission();

  act::expect("the first part was not everything", first_part > 0);
  act::expect_equal("position", position, lseek(raw, 0, SEEK_CUR));
  while (dirent* entry = readdir(reading)) seen.insert(entry->d_name);
  act::expect_equal("entries seen", static_cast<size_t>(kEntries + 2), seen.size());
  for (int i = 0; i < kEntries; i++) {
    std::string name = "entry-" + std::to_string(i);
    if (!act::expect_equal(name, static_cast<size_t>(1), seen.count(name))) break;
  }
  act::expect("openat", openat(path_only, "entry-7", O_RDONLY) >= 0);
  MUST(fchdir(dirfd(reading)));
  act::expect_equal("fchdir", 0, access("entry-8", F_OK));
  rewinddir(reading);
  act::expect("rewinddir", readdir(reading) != nullptr);
  return act::finish();
}
