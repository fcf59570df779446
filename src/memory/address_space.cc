#include "memory/address_space.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>
#include <optional>
#include <set>

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>

#include "core/fd.h"
#include "core/page.h"
#include "core/proc.h"
#include "memory/page_scan.h"
#include "memory/system_v_segment.h"
#include "tracer/remote_memory.h"

namespace vmckpt {
namespace {

constexpr char kRecorderName[] = "/libvmckpt.so";

// Advice that is kept (proc(5), VmFlags) because the kernel shows it and madvise or mlock sets it.
// "dp" is no advice: it was mapped with MAP_DROPPABLE (Linux 6.11).
constexpr const char* kKeptAdvice[] = {"dc", "dd", "hg", "nh", "mg", "wf", "sr", "rr", "lo", "gd", "nr", "dp"};

std::string keep_advice(const std::string& flags, google::protobuf::RepeatedPtrField<std::string>* kept) {
  std::string joined;
  for (const char* flag : kKeptAdvice) {
    if (!has_flag(flags, flag)) continue;
    kept->Add(flag);
    joined += flag;
  }
  return joined;
}

const pb::FileIdentity& known_identity(pid_t pid, const std::string& path, std::map<std::string, pb::FileIdentity>& identities) {
  auto known = identities.find(path);
  if (known != identities.end()) return known->second;
  auto identity = identify_file(pid, path);
  return identities.emplace(path, identity.ok() ? *identity : pb::FileIdentity()).first->second;
}

class Saver {
 public:
  Saver(const StoppedWorld& world, const std::vector<Vma>& vmas, const BackingImage& backing, const AddressSpaceOptions& options,
        CapturedFiles& captured, AddressSpaceSave& save, std::map<std::string, pb::FileIdentity>& identities)
      : world_(world),
        vmas_(vmas),
        backing_(backing),
        options_(options),
        captured_(captured),
        save_(save),
        identities_(identities) {}

  Result<void> add(const Vma& vma, const std::string& flags) {
    if (vma.name == "[vsyscall]") return {};  // the kernel's own, at a fixed address in every process
    pb::Mapping mapping;
    mapping.set_start(vma.start);
    mapping.set_end(vma.end);
    mapping.set_protection(vma.protection);
    mapping.set_name(vma.name);
    keep_advice(flags, mapping.mutable_advice());
    if (vma.is_vdso_part()) {
      mapping.set_kind(pb::Mapping::VDSO);
      return append(std::move(mapping));
    }
    if (vma.name.starts_with("anon_inode:kvm-vcpu")) {
      mapping.set_kind(pb::Mapping::VCPU_RUN);
      return append(std::move(mapping));
    }
    if (vma.name.starts_with("/[aio]") && vma.shared) {
      mapping.set_kind(pb::Mapping::AIO_RING);  // modules/aio.cc looks at it
      return append(std::move(mapping));
    }
    VMCKPT_TRY(refuse_what_cannot_be_saved(vma, flags));
    if (vma.shared) {
      VMCKPT_TRY(look_for_guards(vma, flags));
      return add_shared(vma, flags, std::move(mapping));
    }
    if (has_flag(flags, "dp")) {
      // MAP_DROPPABLE: the kernel may take its content away at any time, and does so in a child. It comes back empty. (glibc
      // keeps the state of getrandom there, and draws a new one then.)
      VMCKPT_TRY(save_guards(vma));
      mapping.set_kind(pb::Mapping::ANONYMOUS);
      return append(std::move(mapping));
    }
    if (has_flag(flags, "dc")) save_.not_forked.push_back(vma);
    if (has_flag(flags, "wf")) save_.wiped_on_fork.push_back(vma);
    save_.mapped_bytes += vma.bytes();
    return add_private(vma, std::move(mapping));
  }

