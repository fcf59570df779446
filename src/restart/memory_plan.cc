#include "restart/memory_plan.h"

#include <algorithm>
#include <vector>

#include <linux/prctl.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/syscall.h>

#include "core/page.h"
#include "image/one_process.h"
#include "restart/page_reads.h"

namespace vmckpt {
namespace {

// Of all guest RAM: runs below this many bytes are read, others mapped. A mapping for each page would fray the address space,
// slow down the next fork, and count against vm.max_map_count.
uint64_t choose_read_threshold(const std::vector<PageRun>& runs) {
  constexpr uint64_t kReadBudgetBytes = 24u << 20;  // about 10 ms
  constexpr size_t kMaxImageMappings = 10'000;      // each is two of vm.max_map_count's 65,530: the run, and the gap behind it
  auto mapped = [&](uint64_t threshold) {
    return static_cast<size_t>(
        std::count_if(runs.begin(), runs.end(), [&](const PageRun& run) { return run.bytes >= threshold; }));
  };
  uint64_t threshold = 256u << 10;
  while (mapped(threshold) > kMaxImageMappings) threshold *= 2;
  if (threshold > 256u << 10) return threshold;
  for (; threshold > kPageBytes; threshold /= 2) {
    uint64_t bytes = 0;
    for (const PageRun& run : runs) bytes += run.bytes < threshold ? run.bytes : 0;
    if (bytes <= kReadBudgetBytes || mapped(threshold / 2) > kMaxImageMappings) return threshold;
  }
  return 0;
}

bool has_advice(const pb::Mapping& mapping, const char* flag) {
  return std::find(mapping.advice().begin(), mapping.advice().end(), flag) != mapping.advice().end();
}

class MemoryPlanner {
 public:
  MemoryPlanner(const ImageReader& image, const GuestRam& guest_ram, const MappingSources& sources, TapeDraft& tape)
      : image_(image), guest_ram_(guest_ram), sources_(sources), tape_(tape), runs_(image.pages().runs_of(0)) {
    std::vector<PageRun> of_guest_ram = runs_;
    std::erase_if(of_guest_ram, [&](const PageRun& run) { return run.zero || !guest_ram.holds(run.address); });
    read_guest_ram_below_ = choose_read_threshold(of_guest_ram);
    constexpr int kDroppable = 0x08;  // MAP_DROPPABLE (include/uapi/linux/mman.h), a type like MAP_PRIVATE
    if (void* page = ::mmap(nullptr, kPageBytes, PROT_NONE, kDroppable | MAP_ANONYMOUS, -1, 0); page != MAP_FAILED) {
      ::munmap(page, kPageBytes);
      droppable_ = kDroppable;
    }
  }

  // The mapping, empty, and writable where content is to come.
  Result<void> add(const pb::Mapping& mapping) {
    if (mapping.kind() == pb::Mapping::VDSO || mapping.kind() == pb::Mapping::VCPU_RUN) return {};
    if (mapping.kind() == pb::Mapping::AIO_RING) {
      // io_setup must not choose this place, or one that overlaps it: the ring is moved here, and mremap refuses that.
      tape_.call(SYS_mmap, {mapping.start(), mapping.end() - mapping.start(), PROT_NONE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, ~uint64_t{0}, 0},
                 true, fmt::format("keep the place of an AIO ring at {:#x}", mapping.start()));
      return {};
    }
    const std::vector<PageRun> runs = take_runs(mapping);
    const uint64_t protection = runs.empty() ? mapping.protection() : mapping.protection() | PROT_READ | PROT_WRITE;
    VMCKPT_TRY(map(mapping, protection));
    const uint64_t read_below = guest_ram_.is_mapped(mapping) ? read_guest_ram_below_ : ~uint64_t{0};
    for (const PageRun& run : runs) {
      if (run.zero) zeros_.push_back(run);
      else if (run.bytes < read_below) reads_.add(run);
      else map_run(mapping, run);
    }
    advise(mapping, kBeforeContent);
    mappings_.push_back({&mapping, protection});
    return {};
  }

  // Content, and what must come after it.
  void finish(const std::vector<pid_t>& helper_numbers) {
    reads_.draft(image_.fd(), helper_numbers, tape_);
    draft_zeros();
    for (const auto& [mapping, first_protection] : mappings_) {
      if (first_protection != mapping->protection()) {
        tape_.call(SYS_mprotect, {mapping->start(), mapping->end() - mapping->start(), mapping->protection()}, true,
                   fmt::format("protect memory at {:#x}", mapping->start()));
      }
      advise(*mapping, kAfterContent);
      install_guards(*mapping);  // not to be had on locked memory
      if (has_advice(*mapping, "lo")) {
        tape_.call(SYS_mlock2, {mapping->start(), mapping->end() - mapping->start(), MLOCK_ONFAULT});
      }
    }
  }

 private:
  static uint64_t noreserve(const pb::Mapping& mapping) { return has_advice(mapping, "nr") ? MAP_NORESERVE : 0; }

