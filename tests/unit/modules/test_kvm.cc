// What a restart plans for a virtual machine, and what it refuses, without /dev/kvm.
#include "modules/kvm.h"

#include <set>

#include <catch2/catch.hpp>
#include <sys/syscall.h>

#include "core/kvm_api.h"
#include "recorder/kvm_calls.h"

using namespace vmckpt;

namespace {

constexpr int kDevice = 1000, kFirstServiceFd = 100;

template <class T>
std::string bytes_of(const T& value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}

pb::KvmObject* add_object(pb::Image& image, pb::KvmObject::Kind kind, uint32_t id, uint32_t order, int fd) {
  pb::KvmObject* object = image.mutable_kvm()->add_objects();
  object->set_id(id);
  object->set_kind(kind);
  object->set_order(order);
  object->set_request(kind == pb::KvmObject::VM ? KVM_CREATE_VM : KVM_CREATE_VCPU);
  if (kind == pb::KvmObject::VCPU) object->set_parent(1);
  if (fd < 0) return object;
  pb::OpenFile* file = image.mutable_descriptors()->add_files();
  file->set_id(static_cast<uint32_t>(fd));
  file->add_numbers()->set_number(fd);
  file->mutable_kvm()->set_object(id);
  return object;
}

void add_record(pb::Image& image, uint32_t object, uint32_t request, uint32_t order, const std::string& payload) {
  pb::KvmRecord* record = image.mutable_kvm()->add_records();
  record->set_object(object);
  record->set_request(request);
  record->set_order(order);
  record->set_payload(payload);
  record->set_has_payload(!payload.empty());
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
  image.mutable_kvm()->set_gate_address(0x8000000);
  image.mutable_kvm()->set_gate(2);
  return image;
}

// The requests of a tape's KVM calls, in their order; other calls by their number.
std::vector<uint64_t> plan_of(const pb::Image& image) {
  TapeDraft tape;
  REQUIRE(plan_kvm(image, kDevice, kFirstServiceFd, tape).ok());
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
  CHECK(place(order, KVM_SET_VCPU_EVENTS) < place(order, KVM_SET_CLOCK));
  CHECK(place(order, KVM_SET_CLOCK) < place(order, KVM_IRQFD));
  CHECK(order.back() == static_cast<uint64_t>(kOpCopyBytes));  // kvm_run, and the gate
}

TEST_CASE("an image without virtual machines plans nothing") { CHECK(plan_of(pb::Image()).empty()); }

TEST_CASE("a vCPU that its VMM has closed is made again at a number that restart closes") {
  pb::Image image = small_vm();
  add_object(image, pb::KvmObject::VCPU, 3, 6, -1);
  TapeDraft tape;
  REQUIRE(plan_kvm(image, kDevice, kFirstServiceFd, tape).ok());
  size_t made = 0;
  for (const TapeCall& call : tape.all_calls()) {
    if (call.number == kOpMakeDescriptor && call.args[1] == KVM_CREATE_VCPU && call.args[3] >= kFirstServiceFd) ++made;
  }
  CHECK(made == 1);
}

TEST_CASE("hostile KVM records are refused before anything starts") {
  auto host = KvmHost::ask();
  if (!host.ok()) {
    WARN("skipped: " + host.error().message());
    return;
  }
  auto problems_of = [](const pb::Image& image) {
    std::vector<Error> problems;
    check_kvm(image.kvm(), problems);
    return problems.size();
  };
  pb::Image good = small_vm();
  good.mutable_kvm()->mutable_objects(1)->mutable_vcpu()->mutable_run()->resize((*host)->run_bytes);
  CHECK(problems_of(good) == 0);

  pb::Image short_registers = good;
  short_registers.mutable_kvm()->mutable_objects(1)->mutable_vcpu()->set_regs("short");
  CHECK(problems_of(short_registers) > 0);

  pb::Image unknown_call = good;
  add_record(unknown_call, 1, KVM_RUN, 9, "");
  CHECK(problems_of(unknown_call) > 0);

  pb::Image short_payload = good;
  add_record(short_payload, 1, KVM_SET_USER_MEMORY_REGION, 9, "abc");
  CHECK(problems_of(short_payload) > 0);

  pb::Image no_parent = good;
  no_parent.mutable_kvm()->mutable_objects(1)->set_parent(77);
  CHECK(problems_of(no_parent) > 0);

  pb::Image of_nobody = good;
  add_record(of_nobody, 42, KVM_CREATE_IRQCHIP, 9, "");
  CHECK(problems_of(of_nobody) > 0);
}
