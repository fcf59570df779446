#include "memory/maps.h"

#include <algorithm>

#include <sys/mman.h>

#include "core/fd.h"
#include "core/proc.h"

namespace vmckpt {
namespace {

// Takes the word up to `end` and what separates it from the next one.
std::string_view take_word(std::string_view& line, char end) {
  std::string_view word = line.substr(0, line.find(end));
  line.remove_prefix(std::min(line.size(), word.size() + 1));
  return word;
}

// start-end perms offset dev inode   name. Within the pause, hundreds of times: nothing is allocated but what is kept.
bool parse_line(std::string_view line, Vma* vma) {
  const std::string_view start = take_word(line, '-'), end = take_word(line, ' ');
  const std::string_view permissions = take_word(line, ' '), offset = take_word(line, ' ');
  const std::string_view device = take_word(line, ' '), inode = take_word(line, ' ');
  if (permissions.size() != 4 || inode.empty()) return false;
  vma->start = parse_hex(start);
  vma->end = parse_hex(end);
  vma->protection = (permissions[0] == 'r' ? PROT_READ : 0u) | (permissions[1] == 'w' ? PROT_WRITE : 0u) |
                    (permissions[2] == 'x' ? PROT_EXEC : 0u);
  vma->shared = permissions[3] == 's';
  vma->file_offset = parse_hex(offset);
  vma->device = std::string(device);
  vma->inode = static_cast<uint64_t>(parse_number(inode));
  // The name starts after the inode and may contain blanks.
  line.remove_prefix(std::min(line.size(), line.find_first_not_of(' ')));
  vma->name = std::string(line);
  return true;
}

}  // namespace

bool Vma::deleted() const { return name.ends_with(" (deleted)"); }

bool Vma::is_vdso_part() const { return name == "[vdso]" || name.starts_with("[vvar"); }

std::vector<Vma> parse_maps(const std::string& text) {
  std::vector<Vma> vmas;
  const std::vector<std::string_view> lines = split_lines(text);
  vmas.reserve(lines.size());
  for (std::string_view line : lines) {
    Vma vma;
    if (parse_line(line, &vma)) vmas.push_back(std::move(vma));
  }
  return vmas;
}

Result<std::vector<Vma>> read_maps(pid_t pid) {
  return parse_maps(VMCKPT_TRY(read_whole_file(fmt::format("/proc/{}/maps", pid))));
}

Result<VmFlags> read_vm_flags(pid_t pid) {
  std::string text = VMCKPT_TRY(read_whole_file(fmt::format("/proc/{}/smaps", pid)));
  VmFlags flags;
  Vma current;
  for (std::string_view line : split_lines(text)) {
    if (line.starts_with("VmFlags:")) {
      flags[current.start] = {current.end, std::string(line.substr(8))};
    } else if (!line.empty() && (line[0] < 'A' || line[0] > 'Z')) {
      parse_line(line, &current);
    }
  }
  return flags;
}

std::vector<MappingUse> parse_mapping_uses(const std::string& smaps) {
  std::vector<MappingUse> uses;
  for (std::string_view line : split_lines(smaps)) {
    if (line.starts_with("Rss:")) {
      uses.back().resident_kb = static_cast<uint64_t>(parse_number(split_words(line)[1]));
    } else if (line.starts_with("Swap:")) {
      uses.back().swapped_kb = static_cast<uint64_t>(parse_number(split_words(line)[1]));
    } else if (Vma vma; !line.empty() && (line[0] < 'A' || line[0] > 'Z') && parse_line(line, &vma)) {
      uses.push_back({vma.start, vma.end, 0, 0});
    }
  }
  return uses;
}

Result<std::vector<MappingUse>> read_mapping_uses(pid_t pid) {
  return parse_mapping_uses(VMCKPT_TRY(read_whole_file(fmt::format("/proc/{}/smaps", pid))));
}

bool has_flag(const std::string& flags, const char* two_letters) {
  // Asked twenty times for each mapping within the pause: all words have two letters, one blank between.
  for (size_t at = !flags.empty() && flags[0] == ' ' ? 1 : 0; at + 1 < flags.size(); at += 3) {
    if (flags[at] == two_letters[0] && flags[at + 1] == two_letters[1]) return true;
  }
  return false;
}

}  // namespace vmckpt
