#include "memory/maps.h"

#include <sys/mman.h>

#include "core/fd.h"
#include "core/proc.h"

namespace vmckpt {
namespace {

// start-end perms offset dev inode   name
bool parse_line(std::string_view line, Vma* vma) {
  auto words = split_words(line.substr(0, 100));
  if (words.size() < 5 || words[1].size() != 4) return false;
  size_t dash = words[0].find('-');
  if (dash == std::string_view::npos) return false;
  vma->start = parse_hex(words[0].substr(0, dash));
  vma->end = parse_hex(words[0].substr(dash + 1));
  std::string_view permissions = words[1];
  vma->protection = (permissions[0] == 'r' ? PROT_READ : 0u) | (permissions[1] == 'w' ? PROT_WRITE : 0u) |
                    (permissions[2] == 'x' ? PROT_EXEC : 0u);
  vma->shared = permissions[3] == 's';
  vma->file_offset = parse_hex(words[2]);
  vma->device = std::string(words[3]);
  vma->inode = static_cast<uint64_t>(parse_number(words[4]));
  // The name starts after the inode and may contain blanks.
  size_t after_inode = static_cast<size_t>(words[4].data() + words[4].size() - line.data());
  size_t name = line.find_first_not_of(' ', after_inode);
  if (name != std::string_view::npos) vma->name = std::string(line.substr(name));
  return true;
}

}  // namespace

bool Vma::deleted() const { return name.ends_with(" (deleted)"); }

bool Vma::is_vdso_part() const { return name == "[vdso]" || name.starts_with("[vvar"); }

std::vector<Vma> parse_maps(const std::string& text) {
  std::vector<Vma> vmas;
  for (std::string_view line : split_lines(text)) {
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
  // Asked a dozen times for each mapping within the pause: words of two letters between blanks, no need to split.
  for (size_t at = 0; at + 1 < flags.size(); ++at) {
    if (flags[at] != two_letters[0] || flags[at + 1] != two_letters[1]) continue;
    const bool starts = at == 0 || flags[at - 1] == ' ', ends = at + 2 == flags.size() || flags[at + 2] == ' ';
    if (starts && ends) return true;
  }
  return false;
}

}  // namespace vmckpt