 private:
  Result<void> refuse_what_cannot_be_saved(const Vma& vma, const std::string& flags) {
    auto refuse = [&](const char* what, const char* cure) {
      return error(fmt::format("memory at {:#x} ({}) {}", vma.start, vma.name.empty() ? "unnamed" : vma.name, what), cure);
    };
    if (has_flag(flags, "ht") || vma.name.starts_with("/anon_hugepage")) {
      return refuse("is in huge pages (hugetlb), which cannot be saved yet", "use transparent huge pages instead");
    }
    if (vma.name.find("[io_uring]") != std::string::npos) {
      return refuse("is an io_uring, which cannot be saved",
                    "tell the program to use something else (QEMU: aio=threads or aio=native; fio: --ioengine=libaio), or launch "
                    "it without --allow-io-uring");
    }
    if (has_flag(flags, "pf") || has_flag(flags, "io")) {
      return refuse("belongs to a device that no module saves", "start the program without that device");
    }
    if (vma.name.starts_with("anon_inode:")) {
      return refuse("belongs to a kernel object that no module saves", "start the program without it");
    }
    return {};
  }

  Result<void> add_private(const Vma& vma, pb::Mapping mapping) {
    // A private mapping of the device is anonymous memory; "/dev/zero (deleted)" is an object of shared anonymous memory.
    bool anonymous = vma.inode == 0 || (vma.name.starts_with("/dev/zero") && !vma.deleted());
    bool from_image = !anonymous && vma.inode == backing_.inode && vma.device == backing_.device;
    if (anonymous || from_image) {
      // A restarted target's memory lies on its image; for the program, and for the next image, it is anonymous.
      mapping.set_kind(pb::Mapping::ANONYMOUS);
      if (from_image) mapping.clear_name();
      return append_with_pages(vma, std::move(mapping), from_image ? DumpRange::Pages::kAll : DumpRange::Pages::kTouched);
    }
    const pb::FileIdentity* file = named_file(vma);
    if (file == nullptr) {
      if (const uint64_t id = VMCKPT_TRY(capture_private(vma)); id != 0) {
        mapping.set_kind(pb::Mapping::CAPTURED_PRIVATE);
        mapping.set_file_offset(vma.file_offset);
        mapping.set_captured_id(id);
        return append_with_pages(vma, std::move(mapping), DumpRange::Pages::kModified);
      }
    }
    if (file == nullptr || options_.self_contained || vma.name.ends_with(kRecorderName)) {
      // No path leads to this file any more (an upgraded library, a memfd): its pages go into the image. So do the recorder's,
      // since an upgrade of vmckpt must not make images unusable.
      mapping.set_kind(pb::Mapping::ANONYMOUS);
      return append_with_pages(vma, std::move(mapping), DumpRange::Pages::kAll);
    }
    mapping.set_kind(pb::Mapping::FILE_PRIVATE);
    mapping.set_file_offset(vma.file_offset);
    *mapping.mutable_file() = *file;
    return append_with_pages(vma, std::move(mapping), DumpRange::Pages::kModified);
  }

  Result<void> add_shared(const Vma& vma, const std::string& flags, pb::Mapping mapping) {
    mapping.set_file_offset(vma.file_offset);
    if (vma.name.starts_with("/dev/") && !vma.name.starts_with("/dev/shm/") && !vma.name.starts_with("/dev/zero")) {
      return error(fmt::format("memory at {:#x} maps the device {}, which no module saves", vma.start, vma.name),
                   "start the program without that device");
    }
    if (const pb::FileIdentity* file = vma.name.starts_with("/dev/zero") ? nullptr : named_file(vma)) {
      if (may_write(vma, flags)) {
        if (const uint64_t id = VMCKPT_TRY(capture_named(vma, file->path(), flags)); id != 0) {
          mapping.set_kind(pb::Mapping::CAPTURED);
          mapping.set_captured_id(id);
          *mapping.mutable_file() = *file;  // how it is recognised: shared_files.h
          mapping.set_writable_file(true);
          return append(std::move(mapping));
        }
        keep(vma, file->path());
        note_uncaptured(vma);
      }
      mapping.set_kind(pb::Mapping::FILE_SHARED);
      *mapping.mutable_file() = *file;
      mapping.set_writable_file(may_write(vma, flags));
      return append(std::move(mapping));
    }
    mapping.set_kind(pb::Mapping::CAPTURED);
    mapping.set_captured_id(VMCKPT_TRY(capture(vma)));
    mapping.set_writable_file(may_write(vma, flags));
    if (is_system_v_name(vma.name)) note_segment(vma, mapping.captured_id());
    return append(std::move(mapping));
  }

