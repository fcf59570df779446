// eventfd(2): a counter in the kernel.
//
// Made by eventfd; changed by read and write; the semaphore mode is fixed at creation. Saved: counter and mode, from
// fdinfo. Kernels before 6.5 do not show the mode, so the recorder notes EFD_SEMAPHORE. A counter's link to KVM
// (irqfd, ioeventfd) belongs to kvm.cc. Restored: eventfd, then one write of the count, which may be
// as large as 2^64 - 2 and thus does not fit eventfd's first argument. Sources: eventfd(2), fs/eventfd.c.
#include <sys/eventfd.h>

#include "core/proc.h"
#include "modules/descriptor_module.h"
#include "modules/eventfd.pb.h"

namespace vmckpt {
namespace {

bool recognise(const TargetFile& file) { return file.is_anonymous("[eventfd]"); }

Result<void> save(SaveContext& context, const TargetFile& file, int, pb::OpenFile* saved) {
  std::string_view count = fdinfo_field(file.fdinfo, "eventfd-count");
  if (count.empty()) return error(file.describe() + " has no counter in /proc/PID/fdinfo");
  std::string_view semaphore = fdinfo_field(file.fdinfo, "eventfd-semaphore");
  saved->MutableExtension(pb::eventfd)->set_count(parse_hex(count));
  saved->MutableExtension(pb::eventfd)->set_semaphore(
      semaphore.empty() ? context.find_ledger_note(NoteKind::kEventfdSemaphore, file, 0) != nullptr
                        : semaphore == "1");
  return {};
}

Result<void> restore(RestoreContext& context) {
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (!file.HasExtension(pb::eventfd)) continue;
    Fd fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK | (file.GetExtension(pb::eventfd).semaphore() ? EFD_SEMAPHORE : 0)));
    if (!fd) return errno_error("make the eventfd of " + describe(file));
    uint64_t count = file.GetExtension(pb::eventfd).count();
    if (count != 0) VMCKPT_TRY(write_exactly(fd.get(), &count, sizeof count, describe(file)));
    VMCKPT_TRY(context.put(file, std::move(fd)));
  }
  return {};
}

}  // namespace

const DescriptorModule kEventfdModule{"eventfd", recognise, save, nullptr, nullptr, restore};

}  // namespace vmckpt
