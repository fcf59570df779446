// What vmckpt wants to know of an ELF file: which machine and linker it is for, which build it is, where its functions lie.
// By libelf, which checks what a file says against the file's size; so a file may be hostile, truncated, or change meanwhile.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/result.h"

struct Elf;  // libelf's

namespace vmckpt {

struct ElfNote {
  std::string owner;  // "GNU"
  uint32_t type = 0;
  std::string content;
};

class ElfFile {
 public:
  // Borrowed: descriptor and memory must live as long as this.
  static Result<ElfFile> open(int fd, const std::string& name);
  static Result<ElfFile> in_memory(std::string_view bytes);

  bool is_64_bit_x86() const;
  Result<std::string> interpreter() const;  // of PT_INTERP; empty without one
  std::vector<ElfNote> notes() const;       // of all PT_NOTE segments, as far as they can be read
  std::string build_id() const;             // empty without one
  std::map<std::string, uint64_t> functions() const;  // dynamic symbols by name, with their values

 private:
  struct End {
    void operator()(::Elf* elf) const;
  };
  ElfFile(::Elf* elf, std::string name) : elf_(elf), name_(std::move(name)) {}
  static Result<ElfFile> checked(::Elf* elf, const std::string& name);
  Error failed(const std::string& what) const;

  std::unique_ptr<::Elf, End> elf_;
  std::string name_;
};

}  // namespace vmckpt
