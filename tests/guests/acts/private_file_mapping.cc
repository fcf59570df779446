// Private file mappings: pages taken from the file, pages modified in memory, a mapping that starts inside the file and
// one that reaches beyond its end. The file itself is never written.

#include "act.h"

constexpr size_t kPage = 4096;
constexpr size_t kFilePages = 32;

static char* map(int fd, size_t pages, size_t first_page, int protection) {
  return static_cast<char*>(MUST(mmap(nullptr, pages * kPage, protection, MAP_PRIVATE, fd,
                                      static_cast<off_t>(first_page * kPage))));
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  uint64_t seed = act::random_u64();
  std::vector<uint64_t> content(kFilePages * kPage / 8);
  for (size_t page = 0; page < kFilePages; page++) act::fill(&content[page * kPage / 8], kPage, seed + page);
  int fd = MUST(open("mapped file", O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
  MUST(write(fd, content.data(), kFilePages * kPage));
  MUST(act::write_text(fd, "tail"));

  char* modified = map(fd, kFilePages, 0, PROT_READ | PROT_WRITE);
  for (size_t page = 0; page < kFilePages; page += 3) act::fill(modified + page * kPage, kPage, seed + 1000 + page);
  char* read_only = map(fd, 8, 4, PROT_READ);
  char* last_page = map(fd, 1, kFilePages, PROT_READ | PROT_WRITE);
  char* was_writable = map(fd, 4, 0, PROT_READ | PROT_WRITE);  // as a program's relocated read-only data
  act::fill(was_writable, kPage, seed + 2000);
  MUST(mprotect(was_writable, 4 * kPage, PROT_READ));
  close(fd);

  act::intermission();

  for (size_t page = 0; page < kFilePages; page++) {
    uint64_t page_seed = page % 3 == 0 ? seed + 1000 + page : seed + page;
    act::expect_filled("page " + std::to_string(page), modified + page * kPage, kPage, page_seed);
  }
  for (size_t page = 0; page < 8; page++) {
    act::expect_filled("read-only page", read_only + page * kPage, kPage, seed + 4 + page);
  }
  act::expect_equal("name of a mapping", act::link_text("/proc/self/cwd") + "/mapped file",
                    act::map_line_at(read_only).name);
  act::expect_equal("last page", std::string("tail"), std::string(last_page));
  act::expect_zero("rest of the last page", last_page + 8, kPage - 8);
  act::expect_filled("page modified, then made read-only", was_writable, kPage, seed + 2000);
  act::expect_equal("its permissions", std::string("r--p"), act::permissions_at(was_writable));

  modified[5 * kPage] = 'm';
  fd = MUST(open("mapped file", O_RDONLY));
  std::vector<uint64_t> again(content.size());
  MUST(pread(fd, again.data(), kFilePages * kPage, 0));
  act::expect("the file is as it was written", again == content);
  return act::finish();
}
