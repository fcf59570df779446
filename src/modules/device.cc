// Character devices without state: /dev/null, zero, full, random, urandom, and /dev/kvm (its VMs are in kvm.cc). Opened again
// under their usual name, because the path that the target used may have been a bind mount. Every other device is refused by name
// (refused.cc). Sources: null(4), full(4), random(4), Documentation/admin-guide/devices.txt (majors 1 and 10).
#include <sys/sysmacros.h>

#include "modules/descriptor_module.h"
#include "modules/device.pb.h"

namespace vmckpt {
namespace {

constexpr unsigned kMemoryMajor = 1, kMiscMajor = 10, kKvmMinor = 232;

const char* usual_path(uint64_t device_number) {
  if (major(device_number) == kMiscMajor && minor(device_number) == kKvmMinor) return "/dev/kvm";
  if (major(device_number) != kMemoryMajor) return nullptr;
  switch (minor(device_number)) {
    case 3: return "/dev/null";
    case 5: return "/dev/zero";
    case 7: return "/dev/full";
    case 8: return "/dev/random";
    case 9: return "/dev/urandom";
    default: return nullptr;
  }
}

bool recognise(const TargetFile& file) {
  return S_ISCHR(file.status.st_mode) && usual_path(file.status.st_rdev) != nullptr;
}

Result<void> save(SaveContext&, const TargetFile& file, int, pb::OpenFile* saved) {
  saved->MutableExtension(pb::device)->set_path(usual_path(file.status.st_rdev));
  saved->MutableExtension(pb::device)->set_device_number(file.status.st_rdev);
  return {};
}

void check(CheckContext& context) {
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (!file.HasExtension(pb::device)) continue;
    struct stat now;
    const std::string& path = file.GetExtension(pb::device).path();
    if (::stat(path.c_str(), &now) != 0) {
      context.problem(
          errno_error(fmt::format("device \"{}\" ({}) is missing", path, describe(file)), "make it with mknod"));
    } else if (!S_ISCHR(now.st_mode) || now.st_rdev != file.GetExtension(pb::device).device_number()) {
      context.problem(error(fmt::format("\"{}\" ({}) is not the device of that name", path, describe(file)),
                            "make it again with mknod"));
    }
  }
}

Result<void> restore(RestoreContext& context) {
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (!file.HasExtension(pb::device)) continue;
    if (usual_path(file.GetExtension(pb::device).device_number()) == nullptr) {
      return error(describe(file) + " is a device that this vmckpt has no module for");
    }
    int flags = static_cast<int>(file.status_flags() & (O_ACCMODE | O_NONBLOCK | O_APPEND));
    const char* path = usual_path(file.GetExtension(pb::device).device_number());
    Fd fd = VMCKPT_TRY(open_file(path, flags));
    struct stat now;
    if (::fstat(fd.get(), &now) != 0 || !S_ISCHR(now.st_mode) || now.st_rdev != file.GetExtension(pb::device).device_number()) {
      return error(fmt::format("\"{}\" ({}) is not the device of that name", path, describe(file)),
                   "make it again with mknod");
    }
    VMCKPT_TRY(context.put(file, std::move(fd)));
  }
  return {};
}

}  // namespace

const DescriptorModule kDeviceModule{"device", recognise, save, nullptr, check, restore};

}  // namespace vmckpt
