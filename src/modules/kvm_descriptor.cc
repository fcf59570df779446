// Descriptors of KVM objects: VMs, vCPUs, their statistics. The objects belong to kvm.cc, which makes them when the guest's
// memory is there; restore here only keeps their numbers with something that is never used.
#include "modules/descriptor_module.h"
#include "modules/kvm_descriptor.pb.h"
#include "tracer/vcpu_gate.h"

namespace vmckpt {
namespace {

bool recognise(const TargetFile& file) {
  return file.link.starts_with("anon_inode:kvm-vm") || file.link.starts_with("anon_inode:kvm-vcpu");
}

Result<void> save(SaveContext& context, const TargetFile& file, int, pb::OpenFile* saved) {
  const KvmNotes* notes = context.save.kvm;
  for (const TargetFile::Number& number : file.numbers) {
    const bool known = notes != nullptr && static_cast<size_t>(number.number) < notes->fd_objects.size();
    const uint32_t object = known ? notes->fd_objects[static_cast<size_t>(number.number)] : 0;
    if (object == 0) continue;
    saved->MutableExtension(pb::kvm)->set_object(object);
    return {};
  }
  return error(file.describe() + " was made by calls that the recorder has not seen",
               "a VMM that makes its own system calls, or that got the descriptor from another process, cannot be saved");
}

Result<void> restore(RestoreContext& context) {
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (file.HasExtension(pb::kvm)) VMCKPT_TRY(context.put(file, VMCKPT_TRY(open_file("/dev/null", O_RDWR))));
  }
  return {};
}

}  // namespace

const DescriptorModule kKvmModule{"kvm", recognise, save, nullptr, nullptr, restore};

}  // namespace vmckpt