  // Fork copies guard regions, so that the snapshot shows them, too, except in memory that it does not have.
  Result<void> look_for_guards(const Vma& vma, const std::string& flags) {
    if (!has_flag(flags, "dc")) {
      save_.ranges.push_back({vma.start, vma.end, DumpRange::Pages::kGuards});
      return {};
    }
    // Newer kernels say where there may be any; on others a VMM's RAM would have to be looked through within the pause.
    return has_flag(flags, "gu") ? save_guards(vma) : Result<void>();
  }

  // Of the stopped target itself.
  Result<void> save_guards(const Vma& vma) {
    if (!scanner_) scanner_ = VMCKPT_TRY(PageScanner::open(world_.pid()));
    return scanner_->scan(vma.start, vma.end, [&](const PageSpan& span) -> Result<void> {
      if (span.kind == PageSpan::Kind::kGuard) save_.guards.push_back({span.start, span.end});
      return {};
    });
  }

  // Whether the descriptor behind a shared mapping was open for writing (it could be made writable by mprotect).
  static bool may_write(const Vma& vma, const std::string& flags) {
    return (vma.protection & PROT_WRITE) || has_flag(flags, "mw");
  }

  Result<uint64_t> capture(const Vma& vma) {
    // With privileges the file itself can be opened, and its holes be told from its data.
    std::string link = fmt::format("/proc/{}/map_files/{:x}-{:x}", world_.pid(), vma.start, vma.end);
    if (auto fd = open_file(link, O_RDONLY); fd.ok()) return captured_.capture(fd->get(), vma.name);
    // A descriptor of the same file shows all of it, the mapping only its part.
    if (auto fd = descriptor_of(vma); fd.valid()) return captured_.capture(fd.get(), vma.name);
    return captured_.capture_mapping(world_.pid(), vma.start, vma.bytes(), vma.file_offset, parse_device(vma.device),
                                     vma.inode, vma.name);
  }

  // The object that a private mapping of no path shows, where that can be told from a copy: it is memory, which others write, or
  // the target has it in another way, too. 0: a copy of what the mapping shows will do (an upgraded library). Then, and where
  // there is no way to the object's own content, the mapping comes back as anonymous memory.
  Result<uint64_t> capture_private(const Vma& vma) {
    if (is_system_v_name(vma.name)) return 0;
    const Vma* twin = shared_twin(vma);
    const bool is_memory = vma.name.starts_with("/memfd:") || vma.name.starts_with("/dev/zero");
    Fd descriptor = descriptor_of(vma);
    if (!is_memory && twin == nullptr && !descriptor.valid()) return 0;
    std::string link = fmt::format("/proc/{}/map_files/{:x}-{:x}", world_.pid(), vma.start, vma.end);
    if (auto fd = open_file(link, O_RDONLY); fd.ok()) return captured_.capture(fd->get(), vma.name);
    if (descriptor.valid()) return captured_.capture(descriptor.get(), vma.name);
    if (twin == nullptr) return 0;
    const uint64_t id = VMCKPT_TRY(capture(*twin));
    return captured_.files().at(id).size_bytes() >= vma.file_offset + vma.bytes() ? id : 0;
  }

  const Vma* shared_twin(const Vma& vma) const {
    auto found = std::find_if(vmas_.begin(), vmas_.end(), [&](const Vma& other) {
      return other.shared && other.inode == vma.inode && other.device == vma.device;
    });
    return found == vmas_.end() ? nullptr : &*found;
  }

  // A file that is memory: nothing else keeps its content for the restart. 0 where it is left to the file.
  Result<uint64_t> capture_named(const Vma& vma, const std::string& path, const std::string& flags) {
    if (options_.shared_files == SharedFileContent::kNone) return 0;
    if (options_.shared_files != SharedFileContent::kAll && !is_on_tmpfs(path) && !is_guest_memory(vma, flags)) return 0;
    struct stat info {};
    Fd fd = open_named(vma, path, info);
    if (!fd) return 0;
    const uint64_t id = VMCKPT_TRY(captured_.capture(fd.get(), path));
    captured_.note_path(id, path);
    return id;
  }

