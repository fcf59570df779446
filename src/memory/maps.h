// /proc/PID/maps and the VmFlags of /proc/PID/smaps as data (proc(5)).
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include <sys/types.h>

#include "core/result.h"

namespace vmckpt {

struct Vma {
  uint64_t start = 0;
  uint64_t end = 0;
  uint32_t protection = 0;  // PROT_*
  bool shared = false;
  uint64_t file_offset = 0;
  std::string device;  // "fd:01" as maps prints it; on btrfs it is not stat's st_dev
  uint64_t inode = 0;
  std::string name;  // path, [heap], [vdso] ... or empty

  uint64_t bytes() const { return end - start; }
  bool deleted() const;
  // A part of the vdso: [vdso], [vvar], [vvar_vclock].
  bool is_vdso_part() const;
};

std::vector<Vma> parse_maps(const std::string& text);
Result<std::vector<Vma>> read_maps(pid_t pid);

// VmFlags by start address: "rd wr mr mw me ac hg dc". Reading smaps walks page tables: do it before the freeze where possible.
using VmFlags = std::unordered_map<uint64_t, std::pair<uint64_t, std::string>>;  // start -> (end, flags)
Result<VmFlags> read_vm_flags(pid_t pid);

// What smaps says of each mapping, in rising order.
struct MappingUse {
  uint64_t start = 0;
  uint64_t end = 0;
  uint64_t resident_kb = 0;
  uint64_t swapped_kb = 0;
};
std::vector<MappingUse> parse_mapping_uses(const std::string& smaps);
Result<std::vector<MappingUse>> read_mapping_uses(pid_t pid);

bool has_flag(const std::string& flags, const char* two_letters);

}  // namespace vmckpt
