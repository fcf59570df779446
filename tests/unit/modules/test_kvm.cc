// What a restart plans for a virtual machine, and what it refuses, without /dev/kvm.
#include "modules/kvm.h"

#include <set>

#include "catch.h"
#include <sys/syscall.h>

#include "core/kvm_api.h"
#include "image/one_process.h"
#include "modules/kvm_descriptor.pb.h"
#include "recorder/kvm_calls.h"

using namespace vmckpt;

namespace {

constexpr int kDevice = 1000, kFirstServiceFd = 100;

template <class T>
std::string bytes_of(const T& value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}

pb::KvmObject* add_object(pb::Image& image, pb::KvmObject::Kind kind, uint32_t id, uint32_t order, int fd) {
  pb::KvmObject* object = kvm_of(&image).add_objects();
  object->set_id(id);
  object->set_kind(kind);
  object->set_order(order);
  object->set_request(kind == pb::KvmObject::VM ? KVM_CREATE_VM : KVM_CREATE_VCPU);
  if (kind == pb::KvmObject::VCPU) object->set_parent(1);
  if (fd < 0) return object;
  pb::OpenFile* file = image.add_open_files();
  file->set_id(static_cast<uint32_t>(fd) + 1000);  // not its number
  pb::Descriptor* descriptor = one_process(&image).descriptors.add_descriptors();
  descriptor->set_number(fd);
  descriptor->set_file(file->id());
  file->MutableExtension(pb::kvm)->set_object(id);
  return object;
}

void add_record(pb::Image& image, uint32_t object, uint32_t request, uint32_t order, const std::string& payload) {
  pb::KvmRecord* record = kvm_of(&image).add_records();
  record->set_object(object);
  record->set_request(request);
  record->set_order(order);
  if (!payload.empty()) record->set_payload(payload);
  if (request == KVM_IRQFD || request == KVM_IOEVENTFD) {
    record->add_events(7);
    record->add_events(-1);
  }
}

// A VM with an in-kernel interrupt controller, one memory slot, one vCPU and one irqfd. The irqfd was noted before the vCPU.
pb::Image small_vm() {
  pb::Image image;
  add_object(image, pb::KvmObject::VM, 1, 1, 5)->mutable_vm()->set_clock(bytes_of(kvm_clock_data{}));
  add_record(image, 1, KVM_CREATE_IRQCHIP, 2, "");
  add_record(image, 1, KVM_SET_USER_MEMORY_REGION, 3, bytes_of(kvm_userspace_memory_region{}));
  add_record(image, 1, KVM_IRQFD, 4, bytes_of(kvm_irqfd{}));
  pb::KvmObject* vcpu = add_object(image, pb::KvmObject::VCPU, 2, 5, 6);
  vcpu->mutable_vcpu()->set_regs(bytes_of(kvm_regs{}));
  vcpu->mutable_vcpu()->set_sregs(bytes_of(kvm_sregs{}));
  vcpu->mutable_vcpu()->set_events(bytes_of(kvm_vcpu_events{}));
  vcpu->mutable_vcpu()->set_run(std::string(12288, '\0'));
  vcpu->set_run_address(0x7000000);
  return image;
}

// The requests of a tape's KVM calls, in their order; other calls by their number.
std::vector<uint64_t> plan_of(const pb::Image& image) {
  TapeDraft tape;
  REQUIRE(plan_kvm(image, kDevice, kFirstServiceFd, GuestClock::kContinue, tape).ok());
  std::vector<uint64_t> order;
  for (const TapeCall& call : tape.all_calls()) {
    const bool is_kvm = call.number == SYS_ioctl || call.number == kOpMakeDescriptor;
    order.push_back(is_kvm ? call.args[1] : static_cast<uint64_t>(call.number));
  }
  return order;
}

size_t place(const std::vector<uint64_t>& order, uint64_t what) {
  auto found = std::find(order.begin(), order.end(), what);
  REQUIRE(found != order.end());
  return static_cast<size_t>(found - order.begin());
}

}  // namespace

TEST_CASE("every KVM ioctl has one row, and is KVM's") {
  std::set<uint32_t> seen;
  for (const KvmCall& call : kKvmCalls) {
    INFO(call.name);
    CHECK(seen.insert(call.request).second);
    CHECK(_IOC_TYPE(call.request) == KVMIO);
    CHECK(find_kvm_call(call.request) == &call);
  }
  CHECK(find_kvm_call(0xaeff) == nullptr);
}

TEST_CASE("a VM is made in the order in which its VMM made it") {
  const auto order = plan_of(small_vm());
  CHECK(place(order, KVM_CREATE_VM) < place(order, KVM_CREATE_IRQCHIP));
  CHECK(place(order, KVM_CREATE_IRQCHIP) < place(order, KVM_CREATE_VCPU));
  CHECK(place(order, KVM_SET_USER_MEMORY_REGION) < place(order, KVM_CREATE_VCPU));
}