  // The runs inside a mapping, cut to it. Mappings and runs are both sorted. New anonymous memory is zeros by itself.
  std::vector<PageRun> take_runs(const pb::Mapping& mapping) {
    std::vector<PageRun> taken;
    while (next_ < runs_.size() && runs_[next_].address < mapping.end()) {
      PageRun& run = runs_[next_];
      if (run.address < mapping.start()) {  // validated images have none
        ++next_;
        continue;
      }
      uint64_t bytes = std::min(run.bytes, mapping.end() - run.address);
      if (!run.zero || mapping.kind() != pb::Mapping::ANONYMOUS) taken.push_back({run.address, bytes, run.file_offset, run.zero});
      if (bytes == run.bytes) {
        ++next_;
      } else {
        run = {run.address + bytes, run.bytes - bytes, run.zero ? 0 : run.file_offset + bytes, run.zero};
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
      flags |= has_advice(mapping, "dp") ? droppable_ : MAP_PRIVATE;
      flags |= MAP_ANONYMOUS;
      if (has_advice(mapping, "gd")) flags |= MAP_GROWSDOWN | MAP_STACK;
    } else {
      const bool is_private = mapping.kind() == pb::Mapping::FILE_PRIVATE || mapping.kind() == pb::Mapping::CAPTURED_PRIVATE;
      flags |= is_private ? MAP_PRIVATE : MAP_SHARED;
      fd = static_cast<uint64_t>(VMCKPT_TRY(sources_.file(mapping)));
      offset = mapping.file_offset();
    }
    tape_.call(SYS_mmap, {mapping.start(), mapping.end() - mapping.start(), protection, flags, fd, offset}, true,
               fmt::format("map {} bytes at {:#x} ({})", mapping.end() - mapping.start(), mapping.start(),
                           mapping.name().empty() ? "anonymous" : mapping.name()));
    return {};
  }

  // Zeros over a mapped file, which shows where nothing is written.
  void draft_zeros() {
    if (zeros_.empty()) return;
    const TapeWord zeros = tape_.room(kMaxRecordBytes);
    for (const PageRun& run : zeros_) {
      for (uint64_t at = 0; at < run.bytes; at += kMaxRecordBytes) {
        tape_.call(kOpCopyBytes, {run.address + at, zeros, std::min(kMaxRecordBytes, run.bytes - at)}, true,
                   "write zeros over a mapped file");
      }
    }
  }

  void map_run(const pb::Mapping& mapping, const PageRun& run) {
    tape_.call(SYS_mmap, {run.address, run.bytes, mapping.protection(), MAP_PRIVATE | MAP_FIXED | noreserve(mapping),
                          static_cast<uint64_t>(image_.fd()), run.file_offset},
               true, fmt::format("map {} bytes of guest memory at {:#x} from the image", run.bytes, run.address));
  }

  struct Advice {
    const char* flag;
    int advice;
  };
  // Whether content comes in huge pages is decided when it comes.
  static constexpr Advice kBeforeContent[] = {{"hg", MADV_HUGEPAGE}, {"nh", MADV_NOHUGEPAGE}};
  static constexpr Advice kAfterContent[] = {{"dc", MADV_DONTFORK},   {"dd", MADV_DONTDUMP},   {"mg", MADV_MERGEABLE},
                                             {"wf", MADV_WIPEONFORK}, {"sr", MADV_SEQUENTIAL}, {"rr", MADV_RANDOM}};

  template <size_t kCount>
  void advise(const pb::Mapping& mapping, const Advice (&advices)[kCount]) {
    for (const auto& [flag, advice] : advices) {
      // Not an error when refused: advice is advice (a kernel without huge pages, say).
      if (!has_advice(mapping, flag)) continue;
      tape_.call(SYS_madvise, {mapping.start(), mapping.end() - mapping.start(), static_cast<uint64_t>(advice)});
    }
  }

  // The guard regions inside a mapping. They take content away, so they come after it.
  void install_guards(const pb::Mapping& mapping) {
    constexpr uint64_t kGuardInstall = 102;  // MADV_GUARD_INSTALL (include/uapi/asm-generic/mman-common.h)
    const auto& guards = one_process(image_.metadata()).memory.guards();
    for (; next_guard_ < guards.size() && guards[next_guard_].start() < mapping.end(); ++next_guard_) {
      const uint64_t start = std::max(guards[next_guard_].start(), mapping.start()), end = guards[next_guard_].end();
      const uint64_t stop = std::min(end, mapping.end());
      if (start < stop) {
        tape_.call(SYS_madvise, {start, stop - start, kGuardInstall}, true,
                   fmt::format("make the guard region at {:#x} again", start));
      }
      if (end > stop) break;  // the rest is the next mapping's
    }
  }

  const ImageReader& image_;
  const GuestRam& guest_ram_;
  const MappingSources& sources_;
  TapeDraft& tape_;
  std::vector<PageRun> runs_;
  uint64_t read_guest_ram_below_ = 0;
  size_t next_ = 0;
  PageReads reads_;
  std::vector<PageRun> zeros_;
  std::vector<std::pair<const pb::Mapping*, uint64_t>>
      mappings_;  // with the protection that they have until their content is there
  int next_guard_ = 0;
  uint64_t droppable_ = MAP_PRIVATE;  // before Linux 6.11 it is just wiped on fork
};

}  // namespace

Result<void> plan_memory(const pb::AddressSpace& space, const ImageReader& image, const GuestRam& guest_ram,
                         const MappingSources& sources, const std::vector<pid_t>& helper_numbers, TapeDraft& tape) {
  MemoryPlanner planner(image, guest_ram, sources, tape);
  for (const pb::Mapping& mapping : space.mappings()) VMCKPT_TRY(planner.add(mapping));
  planner.finish(helper_numbers);
  guest_ram.draft_ledger(tape);
  if (space.mlockall_flags() & MCL_FUTURE) tape.call(SYS_mlockall, {space.mlockall_flags() & (MCL_FUTURE | MCL_ONFAULT)});
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
  const TapeWord auxv = tape.data(space.auxv().data(), space.auxv().size());
  const TapeWord argument = tape.data_of(layout);
  tape.point(argument, offsetof(prctl_mm_map, auxv), auxv);
  tape.call(SYS_prctl, {PR_SET_MM, PR_SET_MM_MAP, argument, sizeof layout, 0}, true, "set brk, arguments and executable");
}

}  // namespace vmckpt
