#include "core/elf_file.h"

#include <algorithm>
#include <cstring>
#include <random>

#include "catch.h"
#include <elf.h>
#include <fcntl.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "core/fd.h"

using namespace vmckpt;

namespace {

Fd file_of(const std::string& bytes) {
  Fd file(::memfd_create("elf", MFD_CLOEXEC));
  REQUIRE(file.valid());
  REQUIRE(write_exactly(file.get(), bytes.data(), bytes.size(), "a file").ok());
  return file;
}

void ask_everything(const Result<ElfFile>& elf) {
  if (!elf.ok()) return;
  elf->is_64_bit_x86();
  (void)elf->interpreter();
  elf->notes();
  elf->build_id();
  elf->functions();
}

// Bytes that end where the readable memory ends.
class BeforeTheEdge {
 public:
  explicit BeforeTheEdge(size_t most_bytes) : most_bytes_((most_bytes + 4095) / 4096 * 4096) {
    at_ = ::mmap(nullptr, most_bytes_ + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REQUIRE(at_ != MAP_FAILED);
    REQUIRE(::mprotect(static_cast<char*>(at_) + most_bytes_, 4096, PROT_NONE) == 0);
  }
  ~BeforeTheEdge() { ::munmap(at_, most_bytes_ + 4096); }
  std::string_view put(std::string_view bytes) {
    char* to = static_cast<char*>(at_) + most_bytes_ - bytes.size();
    std::memcpy(to, bytes.data(), bytes.size());
    return {to, bytes.size()};
  }

 private:
  size_t most_bytes_;
  void* at_;
};

std::string own_vdso() {
  const auto* start = reinterpret_cast<const char*>(::getauxval(AT_SYSINFO_EHDR));
  REQUIRE(start != nullptr);
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(start);
  return {start, header->e_shoff + size_t{header->e_shnum} * header->e_shentsize};
}

}  // namespace

TEST_CASE("a program's machine, interpreter and build id are read") {
  Fd file = *open_file("/bin/sh", O_RDONLY);
  auto elf = ElfFile::open(file.get(), "/bin/sh");
  REQUIRE(elf.ok());
  CHECK(elf->is_64_bit_x86());
  CHECK(*elf->interpreter() == "/lib64/ld-linux-x86-64.so.2");
  CHECK(elf->build_id().size() == 20);
}

TEST_CASE("the vdso's functions are found in memory") {
  auto functions = ElfFile::in_memory(own_vdso())->functions();
  CHECK(functions.contains("__vdso_clock_gettime"));
  CHECK(functions.contains("__vdso_gettimeofday"));
}

TEST_CASE("what is no ELF file is said to be none") {
  CHECK_FALSE(ElfFile::in_memory("").ok());
  CHECK_FALSE(ElfFile::in_memory("#!/bin/sh\n").ok());
  Fd text = file_of("#!/bin/sh\n");
  auto elf = ElfFile::open(text.get(), "script");
  REQUIRE_FALSE(elf.ok());
  CHECK(elf.error().message().find("script is no ELF file") != std::string::npos);
}

TEST_CASE("a truncated ELF file is read as far as it goes") {
  const std::string vdso = own_vdso();
  BeforeTheEdge edge(vdso.size());
  for (size_t bytes = 0; bytes < vdso.size(); bytes += bytes < 1024 ? 1 : 37) {
    ask_everything(ElfFile::in_memory(edge.put(std::string_view(vdso).substr(0, bytes))));
  }
  const std::string program = *read_whole_file("/bin/sh");
  for (size_t bytes : {0, 3, 4, 15, 16, 52, 63, 64, 65, 100, 300, 700, 900, 1000, 4096, 20000, 100000}) {
    Fd file = file_of(program.substr(0, bytes));
    ask_everything(ElfFile::open(file.get(), "truncated"));
  }
  Fd file = file_of(program.substr(0, 300));
  auto elf = ElfFile::open(file.get(), "truncated");
  REQUIRE(elf.ok());
  CHECK_FALSE(elf->interpreter().ok());
  CHECK(elf->build_id().empty());
}

TEST_CASE("an ELF file with damaged headers is read without harm") {
  const unsigned seed = std::random_device()();
  INFO("seed " << seed);
  std::mt19937 random(seed);
  const std::string vdso = own_vdso(), program = read_whole_file("/bin/sh")->substr(0, 8192);
  BeforeTheEdge edge(vdso.size());
  for (int round = 0; round < 20'000; ++round) {
    std::string bytes = round % 10 == 0 ? program : vdso;
    const size_t headers = sizeof(Elf64_Ehdr) + 12 * sizeof(Elf64_Phdr), end = bytes.size();
    for (unsigned i = 0; i < 1 + random() % 4; ++i) {
      // Program headers are at the start, section headers at the end.
      const size_t at = random() % 2 == 0 ? EI_CLASS + random() % (headers - EI_CLASS) : end - 1 - random() % 1200;
      bytes[at] = static_cast<char>(random() % 3 == 0 ? 0xff : random());
    }
    if (round % 10 != 0) {
      ask_everything(ElfFile::in_memory(edge.put(bytes)));
    } else {
      Fd file = file_of(bytes);
      ask_everything(ElfFile::open(file.get(), "damaged"));
    }
  }
}

TEST_CASE("a file that claims millions of sections does not cost memory for each") {
  std::string bytes = read_whole_file("/bin/sh")->substr(0, 4096);
  auto* header = reinterpret_cast<Elf64_Ehdr*>(bytes.data());
  constexpr uint64_t kSections = 4'000'000;
  header->e_shnum = 0;
  header->e_shoff = bytes.size();
  Elf64_Shdr first{};
  first.sh_size = kSections;
  bytes.append(reinterpret_cast<const char*>(&first), sizeof first);
  Fd file = file_of(bytes);
  REQUIRE(::ftruncate(file.get(), static_cast<off_t>(bytes.size() + kSections * sizeof first)) == 0);
  rusage before{}, after{};
  ::getrusage(RUSAGE_SELF, &before);
  auto elf = ElfFile::open(file.get(), "hollow");
  ::getrusage(RUSAGE_SELF, &after);
  REQUIRE_FALSE(elf.ok());
  CHECK(elf.error().message().find("hollow has more sections") != std::string::npos);
  CHECK(after.ru_maxrss - before.ru_maxrss < 100'000);  // KiB
}
