// signalfd(2): reads signals from the queues of whoever reads. Its only state is the mask, shown in fdinfo; the signals
// themselves are pending in the process and its threads and are saved there. Restore order is free.
// Sources: signalfd(2), proc_pid_fdinfo(5).
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core/proc.h"
#include "modules/descriptor_module.h"
#include "modules/signalfd.pb.h"

namespace vmckpt {
namespace {

bool recognise(const TargetFile& file) { return file.is_anonymous("[signalfd]"); }

Result<void> save(SaveContext&, const TargetFile& file, int, pb::OpenFile* saved) {
  std::string_view mask = fdinfo_field(file.fdinfo, "sigmask");
  if (mask.empty()) return error(file.describe() + " has no signal mask in /proc/PID/fdinfo");
  saved->MutableExtension(pb::signalfd)->set_mask(parse_hex(mask));
  return {};
}

Result<void> restore(RestoreContext& context) {
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (!file.HasExtension(pb::signalfd)) continue;
    // The system call itself: the mask is the kernel's 64 bits, not libc's sigset_t.
    uint64_t mask = file.GetExtension(pb::signalfd).mask();
    Fd fd(static_cast<int>(::syscall(SYS_signalfd4, -1, &mask, sizeof mask, SFD_CLOEXEC | SFD_NONBLOCK)));
    if (!fd) return errno_error("make the signalfd of " + describe(file));
    VMCKPT_TRY(context.put(file, std::move(fd)));
  }
  return {};
}

}  // namespace

const DescriptorModule kSignalfdModule{"signalfd", recognise, save, nullptr, nullptr, restore};

}  // namespace vmckpt
