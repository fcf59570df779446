#include "supervisor/launch.h"

#include <cstring>
#include <filesystem>

#include "catch.h"
#include <elf.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/fd.h"

using namespace vmckpt;

TEST_CASE("a dynamically linked program and a script can be launched") {
  CHECK(check_program("/bin/sh").ok());
  CHECK(check_program("sh").ok());
}

TEST_CASE("a missing program is named") {
  auto result = check_program("no-such-program-anywhere");
  REQUIRE_FALSE(result.ok());
  CHECK(result.error().message().find("no-such-program-anywhere") != std::string::npos);
}

TEST_CASE("a static program is refused in one sentence") {
  if (!std::filesystem::exists("/bin/busybox")) return;  // busybox-static's
  auto result = check_program("/bin/busybox");
  REQUIRE_FALSE(result.ok());
  CHECK(result.error().message().find("statically linked") != std::string::npos);
}

TEST_CASE("a program of another C library is refused by its interpreter") {
  const std::string interpreter = "/lib/ld-musl-x86_64.so.1";
  Elf64_Ehdr header{};
  std::memcpy(header.e_ident, ELFMAG, SELFMAG);
  header.e_ident[EI_CLASS] = ELFCLASS64;
  header.e_ident[EI_DATA] = ELFDATA2LSB;
  header.e_ident[EI_VERSION] = EV_CURRENT;
  header.e_version = EV_CURRENT;
  header.e_machine = EM_X86_64;
  header.e_phoff = sizeof header;
  header.e_phentsize = sizeof(Elf64_Phdr);
  header.e_phnum = 1;
  Elf64_Phdr segment{};
  segment.p_type = PT_INTERP;
  segment.p_offset = sizeof header + sizeof segment;
  segment.p_filesz = interpreter.size() + 1;
  char path[] = "/tmp/vmckpt-unit-XXXXXX";
  Fd file(::mkostemp(path, O_CLOEXEC));
  REQUIRE(file.valid());
  REQUIRE(::fchmod(file.get(), 0755) == 0);
  std::string bytes(reinterpret_cast<const char*>(&header), sizeof header);
  bytes.append(reinterpret_cast<const char*>(&segment), sizeof segment).append(interpreter.c_str(), interpreter.size() + 1);
  REQUIRE(write_exactly(file.get(), bytes.data(), bytes.size(), path).ok());
  file.reset();
  auto result = check_program(path);
  ::unlink(path);
  REQUIRE_FALSE(result.ok());
  CHECK(result.error().message().find(interpreter) != std::string::npos);
  CHECK(result.error().message().find("glibc") != std::string::npos);
}
