// Checkpoint of the address space: from /proc/PID/maps to the mappings of the image, and to the list of ranges whose pages must
// be written. Pages themselves are read later, from the snapshot (page_dump.h).
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/result.h"
#include "image/memory.pb.h"
#include "memory/maps.h"
#include "memory/captured_files.h"
#include "memory/file_access.h"
#include "recorder/ledger.h"
#include "tracer/stopped_world.h"
#include "tracer/tape_draft.h"

namespace vmckpt {

// How the mappings of a restarted target show where its image lies: /proc/PID/maps' own device and inode.
struct BackingImage {
  std::string device;
  uint64_t inode = 0;
};

struct GuardRegion {  // madvise(2), MADV_GUARD_INSTALL
  uint64_t start = 0;
  uint64_t end = 0;
};

struct DumpRange {
  enum class Pages {
    kTouched,   // anonymous memory: pages the process has written; what is left out is zeros
    kModified,  // file mapping: pages that are the process's own; what is left out is the file's
    kAll,      // whatever a read gives: memory that an image or a deleted file backs
    kGuards,   // none, but guard regions are looked for: shared memory
  };
  uint64_t start = 0;
  uint64_t end = 0;
  Pages pages = Pages::kTouched;
  bool readable = true;  // without PROT_READ only /proc/PID/mem reads it
};

// What the target running told before the freeze; refreshed inside the pause only where it no longer holds.
struct AddressSpacePreview {
  VmFlags flags;
  uint32_t madvise_generation = 0;
  std::map<std::string, pb::FileIdentity> identities;  // of mapped files, by path; a path that leads nowhere has inode 0
};
// Target running: walks smaps and examines the mapped files, so that the pause need not.
Result<AddressSpacePreview> preview_address_space(pid_t pid, uint32_t madvise_generation);

struct AddressSpaceSave {
  pb::AddressSpace* saved;
  std::vector<DumpRange> ranges;
  // fork would not copy these: the snapshot's tape lifts the advice and puts it back.
  std::vector<Vma> not_forked;       // MADV_DONTFORK
  std::vector<Vma> wiped_on_fork;    // MADV_WIPEONFORK
  std::vector<GuardRegion> guards;   // of memory that the snapshot does not have
  uint64_t mapped_bytes = 0;
  std::vector<std::string> notes;
};

// Files that are mapped shared and writable, where a path leads to them.
enum class SharedFileContent {
  kMemory,  // saved where the file is memory: on tmpfs, or a VMM's RAM
  kAll,
  kNone,
};

struct AddressSpaceOptions {
  bool self_contained = false;  // embed clean pages of mapped files too
  SharedFileContent shared_files = SharedFileContent::kMemory;
  bool is_vmm = false;  // it has virtual machines
};

Result<AddressSpaceSave> save_address_space(const StoppedWorld& world, const Ledger& ledger, AddressSpacePreview& preview,
                                            const BackingImage& backing, const AddressSpaceOptions& options,
                                            CapturedFiles& captured, pb::AddressSpace* saved);

// brk and the numbers of /proc/PID/stat that PR_SET_MM_MAP wants back.
struct BrkQuestion {
  size_t call;
};
BrkQuestion ask_brk(TapeDraft& tape);
void save_brk(const BrkQuestion& question, const TapeDraft& tape, pb::AddressSpace* saved);

// Identity of the file at `path` as process `pid` sees it, with its build id when it is an ELF file.
Result<pb::FileIdentity> identify_file(pid_t pid, const std::string& path);
// Restart: the file again, `now` what it is by now. Its content is not compared.
Result<Fd> open_mapped_file(const pb::FileIdentity& identity, int flags, const FileAccess& access, pb::FileIdentity* now);
// Why it is not the file it was; empty when it is. `now` stays empty when it cannot be opened.
std::string difference_from(const pb::FileIdentity& identity, const FileAccess& access, pb::FileIdentity* now);

}  // namespace vmckpt
