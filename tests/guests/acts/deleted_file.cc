// Open files without a name: unlinked (held twice, once read-only, once duplicated), made by O_TMPFILE, unlinked under
// one of two names, replaced by rename. Content and offsets survive, both holders still see one file, and the name
// does not come back.

#include "act.h"

int main(int argc, char** argv) {
  act::begin(argc, argv);
  std::string text = act::random_text(100'000);
  int writer = MUST(open("gone", O_RDWR | O_CREAT | O_EXCL, 0600));
  MUST(act::write_text(writer, text));
  MUST(ftruncate(writer, 300'000));  // a hole at the end
  int reader = MUST(open("gone", O_RDONLY | O_CLOEXEC));
  MUST(lseek(reader, 1000, SEEK_SET));
  int twin = MUST(dup(writer));
  MUST(unlink("gone"));

  int nameless = open(".", O_TMPFILE | O_RDWR, 0600);
  if (nameless >= 0) MUST(act::write_text(nameless, "never had a name"));

  int other_name = MUST(open("first name", O_RDWR | O_CREAT, 0600));
  MUST(act::write_text(other_name, "has another name"));
  MUST(link("first name", "second name"));
  MUST(unlink("first name"));

  act::make_file("replaced", "old content");
  int replaced = MUST(open("replaced", O_RDONLY));
  act::make_file("new", "new content");
  MUST(rename("new", "replaced"));

  act::intermission();

  act::expect_equal("writer's offset", text.size(), lseek(writer, 0, SEEK_CUR));
  act::expect_equal("reader's offset", 1000, lseek(reader, 0, SEEK_CUR));
  act::expect("content", act::read_text(reader, text.size() - 1000) == text.substr(1000));
  struct stat info {};
  MUST(fstat(writer, &info));
  act::expect_equal("size", 300'000, info.st_size);
  act::expect_equal("links", 0u, info.st_nlink);
  act::expect_equal("mode", 0600u, info.st_mode & 0777);
  MUST(pwrite(writer, "new", 3, 50));
  std::string seen(3, ' ');
  MUST(pread(reader, seen.data(), 3, 50));
  act::expect_equal("both descriptors are one file", std::string("new"), seen);
  MUST(lseek(twin, 9, SEEK_SET));
  act::expect_equal("the duplicate shares the offset", 9, lseek(writer, 0, SEEK_CUR));
  act::expect_errno("writing to the read-only one", EBADF, write(reader, "x", 1));
  act::expect_errno("the name stays gone", ENOENT, access("gone", F_OK));

  if (nameless >= 0) {
    std::string got(16, ' ');
    MUST(pread(nameless, got.data(), got.size(), 0));
    act::expect_equal("O_TMPFILE file", std::string("never had a name"), got);
  }
  std::string got(16, ' ');
  MUST(pread(other_name, got.data(), got.size(), 0));
  act::expect_equal("file with another name", std::string("has another name"), got);
  act::expect_equal("replaced file", std::string("old content"), act::read_text(replaced));
  act::expect_equal("its replacement", std::string("new content"), act::file_text("replaced"));
  return act::finish();
}
