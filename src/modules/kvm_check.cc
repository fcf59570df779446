// Whether the virtual machines of an image can be made again: is the image well-formed, and is this host's KVM enough for it.
#include <algorithm>
#include <cstring>
#include <iterator>

#include "modules/kvm.h"
#include "recorder/kvm_calls.h"

namespace vmckpt {

const pb::Kvm& kvm_of(const pb::Image& image) {
  return image.ExtensionSize(pb::virtual_machines) == 0 ? pb::Kvm::default_instance()
                                                         : image.GetExtension(pb::virtual_machines, 0);
}

pb::Kvm& kvm_of(pb::Image* image) {
  return image->ExtensionSize(pb::virtual_machines) == 0 ? *image->AddExtension(pb::virtual_machines)
                                                          : *image->MutableExtension(pb::virtual_machines, 0);
}

std::string kvm_call_name(uint32_t request) {
  const KvmCall* call = find_kvm_call(request);
  return call != nullptr ? call->name : fmt::format("the KVM call {:#x}", request);
}

const pb::KvmObject* find_kvm_object(const pb::Kvm& kvm, uint32_t id) {
  for (const pb::KvmObject& object : kvm.objects()) {
    if (object.id() == id) return &object;
  }
  return nullptr;
}

std::string payload_of(const pb::Kvm& kvm, uint32_t object, uint32_t request) {
  for (auto record = kvm.records().rbegin(); record != kvm.records().rend(); ++record) {
    if (record->object() == object && record->request() == request) return record->payload();
  }
  return {};
}

bool kvm_call_refers_to_events(uint32_t request) { return request == KVM_IRQFD || request == KVM_IOEVENTFD; }

kvm_clock_data kvm_clock_of(const pb::KvmVmState& state) {
  kvm_clock_data clock{};
  if (state.clock().size() == sizeof clock) std::memcpy(&clock, state.clock().data(), sizeof clock);
  return clock;
}

namespace {

Result<void> check_object(const pb::Kvm& kvm, const pb::KvmObject& object) {
  const KvmCall* call = find_kvm_call(object.request());
  if (call == nullptr || call->action != KvmAction::kCreate) {
    return error(fmt::format("KVM object {} was made by a call that this vmckpt does not know", object.id()));
  }
  const pb::KvmObject* parent = find_kvm_object(kvm, object.parent());
  if (object.kind() != pb::KvmObject::VM && (parent == nullptr || parent->order() >= object.order())) {
    return error(fmt::format("KVM object {} belongs to no VM", object.id()));
  }
  const pb::KvmVcpuState& state = object.vcpu();
  auto has_size = [](const std::string& bytes, size_t size) { return bytes.empty() || bytes.size() == size; };
  if (!has_size(state.regs(), sizeof(kvm_regs)) || !has_size(state.sregs(), sizeof(kvm_sregs)) ||
      !has_size(state.sregs2(), sizeof(kvm_sregs2)) || !has_size(state.xcrs(), sizeof(kvm_xcrs)) ||
      !has_size(state.debug_regs(), sizeof(kvm_debugregs)) || !has_size(state.lapic(), sizeof(kvm_lapic_state)) ||
      !has_size(state.events(), sizeof(kvm_vcpu_events)) || !has_size(state.mp_state(), sizeof(kvm_mp_state)) ||
      (!state.xsave().empty() && state.xsave().size() < kPlainXsaveBytes) || state.msrs().size() % sizeof(kvm_msr_entry) != 0 ||
      !has_size(object.vm().clock(), sizeof(kvm_clock_data)) || !has_size(object.vm().pit(), sizeof(kvm_pit_state2)) ||
      !std::all_of(object.vm().irqchips().begin(), object.vm().irqchips().end(),
                   [](const std::string& chip) { return chip.size() == sizeof(kvm_irqchip); })) {
    return error(fmt::format("the state of KVM object {} is malformed", object.id()));
  }
  return {};
}

Result<void> check_record(const pb::Kvm& kvm, const pb::KvmRecord& record) {
  const KvmCall* call = find_kvm_call(record.request());
  if (call == nullptr || call->action != KvmAction::kRecord || find_kvm_object(kvm, record.object()) == nullptr) {
    return error(fmt::format("the image replays {}, which this vmckpt does not", kvm_call_name(record.request())));
  }
  // What follows in the structure is checked by KVM itself; the size must be what it will read.
  const bool is_fixed = call->payload == KvmPayload::kFixed;
  if (is_fixed && (record.payload().size() != _IOC_SIZE(record.request()) ||
                   (kvm_call_refers_to_events(record.request()) && record.events_size() != 2))) {
    return error(fmt::format("the arguments of {} are malformed", kvm_call_name(record.request())));
  }
  if (call->payload == KvmPayload::kMsrFilter) {
    uint64_t bytes = sizeof(kvm_msr_filter);
    const auto* filter = reinterpret_cast<const kvm_msr_filter*>(record.payload().data());
    for (size_t i = 0; record.payload().size() >= sizeof *filter && i < std::size(filter->ranges); ++i) {
      bytes += msr_bitmap_bytes(filter->ranges[i]);
    }
    if (record.payload().size() != bytes) return error("the arguments of KVM_X86_SET_MSR_FILTER are malformed");
  }
  return {};
}

}  // namespace

// Only what the guest can see and has changed is a loss.
void check_msrs(const pb::Kvm& kvm, const pb::KvmObject& vcpu, KvmHost& host, std::vector<Error>& problems) {
  const std::string cpuid = payload_of(kvm, vcpu.id(), KVM_SET_CPUID2);
  const KnownMsrs& known = host.known_msrs(cpuid, payload_of(kvm, vcpu.id(), KVM_X86_SETUP_MCE));
  for (size_t at = 0; at + sizeof(kvm_msr_entry) <= vcpu.vcpu().msrs().size(); at += sizeof(kvm_msr_entry)) {
    kvm_msr_entry entry;
    std::memcpy(&entry, vcpu.vcpu().msrs().data() + at, sizeof entry);
    const bool is_known = std::find(known.readable.begin(), known.readable.end(), entry.index) != known.readable.end();
    if (is_known || is_fresh(vcpu.vcpu(), entry) || !guest_may_see(cpuid, entry.index)) continue;
    problems.push_back(error(fmt::format("this host's KVM lacks the MSR {:#x} of vCPU {}, which the guest has set to {:#x}",
                                         entry.index, vcpu.number(), entry.data),
                             "restart it on a host like the one it was saved on"));
  }
}

void check_kvm(const pb::Image& image, CpuCheck cpu_check, GuestClock clock, std::vector<Error>& problems,
               std::vector<std::string>& notes) {
  if (const int spaces = image.ExtensionSize(pb::virtual_machines); spaces > 1) {
    return problems.push_back(
        error(fmt::format("the image has virtual machines of {} address spaces, this release restarts those of one", spaces),
              "use a newer vmckpt"));
  }
  const pb::Kvm& kvm = kvm_of(image);
  if (kvm.objects_size() == 0) return;
  auto host = KvmHost::ask();
  if (!host.ok()) return problems.push_back(error("the image has a KVM virtual machine: " + host.error().message(),
                                                  "load the kvm module and give yourself access to /dev/kvm"));
  auto keep = [&](Result<void> checked) {
    if (!checked.ok()) problems.push_back(checked.error());
    return checked.ok();
  };
  for (const pb::KvmObject& object : kvm.objects()) {
    if (!keep(check_object(kvm, object))) return;
    const pb::KvmVcpuState& state = object.vcpu();
    if (!state.run().empty() && state.run().size() != (*host)->run_bytes) {
      problems.push_back(
          error(fmt::format("kvm_run has {} bytes here and {} in the image", (*host)->run_bytes, state.run().size()),
                "restart it on a kernel like the one it was saved on"));
    }
    if (!state.sregs2().empty() && !(*host)->has_sregs2) problems.push_back(error("this host's KVM lacks KVM_CAP_SREGS2"));
    if (object.has_vcpu()) check_msrs(kvm, object, **host, problems);
  }
  for (const pb::KvmRecord& record : kvm.records()) {
    if (!keep(check_record(kvm, record))) return;
  }
  check_guest_cpuid(kvm, **host, cpu_check, problems, notes);
  if (!is_this_boot(image.host())) check_guest_tsc(kvm, **host, cpu_check, problems, notes);
  note_guests_that_mind_a_gap(image, clock, notes);
}

}  // namespace vmckpt
