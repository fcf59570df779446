// A memfd that is held as a descriptor, mapped shared and mapped private: content, size, offset, seals, name; one
// without any mapping; one sealed against writing.

#include <sys/sendfile.h>

#include "act.h"

constexpr size_t kBytes = 512 * 1024;

int main(int argc, char** argv) {
  act::begin(argc, argv);
  uint64_t seed = act::random_u64();

  int fd = MUST(memfd_create("both ways", MFD_ALLOW_SEALING | MFD_CLOEXEC));
  MUST(ftruncate(fd, kBytes * 2));
  auto* shared = static_cast<char*>(MUST(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)));
  act::fill(shared, kBytes, seed);
  auto* private_copy = static_cast<char*>(
      MUST(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0)));
  private_copy[0] = 'p';
  char shared_first = shared[0];
  MUST(fcntl(fd, F_ADD_SEALS, F_SEAL_GROW));
  MUST(lseek(fd, 12345, SEEK_SET));
  int duplicate = MUST(dup(fd));

  int unmapped = MUST(memfd_create("no mapping", MFD_ALLOW_SEALING));
  std::string text = act::random_text(10000);
  MUST(act::write_text(unmapped, text));
  MUST(fcntl(unmapped, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_SEAL));
  int closed_but_mapped = MUST(memfd_create("descriptor closed", 0));
  MUST(ftruncate(closed_but_mapped, kBytes));
  auto* only_mapped = static_cast<char*>(
      MUST(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, closed_but_mapped, 0)));
  act::fill(only_mapped, kBytes, seed + 1);
  close(closed_but_mapped);

  // One that others may only look at, and one that nobody may map for writing any more.
  int given_away = MUST(memfd_create("given away", MFD_ALLOW_SEALING));
  MUST(ftruncate(given_away, 8192));
  int to_look_at = MUST(open(("/proc/self/fd/" + std::to_string(given_away)).c_str(), O_RDONLY | O_CLOEXEC));
  void* looked_at = MUST(mmap(nullptr, 4096, PROT_READ, MAP_SHARED, to_look_at, 0));
  auto* still_written = static_cast<char*>(MUST(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, given_away, 0)));
  constexpr int kSealFutureWrite = 0x10;  // F_SEAL_FUTURE_WRITE
  MUST(fcntl(given_away, F_ADD_SEALS, kSealFutureWrite));
  void* sealed_view = MUST(mmap(nullptr, 4096, PROT_READ, MAP_SHARED, given_away, 4096));

  // A program in a memfd, as container runtimes have it.
  int program = MUST(memfd_create("program", 0));
  int true_fd = MUST(open("/bin/true", O_RDONLY));
  struct stat true_info {};
  MUST(fstat(true_fd, &true_info));
  MUST(sendfile(program, true_fd, nullptr, static_cast<size_t>(true_info.st_size)));
  close(true_fd);

  act::intermission();

  if (pid_t child = MUST(fork()); child == 0) {
    const char* words[] = {"true", nullptr};
    fexecve(program, const_cast<char**>(words), environ);
    _exit(errno == ETXTBSY ? 26 : 1);
  } else {
    int status = -1;
    MUST(waitpid(child, &status, 0));
    act::expect_equal("status of the program in a memfd", 0, status);
  }

  act::expect_errno("a mapping for reading stays one", EACCES, mprotect(looked_at, 4096, PROT_READ | PROT_WRITE));
  act::expect_errno("so does one of a sealed memfd", EACCES, mprotect(sealed_view, 4096, PROT_READ | PROT_WRITE));
  still_written[0] = 'w';
  act::expect_equal("they are one memory", 'w', *static_cast<char*>(looked_at));

  struct stat info {};
  MUST(fstat(fd, &info));
  act::expect_equal("size", kBytes * 2, info.st_size);
  act::expect_equal("seals", F_SEAL_GROW, fcntl(fd, F_GET_SEALS));
  act::expect_equal("offset", 12345, lseek(fd, 0, SEEK_CUR));
  act::expect_equal("close-on-exec", FD_CLOEXEC, fcntl(fd, F_GETFD));
  act::expect_equal("name", std::string("/memfd:both ways (deleted)"), act::fd_link(fd));
  act::expect_equal("first byte of the private mapping", 'p', private_copy[0]);
  act::expect_equal("first byte of the shared mapping", shared_first, shared[0]);
  act::expect_filled("shared mapping", shared, kBytes, seed);
  std::vector<uint64_t> through_fd(kBytes / 8);
  act::expect_equal("pread", kBytes, pread(fd, through_fd.data(), kBytes, 0));
  act::expect_filled("content read through the descriptor", through_fd.data(), kBytes, seed);
  MUST(pwrite(fd, "descriptor", 10, 5000));
  act::expect("a write through the descriptor is seen in the mapping", memcmp(shared + 5000, "descriptor", 10) == 0);
  act::expect_errno("growing", EPERM, ftruncate(fd, kBytes * 3));
  MUST(lseek(duplicate, 777, SEEK_SET));
  act::expect_equal("a duplicate shares the offset", 777, lseek(fd, 0, SEEK_CUR));

  std::string got(text.size(), '\0');
  MUST(pread(unmapped, got.data(), got.size(), 0));
  act::expect("content of the unmapped one", got == text);
  act::expect_equal("its seals", F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_SEAL, fcntl(unmapped, F_GET_SEALS));
  act::expect_equal("its offset", text.size(), lseek(unmapped, 0, SEEK_CUR));
  act::expect_errno("writing to it", EPERM, pwrite(unmapped, "x", 1, 0));
  act::expect_filled("mapping without a descriptor", only_mapped, kBytes, seed + 1);
  return act::finish();
}
