// A file mapped shared is the file: what was written through the mapping before and after the checkpoint is in it, and
// what is written to it shows in the mapping. So it is for names that /proc/PID/maps shows in another way, or like a removed
// file's.

#include <map>

#include "act.h"

constexpr size_t kBytes = 256 * 1024;

int main(int argc, char** argv) {
  act::begin(argc, argv);
  uint64_t seed = act::random_u64();
  int fd = MUST(open("shared file", O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
  MUST(ftruncate(fd, kBytes));
  auto* writable = static_cast<char*>(MUST(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)));
  auto* window = static_cast<char*>(MUST(mmap(nullptr, 8192, PROT_READ, MAP_SHARED, fd, 65536)));
  close(fd);
  act::fill(writable, kBytes, seed);

  std::map<std::string, char*> strange;
  for (const char* name : {"kept (deleted)", "two\nlines", "back\\012slash"}) {
    act::make_file(name, std::string(4096, '.'));
    int named = MUST(open(name, O_RDWR | O_CLOEXEC));
    strange[name] = static_cast<char*>(MUST(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, named, 0)));
    close(named);
  }

  act::intermission();

  for (const auto& [name, mapping] : strange) {
    mapping[7] = '!';
    act::expect_equal("\"" + name + "\" is still the file", '!', act::file_text(name)[7]);
  }

  act::expect_equal("permissions", std::string("rw-s"), act::permissions_at(writable));
  act::expect_filled("mapping", writable, kBytes, seed);
  fd = MUST(open("shared file", O_RDWR));
  std::vector<uint64_t> content(kBytes / 8);
  MUST(pread(fd, content.data(), kBytes, 0));
  act::expect_filled("file", content.data(), kBytes, seed);
  memcpy(writable + 65536, "through the mapping", 19);
  std::string got(19, '\0');
  MUST(pread(fd, got.data(), got.size(), 65536));
  act::expect_equal("written through the mapping, read from the file", std::string("through the mapping"), got);
  MUST(pwrite(fd, "through the file", 16, 65536 + 4096));
  act::expect_equal("written to the file, read in the window", std::string("through the file"),
                    std::string(window + 4096, 16));
  act::expect_equal("msync", 0, msync(writable, kBytes, MS_SYNC));
  return act::finish();
}
