#include "restart/memory_plan.h"

#include <algorithm>
#include <vector>

#include <linux/prctl.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>

namespace vmckpt {
namespace {

constexpr uint64_t kReadBudgetBytes = 24u << 20;  // read into place in all: about 10 ms
constexpr size_t kMaxImageMappings = 20'000;      // well below vm.max_map_count's 65530
constexpr uint64_t kLongestReadBytes = 256u << 10;

struct Run {  // pages that follow one another in memory and in the image
  uint64_t address;
  uint64_t bytes;
  uint64_t file_offset;
};

std::vector<Run> runs_of(const std::vector<PageRecord>& records) {
  std::vector<Run> runs;
  for (const PageRecord& record : records) {
    if (!runs.empty() && runs.back().address + runs.back().bytes == record.address &&
        runs.back().file_offset + runs.back().bytes == record.file_offset) {
      runs.back().bytes += record.bytes;
    } else {
      runs.push_back({record.address, record.bytes, record.file_offset});
    }
  }
  return runs;
}

// Runs below this many bytes are read, others mapped: as much is read as the budget allows, more only where mappings run out.
uint64_t choose_read_threshold(const std::vector<Run>& runs) {
  for (uint64_t threshold = kLongestReadBytes; threshold > 4096; threshold /= 2) {
    uint64_t bytes = 0;
    for (const Run& run : runs) bytes += run.bytes < threshold ? run.bytes : 0;
    if (bytes <= kReadBudgetBytes) return threshold;
    auto mapped = std::count_if(runs.begin(), runs.end(), [&](const Run& run) { return run.bytes >= threshold / 2; });
    if (static_cast<size_t>(mapped) > kMaxImageMappings) return threshold;
  }
  return 0;
}

bool has_advice(const pb::Mapping& mapping, const char* flag) {
  return std::find(mapping.advice().begin(), mapping.advice().end(), flag) != mapping.advice().end();
}

class MemoryPlanner {
 public:
  MemoryPlanner(const ImageReader& image, const MappingSources& sources, TapeDraft& tape)
      : image_(image), sources_(sources), tape_(tape), runs_(runs_of(image.records_of(0))) {
    read_below_ = choose_read_threshold(runs_);
    struct statvfs file_system {};
    image_is_noexec_ = ::fstatvfs(image.fd(), &file_system) == 0 && (file_system.f_flag & ST_NOEXEC);
  }

  Result<void> add(const pb::Mapping& mapping) {
    if (mapping.kind() == pb::Mapping::VDSO || mapping.kind() == pb::Mapping::VCPU_RUN) return {};
    std::vector<Run> runs = take_runs(mapping);
    bool writes = std::any_of(runs.begin(), runs.end(), [&](const Run& run) { return is_read(mapping, run); });
    // Contents are put in through a writable mapping; the real protection comes after.
    uint64_t protection = mapping.protection();
    uint64_t first_protection = writes ? protection | PROT_READ | PROT_WRITE : protection;
    VMCKPT_TRY(map(mapping, first_protection));
    for (const Run& run : runs) {
      if (is_read(mapping, run)) {
        tape_.call(kOpReadExactly, {fd(), run.address, run.bytes, run.file_offset}, true,
                   fmt::format("read {} bytes of memory at {:#x} from the image", run.bytes, run.address));
      } else {
        tape_.call(SYS_mmap, {run.address, run.bytes, protection, MAP_PRIVATE | MAP_FIXED | noreserve(mapping), fd(),
                              run.file_offset},
                   true, fmt::format("map {} bytes of memory at {:#x} from the image", run.bytes, run.address));
      }
    }
    if (first_protection != protection) {
      tape_.call(SYS_mprotect, {mapping.start(), mapping.end() - mapping.start(), protection}, true,
                 fmt::format("protect memory at {:#x}", mapping.start()));
    }
    advise(mapping);
    return {};
  }

 private:
  uint64_t fd() const { return static_cast<uint64_t>(image_.fd()); }

  static uint64_t noreserve(const pb::Mapping& mapping) { return has_advice(mapping, "nr") ? MAP_NORESERVE : 0; }

  // A stack must stay one mapping that grows; small changes to a file mapping must not cut it up.
  bool is_read(const pb::Mapping& mapping, const Run& run) const {
    // The kernel maps nothing executable from a file system that is mounted noexec.
    // Wipe-on-fork is for anonymous memory only.
    return run.bytes < read_below_ || has_advice(mapping, "gd") || has_advice(mapping, "wf") || (image_is_noexec_ && (mapping.protection() & PROT_EXEC));
  }

  // The runs inside a mapping, cut to it. Mappings and runs are both sorted.
  std::vector<Run> take_runs(const pb::Mapping& mapping) {
    std::vector<Run> taken;
    while (next_ < runs_.size() && runs_[next_].address < mapping.end()) {
      Run& run = runs_[next_];
      if (run.address < mapping.start()) {  // validated images have none
        ++next_;
        continue;
      }
      uint64_t bytes = std::min(run.bytes, mapping.end() - run.address);
      taken.push_back({run.address, bytes, run.file_offset});
      if (bytes == run.bytes) {
        ++next_;
      } else {
        run = {run.address + bytes, run.bytes - bytes, run.file_offset + bytes};
      }
    }
    return taken;
  }