  // Any other: a copy, should it be missing by then, if it is small. What cannot be copied is not worth a refusal.
  void keep(const Vma& vma, const std::string& path) {
    if (options_.shared_files == SharedFileContent::kNone) return;
    struct stat info {};
    Fd fd = open_named(vma, path, info);
    if (!fd || !S_ISREG(info.st_mode) || !captured_.has_room_to_keep(static_cast<uint64_t>(info.st_size))) return;
    if (auto id = captured_.capture(fd.get(), path, true); id.ok()) captured_.note_path_of_kept(*id, path);
  }

  Fd open_named(const Vma& vma, const std::string& path, struct stat& info) {
    Fd fd = descriptor_of(vma);
    if (!fd)
      fd = Fd(
          ::open(fmt::format("/proc/{}/map_files/{:x}-{:x}", world_.pid(), vma.start, vma.end).c_str(), O_RDONLY | O_CLOEXEC));
    if (!fd) fd = Fd(::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
    if (fd && (::fstat(fd.get(), &info) != 0 || info.st_ino != vma.inode)) fd.reset();
    return fd;
  }

  static bool is_on_tmpfs(const std::string& path) {
    struct statfs file_system {};
    return ::statfs(path.c_str(), &file_system) == 0 && file_system.f_type == TMPFS_MAGIC;
  }

  // VMMs keep RAM from being copied by fork, or have KVM use it.
  bool is_guest_memory(const Vma& vma, const std::string& flags) const {
    constexpr uint64_t kSmallestRamBytes = 1u << 20;
    return vma.bytes() >= kSmallestRamBytes && (has_flag(flags, "dc") || options_.is_vmm);
  }

  void note_uncaptured(const Vma& vma) {
    if ((vma.protection & PROT_WRITE) == 0 || !noted_.insert(vma.name).second) return;
    save_.notes.push_back(
        fmt::format("{} is mapped for writing: a restart finds in it what the file holds by then, not what it held "
                    "now (vmckpt checkpoint --shared-files=all saves it)",
                    vma.name));
  }

  // A segment of an IPC namespace of the target's own comes back as plain shared memory.
  void note_segment(const Vma& vma, uint64_t id) {
    auto segment = describe_segment(world_.pid(), static_cast<int>(vma.inode));
    if (segment.ok()) captured_.note_segment(id, *segment);
  }

  // A readable descriptor of the target's for the mapped file; invalid when there is none.
  Fd descriptor_of(const Vma& vma) {
    const std::string folder = fmt::format("/proc/{}/fd", world_.pid());
    std::error_code ignored;
    for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
      // The name as well: inodes of two file systems may have one number.
      std::error_code gone;
      const std::string link = std::filesystem::read_symlink(entry.path(), gone).string();
      if (link != vma.name && link != with_line_ends(vma.name)) continue;
      struct stat info {};
      if (::stat(entry.path().c_str(), &info) != 0 || info.st_ino != vma.inode || !S_ISREG(info.st_mode)) continue;
      auto fd = world_.duplicate_fd(static_cast<int>(parse_number(entry.path().filename().string())));
      if (!fd.ok()) continue;
      const int flags = ::fcntl(fd->get(), F_GETFL);
      if ((flags & O_PATH) == 0 && (flags & O_ACCMODE) != O_WRONLY) return std::move(fd).value();
    }
    return Fd();
  }

  static uint64_t parse_device(const std::string& device) {
    size_t colon = device.find(':');
    return parse_hex(device.substr(0, colon)) << 20 | parse_hex(device.substr(colon + 1));
  }

  static uint64_t kernel_device(uint64_t device) { return uint64_t{major(device)} << 20 | minor(device); }

