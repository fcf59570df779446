// Writes the tiny image of docs/image-format.md to the file named: make_tiny_image FILE.
#include <cstdio>
#include <filesystem>

#include <fcntl.h>

#include "core/fd.h"
#include "image/tiny_image.h"

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: make_tiny_image FILE\n");
    return 2;
  }
  namespace fs = std::filesystem;
  auto make = [&]() -> vmckpt::Result<void> {
    std::string bytes = VMCKPT_TRY(vmckpt::test::tiny_image_bytes(fs::absolute(argv[1]).parent_path()));
    vmckpt::Fd fd = VMCKPT_TRY(vmckpt::open_file(argv[1], O_WRONLY | O_CREAT | O_EXCL, 0600));
    return vmckpt::write_exactly(fd.get(), bytes.data(), bytes.size(), argv[1]);
  };
  vmckpt::Result<void> made = make();
  if (made) return 0;
  std::fprintf(stderr, "make_tiny_image: %s\n", made.error().message().c_str());
  return 1;
}
