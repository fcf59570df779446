// A copy of this program, mapped like a library, with its build id.

#include "act.h"

int main(int argc, char** argv) {
  act::begin(argc, argv);
  const std::string text = act::file_text("/proc/self/exe");
  act::make_file("a program", text);
  int fd = MUST(open("a program", O_RDONLY | O_CLOEXEC));
  auto* mapped = static_cast<char*>(MUST(mmap(nullptr, text.size(), PROT_READ, MAP_PRIVATE, fd, 0)));
  close(fd);

  act::intermission();

  act::expect_equal("its content", 0, memcmp(mapped, text.data(), text.size()));
  return act::finish();
}