  // The file behind a mapping when its path still leads to it. Only the inode is compared: on btrfs and overlayfs the device
  // in maps is not the one that stat shows.
  const pb::FileIdentity* named_file(const Vma& vma) {
    if (vma.name.empty() || vma.name[0] != '/') return nullptr;
    const pb::FileIdentity* identity = &known_identity(world_.pid(), vma.name, identities_);
    if (vma.deleted()) {  // unless that is its very name
      return identity->inode() == vma.inode && kernel_device(identity->device()) == parse_device(vma.device) ? identity : nullptr;
    }
    if (identity->inode() == vma.inode) return identity;
    const std::string name = with_line_ends(vma.name);
    if (name == vma.name) return nullptr;
    identity = &known_identity(world_.pid(), name, identities_);
    return identity->inode() == vma.inode ? identity : nullptr;
  }

  // /proc/PID/maps shows the end of a line in a name as "\\012", as it does a name that has just that.
  static std::string with_line_ends(std::string name) {
    constexpr std::string_view kShown = "\\012";
    for (size_t at = 0; (at = name.find(kShown, at)) != std::string::npos; ++at) name.replace(at, kShown.size(), "\n");
    return name;
  }

  Result<void> append_with_pages(const Vma& vma, pb::Mapping mapping, DumpRange::Pages pages) {
    save_.ranges.push_back({vma.start, vma.end, pages, (vma.protection & PROT_READ) != 0});
    return append(std::move(mapping));
  }

  // Anonymous neighbours that differ in nothing become one mapping, so that a restarted target's map does not fray.
  Result<void> append(pb::Mapping mapping) {
    auto* mappings = save_.saved->mutable_mappings();
    if (!mappings->empty() && mapping.kind() == pb::Mapping::ANONYMOUS) {
      pb::Mapping& last = *mappings->rbegin();
      bool same_name = last.name() == mapping.name() || (last.name().empty() && mapping.name().empty());
      if (last.kind() == pb::Mapping::ANONYMOUS && last.end() == mapping.start() &&
          last.protection() == mapping.protection() && same_name &&
          std::equal(last.advice().begin(), last.advice().end(), mapping.advice().begin(), mapping.advice().end())) {
        last.set_end(mapping.end());
        return {};
      }
    }
    *mappings->Add() = std::move(mapping);
    return {};
  }