  // The whole of a segment at once, by its first mapping: the kernel attaches no part. Others only differ in protection.
  void attach(const pb::Mapping& mapping, int id, uint64_t protection) {
    const uint64_t flags = SHM_REMAP | (mapping.writable_file() ? 0 : SHM_RDONLY) | (protection & PROT_EXEC ? SHM_EXEC : 0);
    if (mapping.file_offset() == 0) {
      tape_.call(SYS_shmat, {static_cast<uint64_t>(id), mapping.start(), flags}, true,
                 fmt::format("attach the System V segment {} at {:#x}", id, mapping.start()));
    }
    tape_.call(SYS_mprotect, {mapping.start(), mapping.end() - mapping.start(), protection}, true,
               fmt::format("protect memory at {:#x}", mapping.start()));
  }

  Result<void> map(const pb::Mapping& mapping, uint64_t protection) {
    if (int segment = sources_.segment(mapping); segment >= 0) {
      attach(mapping, segment, protection);
      return {};
    }
    uint64_t flags = MAP_FIXED | noreserve(mapping);
    uint64_t fd = ~uint64_t{0}, offset = 0;
    if (mapping.kind() == pb::Mapping::ANONYMOUS) {
      flags |= MAP_PRIVATE | MAP_ANONYMOUS;
      if (has_advice(mapping, "gd")) flags |= MAP_GROWSDOWN | MAP_STACK;
    } else {
      flags |= mapping.kind() == pb::Mapping::FILE_PRIVATE ? MAP_PRIVATE : MAP_SHARED;
      fd = static_cast<uint64_t>(VMCKPT_TRY(sources_.file(mapping)));
      offset = mapping.file_offset();
    }
    tape_.call(SYS_mmap, {mapping.start(), mapping.end() - mapping.start(), protection, flags, fd, offset}, true,
               fmt::format("map {} bytes at {:#x} ({})", mapping.end() - mapping.start(), mapping.start(),
                           mapping.name().empty() ? "anonymous" : mapping.name()));
    return {};
  }

  void advise(const pb::Mapping& mapping) {
    static constexpr struct {
      const char* flag;
      int advice;
    } kAdvice[] = {{"dc", MADV_DONTFORK},  {"dd", MADV_DONTDUMP},   {"hg", MADV_HUGEPAGE},   {"nh", MADV_NOHUGEPAGE},
                   {"mg", MADV_MERGEABLE}, {"wf", MADV_WIPEONFORK}, {"sr", MADV_SEQUENTIAL}, {"rr", MADV_RANDOM}};
    const uint64_t bytes = mapping.end() - mapping.start();
    for (const auto& [flag, advice] : kAdvice) {
      // Not an error when refused: advice is advice (wipe-on-fork, say, is not to be had on image-backed memory).
      if (has_advice(mapping, flag)) tape_.call(SYS_madvise, {mapping.start(), bytes, static_cast<uint64_t>(advice)});
    }
    if (has_advice(mapping, "lo")) tape_.call(SYS_mlock2, {mapping.start(), bytes, MLOCK_ONFAULT});
  }

  const ImageReader& image_;
  const MappingSources& sources_;
  TapeDraft& tape_;
  std::vector<Run> runs_;
  size_t next_ = 0;
  uint64_t read_below_ = 0;
  bool image_is_noexec_ = false;
};

}  // namespace

Result<void> plan_memory(const pb::AddressSpace& space, const ImageReader& image, const MappingSources& sources, TapeDraft& tape) {
  MemoryPlanner planner(image, sources, tape);
  for (const pb::Mapping& mapping : space.mappings()) VMCKPT_TRY(planner.add(mapping));
  if (space.mlockall_flags() != 0) tape.call(SYS_mlockall, {space.mlockall_flags() & MCL_FUTURE});
  return {};
}

void plan_layout(const pb::AddressSpace& space, int executable_fd, TapeDraft& tape) {
  prctl_mm_map layout{};
  layout.start_code = space.start_code();
  layout.end_code = space.end_code();
  layout.start_data = space.start_data();
  layout.end_data = space.end_data();
  layout.start_brk = space.start_brk();
  layout.brk = space.brk();
  layout.start_stack = space.start_stack();
  layout.arg_start = space.arg_start();
  layout.arg_end = space.arg_end();
  layout.env_start = space.env_start();
  layout.env_end = space.env_end();
  layout.auxv_size = static_cast<uint32_t>(space.auxv().size());
  layout.exe_fd = static_cast<uint32_t>(executable_fd);
  uint64_t auxv = tape.data(space.auxv().data(), space.auxv().size());
  uint64_t argument = tape.data_of(layout);
  tape.point(argument, offsetof(prctl_mm_map, auxv), auxv);
  tape.call(SYS_prctl, {PR_SET_MM, PR_SET_MM_MAP, argument, sizeof layout, 0}, true, "set brk, arguments and executable");
}

}  // namespace vmckpt
