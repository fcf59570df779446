#include "memory/maps.h"

#include "catch.h"
#include <sys/mman.h>
#include <unistd.h>

using namespace vmckpt;

TEST_CASE("a line of /proc/PID/maps becomes a Vma, blanks in the path included") {
  auto vmas = parse_maps(
      "7f1c2a000000-7f1c2a021000 rw-p 00003000 fd:01 1234                       /tmp/a file (deleted)\n"
      "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n");
  REQUIRE(vmas.size() == 2);
  CHECK(vmas[0].start == 0x7f1c2a000000);
  CHECK(vmas[0].bytes() == 0x21000);
  CHECK(vmas[0].protection == (PROT_READ | PROT_WRITE));
  CHECK_FALSE(vmas[0].shared);
  CHECK(vmas[0].file_offset == 0x3000);
  CHECK(vmas[0].device == "fd:01");
  CHECK(vmas[0].inode == 1234);
  CHECK(vmas[0].name == "/tmp/a file (deleted)");
  CHECK(vmas[0].deleted());
  CHECK(vmas[1].name == "[vsyscall]");
}

TEST_CASE("lines that are no mappings are passed over") {
  CHECK(parse_maps("").empty());
  CHECK(parse_maps("nonsense\n-\n1234 rwxp\n").empty());
}

TEST_CASE("advice is read from smaps") {
  void* memory = ::mmap(nullptr, 1 << 16, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  REQUIRE(memory != MAP_FAILED);
  REQUIRE(::madvise(memory, 1 << 16, MADV_DONTFORK) == 0);
  auto flags = read_vm_flags(::getpid());
  REQUIRE(flags.ok());
  auto found = flags->find(reinterpret_cast<uint64_t>(memory));
  REQUIRE(found != flags->end());
  CHECK(has_flag(found->second.second, "dc"));
  CHECK_FALSE(has_flag(found->second.second, "hg"));
  ::munmap(memory, 1 << 16);
}