  const StoppedWorld& world_;
  const std::vector<Vma>& vmas_;
  const BackingImage& backing_;
  const AddressSpaceOptions& options_;
  CapturedFiles& captured_;
  AddressSpaceSave& save_;
  std::map<std::string, pb::FileIdentity>& identities_;
  std::optional<PageScanner> scanner_;
  std::set<std::string> noted_;
};

// The kernel attaches segments whole only; mprotect may have cut them into several mappings since, munmap may not.
Result<void> check_segments_are_whole(const pb::AddressSpace& space, const CapturedFiles& captured) {
  uint64_t next_address = 0, next_offset = 0, missing_bytes = 0;
  for (const pb::Mapping& mapping : space.mappings()) {
    const bool is_captured = mapping.kind() == pb::Mapping::CAPTURED;
    const pb::CapturedFile* file = is_captured ? &captured.files().at(mapping.captured_id()) : nullptr;
    const bool is_segment = file != nullptr && file->has_segment();
    const bool goes_on = is_segment && mapping.start() == next_address && mapping.file_offset() == next_offset;
    if ((missing_bytes != 0 && !goes_on) || (is_segment && missing_bytes == 0 && mapping.file_offset() != 0)) {
      return error(fmt::format("a System V segment is attached only in part, near {:#x}", mapping.start()),
                   "checkpoint the program before it unmaps a part of one, or after it has detached it");
    }
    if (!is_segment) continue;
    const uint64_t bytes = mapping.end() - mapping.start();
    const uint64_t whole_bytes = (file->segment().size_bytes() + kPageBytes - 1) / kPageBytes * kPageBytes;
    next_address = mapping.end();
    next_offset = mapping.file_offset() + bytes;
    missing_bytes = whole_bytes - std::min(whole_bytes, next_offset);
  }
  if (missing_bytes != 0)
    return error("a System V segment is attached only in part", "checkpoint the program after it has detached it");
  return {};
}

bool preview_holds(const std::vector<Vma>& vmas, const AddressSpacePreview& preview, uint32_t madvise_generation) {
  if (preview.madvise_generation != madvise_generation) return false;
  return std::all_of(vmas.begin(), vmas.end(), [&](const Vma& vma) {
    // The heap may have grown or shrunk, and kept its flags. Any other mapping with another place is another one, or a stack that
    // grew down: without its flags it could not grow after a restart.
    auto found = preview.flags.find(vma.start);
    if (found == preview.flags.end()) return vma.name == "[vsyscall]";
    return found->second.first == vma.end || vma.name == "[heap]";
  });
}

// Numbers of /proc/PID/stat by proc(5)'s count.
void save_layout(const std::vector<std::string>& stat, pb::AddressSpace* saved) {
  auto field = [&](size_t number) { return static_cast<uint64_t>(std::stoull(stat[number - 3])); };
  saved->set_start_code(field(26));
  saved->set_end_code(field(27));
  saved->set_start_stack(field(28));
  saved->set_start_data(field(45));
  saved->set_end_data(field(46));
  saved->set_start_brk(field(47));
  saved->set_arg_start(field(48));
  saved->set_arg_end(field(49));
  saved->set_env_start(field(50));
  saved->set_env_end(field(51));
}

}  // namespace

Result<AddressSpacePreview> preview_address_space(pid_t pid, uint32_t madvise_generation) {
  AddressSpacePreview preview;
  preview.madvise_generation = madvise_generation;
  for (const Vma& vma : VMCKPT_TRY(read_maps(pid))) {
    if (vma.inode != 0 && vma.name.starts_with("/") && !vma.deleted()) known_identity(pid, vma.name, preview.identities);
  }
  preview.flags = VMCKPT_TRY(read_vm_flags(pid));
  return preview;
}

Result<AddressSpaceSave> save_address_space(const StoppedWorld& world, const Ledger& ledger, AddressSpacePreview& preview,
                                            const BackingImage& backing, const AddressSpaceOptions& options,
                                            CapturedFiles& captured, pb::AddressSpace* saved) {
  const pid_t pid = world.pid();
  AddressSpaceSave save;
  save.saved = saved;
  std::vector<Vma> vmas = VMCKPT_TRY(read_maps(pid));
  if (!preview_holds(vmas, preview, ledger.madvise_generation)) preview.flags = VMCKPT_TRY(read_vm_flags(pid));
  Saver saver(world, vmas, backing, options, captured, save, preview.identities);
  for (const Vma& vma : vmas) {
    auto flags = preview.flags.find(vma.start);
    VMCKPT_TRY(saver.add(vma, flags == preview.flags.end() ? std::string() : flags->second.second));
    if (vma.name == "[vdso]") {
      saved->mutable_vdso_code()->resize(vma.bytes());
      VMCKPT_TRY(read_memory(pid, RemoteAddr(vma.start), saved->mutable_vdso_code()->data(), vma.bytes()));
    }
  }
  VMCKPT_TRY(check_segments_are_whole(*saved, captured));
  std::vector<std::string> stat = VMCKPT_TRY(read_stat(pid));
  if (stat.size() < 49) return error(fmt::format("/proc/{}/stat has an unknown form", pid));
  save_layout(stat, saved);
  saved->set_auxv(VMCKPT_TRY(read_whole_file(fmt::format("/proc/{}/auxv", pid))));
  saved->set_mlockall_flags(ledger.mlockall_flags);
  std::string executable = VMCKPT_TRY(read_link(fmt::format("/proc/{}/exe", pid)));
  *saved->mutable_executable() = known_identity(pid, executable, preview.identities);
  saved->mutable_executable()->set_path(executable);
  return save;
}

BrkQuestion ask_brk(TapeDraft& tape) { return {tape.call(SYS_brk, {0})}; }

void save_brk(const BrkQuestion& question, const TapeDraft& tape, pb::AddressSpace* saved) {
  saved->set_brk(static_cast<uint64_t>(tape.result(question.call)));
}

}  // namespace vmckpt