TEST_CASE("state is set when everything is made, the clock after it, eventfds are connected last of all that acts") {
  const auto order = plan_of(small_vm());
  CHECK(place(order, KVM_CREATE_VCPU) < place(order, KVM_SET_SREGS));
  CHECK(place(order, KVM_SET_SREGS) < place(order, KVM_SET_REGS));
  CHECK(place(order, KVM_SET_REGS) < place(order, KVM_SET_VCPU_EVENTS));
  // Once before the vCPUs, whose MSRs depend on it, and once as late as can be.
  CHECK(place(order, KVM_SET_CLOCK) < place(order, KVM_SET_SREGS));
  const auto last_clock = static_cast<size_t>(std::find(order.rbegin(), order.rend(), uint64_t{KVM_SET_CLOCK}).base() -
                                              order.begin()) -
                          1;
  CHECK(place(order, KVM_SET_VCPU_EVENTS) < last_clock);
  CHECK(last_clock < place(order, KVM_IRQFD));
  CHECK(order.back() == static_cast<uint64_t>(kOpCopyBytes));  // kvm_run, and the gate
}

TEST_CASE("an image without virtual machines plans nothing") { CHECK(plan_of(pb::Image()).empty()); }

TEST_CASE("a vCPU that its VMM has closed is made again at a number that restart closes") {
  pb::Image image = small_vm();
  add_object(image, pb::KvmObject::VCPU, 3, 6, -1);
  TapeDraft tape;
  REQUIRE(plan_kvm(image, kDevice, kFirstServiceFd, GuestClock::kContinue, tape).ok());
  size_t made = 0;
  for (const TapeCall& call : tape.all_calls()) {
    if (call.number == kOpMakeDescriptor && call.args[1] == KVM_CREATE_VCPU && call.args[3] >= kFirstServiceFd) ++made;
  }
  CHECK(made == 1);
}

TEST_CASE("CPUID bits that the guest was shown and this host lacks are told one by one") {
  kvm_cpuid_entry2 leaf{};
  leaf.function = 7;
  leaf.ebx = 1u << 5 | 1u << 16;
  kvm_cpuid2 head{};
  head.nent = 1;
  pb::Image image = small_vm();
  add_record(image, 2, KVM_SET_CPUID2, 8, std::string(reinterpret_cast<const char*>(&head), sizeof(kvm_cpuid2)) + bytes_of(leaf));
  kvm_of(&image).add_host_cpuid(bytes_of(leaf));
  KvmHost host;
  host.cpuid.push_back(leaf);
  auto problems_of = [&](CpuCheck check) {
    std::vector<Error> problems;
    std::vector<std::string> notes;
    check_guest_cpuid(kvm_of(image), host, check, problems, notes);
    return problems;
  };
  CHECK(problems_of(CpuCheck::kStrict).empty());
  host.cpuid[0].ebx = 1u << 5;
  REQUIRE(problems_of(CpuCheck::kGuest).size() == 1);
  CHECK(problems_of(CpuCheck::kGuest)[0].message().find("CPUID 0x7.0 ebx bit 16") != std::string::npos);
  CHECK(problems_of(CpuCheck::kNone).empty());
}

TEST_CASE("hostile KVM records are refused before anything starts") {
  auto host = KvmHost::ask();
  if (!host.ok()) {
    WARN("skipped: " + host.error().message());
    return;
  }
  auto problems_of = [](const pb::Image& image) {
    std::vector<Error> problems;
    std::vector<std::string> notes;
    check_kvm(image, CpuCheck::kStrict, GuestClock::kContinue, problems, notes);
    return problems.size();
  };
  pb::Image good = small_vm();
  kvm_of(&good).mutable_objects(1)->mutable_vcpu()->mutable_run()->resize((*host)->run_bytes);
  CHECK(problems_of(good) == 0);

  pb::Image short_registers = good;
  kvm_of(&short_registers).mutable_objects(1)->mutable_vcpu()->set_regs("short");
  CHECK(problems_of(short_registers) > 0);

  pb::Image unknown_call = good;
  add_record(unknown_call, 1, KVM_RUN, 9, "");
  CHECK(problems_of(unknown_call) > 0);

  pb::Image short_payload = good;
  add_record(short_payload, 1, KVM_SET_USER_MEMORY_REGION, 9, "abc");
  CHECK(problems_of(short_payload) > 0);

  pb::Image no_parent = good;
  kvm_of(&no_parent).mutable_objects(1)->set_parent(77);
  CHECK(problems_of(no_parent) > 0);

  pb::Image of_nobody = good;
  add_record(of_nobody, 42, KVM_CREATE_IRQCHIP, 9, "");
  CHECK(problems_of(of_nobody) > 0);
}

TEST_CASE("a guest whose TSC this host can neither match nor scale is refused, but not where its processor is not checked") {
  auto host = KvmHost::ask();
  if (!host.ok() || (*host)->can_scale_tsc() || (*host)->tsc_khz() == 0) {
    WARN("skipped: no KVM here, or one that can scale the TSC");
    return;
  }
  pb::Image image = small_vm();
  auto problems_at = [&](uint32_t khz, CpuCheck check) {
    kvm_of(&image).mutable_objects(1)->mutable_vcpu()->set_tsc_khz(khz);
    std::vector<Error> problems;
    std::vector<std::string> notes;
    check_guest_tsc(kvm_of(image), **host, check, problems, notes);
    return problems.size();
  };
  const uint32_t khz = (*host)->tsc_khz();
  CHECK(problems_at(khz, CpuCheck::kStrict) == 0);
  CHECK(problems_at(khz + khz / 10'000, CpuCheck::kStrict) == 0);
  CHECK(problems_at(khz * 2, CpuCheck::kStrict) == 1);
  CHECK(problems_at(khz * 2, CpuCheck::kNone) == 0);
}
