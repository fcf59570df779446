#include "core/elf_file.h"

#include <algorithm>
#include <cstring>

#include <gelf.h>
#include <limits.h>
#include <unistd.h>

namespace vmckpt {
namespace {

constexpr uint64_t kMaxNoteBytes = 64 * 1024;  // of one segment

// libelf takes some 200 bytes for each section as it begins, before anybody asks for one. A header can name 65,279; more are
// counted in the first section, which in a sparse file may say billions. Nothing that programs execute or map has as many.
template <class Header>
bool counts_sections_elsewhere(std::string_view start) {
  Header header{};
  std::memcpy(&header, start.data(), std::min(start.size(), sizeof header));
  return header.e_shnum == 0 && header.e_shoff != 0;
}

Result<void> check_section_count(std::string_view start, const std::string& name) {
  const bool of_32_bit = start.size() > EI_CLASS && start[EI_CLASS] == ELFCLASS32;
  if (of_32_bit ? counts_sections_elsewhere<Elf32_Ehdr>(start) : counts_sections_elsewhere<Elf64_Ehdr>(start)) {
    return error(name + " has more sections than any program");
  }
  return {};
}

}  // namespace

void ElfFile::End::operator()(::Elf* elf) const { ::elf_end(elf); }

Error ElfFile::failed(const std::string& what) const {
  return error(fmt::format("{} of {}: {}", what, name_, ::elf_errmsg(-1)), "is the file whole?");
}

Result<ElfFile> ElfFile::checked(::Elf* elf, const std::string& name) {
  if (elf == nullptr) return error(fmt::format("read {} as an ELF file: {}", name, ::elf_errmsg(-1)), "is the file whole?");
  ElfFile file(elf, name);
  GElf_Ehdr header;
  if (::elf_kind(elf) != ELF_K_ELF || ::gelf_getehdr(elf, &header) == nullptr) return error(name + " is no ELF file");
  return file;
}

Result<ElfFile> ElfFile::open(int fd, const std::string& name) {
  ::elf_version(EV_CURRENT);
  char start[sizeof(Elf64_Ehdr)] = {};
  const ssize_t got = ::pread(fd, start, sizeof start, 0);
  if (got < 0) return errno_error("read " + name);
  VMCKPT_TRY(check_section_count({start, static_cast<size_t>(got)}, name));
  // Reads with pread. ELF_C_READ_MMAP would end in SIGBUS where somebody truncates the file.
  return checked(::elf_begin(fd, ELF_C_READ, nullptr), name);
}

Result<ElfFile> ElfFile::in_memory(std::string_view bytes) {
  ::elf_version(EV_CURRENT);
  const std::string name = "an image in memory";
  VMCKPT_TRY(check_section_count(bytes, name));
  return checked(::elf_memory(const_cast<char*>(bytes.data()), bytes.size()), name);  // which writes only when told to
}

bool ElfFile::is_64_bit_x86() const {
  GElf_Ehdr header;
  if (::gelf_getehdr(elf_.get(), &header) == nullptr) return false;
  return header.e_ident[EI_CLASS] == ELFCLASS64 && header.e_machine == EM_X86_64;
}

Result<std::string> ElfFile::interpreter() const {
  size_t count = 0;
  if (::elf_getphdrnum(elf_.get(), &count) != 0) return failed("count the segments");
  for (size_t i = 0; i < count; ++i) {
    GElf_Phdr segment;
    if (::gelf_getphdr(elf_.get(), static_cast<int>(i), &segment) == nullptr) return failed("read the segments");
    if (segment.p_type != PT_INTERP) continue;
    const size_t bytes = std::min<uint64_t>(segment.p_filesz, PATH_MAX);
    const Elf_Data* data = ::elf_getdata_rawchunk(elf_.get(), static_cast<int64_t>(segment.p_offset), bytes, ELF_T_BYTE);
    if (data == nullptr || data->d_buf == nullptr) return failed("read the interpreter");
    const char* path = static_cast<const char*>(data->d_buf);
    return std::string(path, ::strnlen(path, data->d_size));
  }
  return std::string();
}

std::vector<ElfNote> ElfFile::notes() const {
  std::vector<ElfNote> notes;
  size_t count = 0;
  if (::elf_getphdrnum(elf_.get(), &count) != 0) return notes;
  for (size_t i = 0; i < count; ++i) {
    GElf_Phdr segment;
    if (::gelf_getphdr(elf_.get(), static_cast<int>(i), &segment) == nullptr) return notes;
    if (segment.p_type != PT_NOTE || segment.p_filesz == 0 || segment.p_filesz > kMaxNoteBytes) continue;
    Elf_Data* data = ::elf_getdata_rawchunk(elf_.get(), static_cast<int64_t>(segment.p_offset), segment.p_filesz,
                                            segment.p_align == 8 ? ELF_T_NHDR8 : ELF_T_NHDR);
    if (data == nullptr) continue;
    GElf_Nhdr note;
    size_t name_at = 0, content_at = 0, at = 0;
    while ((at = ::gelf_getnote(data, at, &note, &name_at, &content_at)) != 0) {
      const char* start = static_cast<const char*>(data->d_buf);
      notes.push_back({std::string(start + name_at, ::strnlen(start + name_at, note.n_namesz)), note.n_type,
                       std::string(start + content_at, note.n_descsz)});
    }
  }
  return notes;
}

std::string ElfFile::build_id() const {
  for (const ElfNote& note : notes()) {
    if (note.owner == "GNU" && note.type == NT_GNU_BUILD_ID) return note.content;
  }
  return {};
}

std::map<std::string, uint64_t> ElfFile::functions() const {
  std::map<std::string, uint64_t> functions;
  for (Elf_Scn* section = nullptr; (section = ::elf_nextscn(elf_.get(), section)) != nullptr;) {
    GElf_Shdr header;
    if (::gelf_getshdr(section, &header) == nullptr || header.sh_type != SHT_DYNSYM) continue;
    Elf_Data* symbols = ::elf_getdata(section, nullptr);
    GElf_Sym symbol;
    for (int i = 0; symbols != nullptr && ::gelf_getsym(symbols, i, &symbol) != nullptr; ++i) {
      if (GELF_ST_TYPE(symbol.st_info) != STT_FUNC) continue;
      const char* name = ::elf_strptr(elf_.get(), header.sh_link, symbol.st_name);
      if (name != nullptr) functions[name] = symbol.st_value;
    }
    break;  // a file has one such section; a hostile one may name the same symbols in thousands
  }
  return functions;
}

}  // namespace vmckpt
