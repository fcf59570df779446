// Saving and restoring on hosts that these tests do not run on: a stand-in for KVM plays them (fake_kvm.h).
#include <algorithm>
#include <cstring>

#include "catch.h"
#include <sys/syscall.h>

#include "core/clock.h"
#include "image/one_process.h"
#include "modules/fake_kvm.h"
#include "modules/host.h"
#include "modules/kvm.h"
#include "modules/kvm_descriptor.pb.h"
#include "recorder/kvm_calls.h"

using namespace vmckpt;

namespace {

constexpr uint32_t kFirstServiceFd = 100;

template <class T>
std::string bytes_of(const T& value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}

std::shared_ptr<KvmHost> ask(FakeKvm& kvm) {
  auto host = KvmHost::ask(Fd(), [&kvm](int fd, unsigned long request, unsigned long argument) {
    return kvm.door(fd < 0 ? FakeKvm::kDevice : fd, request, argument);
  });
  REQUIRE(host.ok());
  return *host;
}

std::string cpuid_of(std::vector<kvm_cpuid_entry2> entries) {
  kvm_cpuid2 head{};
  head.nent = static_cast<uint32_t>(entries.size());
  std::string bytes(reinterpret_cast<const char*>(&head), sizeof(kvm_cpuid2));
  for (const kvm_cpuid_entry2& entry : entries) bytes += bytes_of(entry);
  return bytes;
}

kvm_cpuid_entry2 leaf(uint32_t function, uint32_t eax, uint32_t ebx, uint32_t ecx, uint32_t edx) {
  kvm_cpuid_entry2 entry{};
  entry.function = function;
  entry.eax = eax;
  entry.ebx = ebx;
  entry.ecx = ecx;
  entry.edx = edx;
  return entry;
}

// A guest that is shown Hyper-V, VMX, shadow stacks, SGX's launch control, memory types, PAT and machine checks.
const std::string kWindows = cpuid_of({leaf(1, 0, 0, 1u << 5, 1u << 12 | 1u << 14 | 1u << 16),
                                       leaf(7, 0, 0, 1u << 7 | 1u << 30, 0), leaf(0x40000000, 0x40000005, 0, 0, 0),
                                       leaf(0x40000001, 0x31237648, 0, 0, 0)});
const std::string kMachineChecks = bytes_of(uint64_t{0x100000a});  // ten banks

// What checkpoint and restart do with one vCPU.
pb::KvmVcpuState save(FakeKvm& kvm, KvmHost& host, int fd, const std::string& cpuid, const std::string& machine_checks) {
  pb::KvmVcpuState state;
  KvmQuestions questions;
  questions.msrs = host.known_msrs(cpuid, machine_checks).readable;
  for (const auto& [index, value] : host.known_msrs(cpuid, machine_checks).fresh)
    state.mutable_fresh_msrs()->append(bytes_of(kvm_msr_entry{index, 0, value}));
  for (int round = 0; round < 2; ++round) {
    TapeDraft tape;
    KvmQuestions asked;
    asked.msrs = questions.msrs;
    asked.msrs_one_by_one = round == 1;
    asked.has_shadow_stacks = guest_may_see(cpuid, kMsrOfShadowStacks);
    ask_vcpu(fd, false, host, tape, asked);
    REQUIRE(kvm.play(tape));
    if (save_vcpu(asked, tape, false, host, &state)) return state;
  }
  FAIL("a vCPU cannot be saved");
  return state;
}

void set_msr(FakeKvm& kvm, int vcpu, uint32_t index, uint64_t value) {
  std::string list = msr_list({index});
  std::memcpy(list.data() + sizeof(kvm_msrs) + offsetof(kvm_msr_entry, data), &value, sizeof value);
  REQUIRE(kvm.ioctl(vcpu, KVM_SET_MSRS, reinterpret_cast<unsigned long>(list.data())) == 1);
}

void configure(FakeKvm& kvm, int vcpu, const std::string& cpuid, const std::string& machine_checks) {
  REQUIRE(kvm.ioctl(vcpu, KVM_SET_CPUID2, reinterpret_cast<unsigned long>(cpuid.data())) == 0);
  REQUIRE(kvm.ioctl(vcpu, KVM_X86_SETUP_MCE, reinterpret_cast<unsigned long>(machine_checks.data())) == 0);
  kvm_enable_cap synic{};
  synic.cap = KVM_CAP_HYPERV_SYNIC2;
  REQUIRE(kvm.ioctl(vcpu, KVM_ENABLE_CAP, reinterpret_cast<unsigned long>(&synic)) == 0);
}

// One VM with so many vCPUs, ready for plan_kvm: descriptors 5 for the VM, 6 and more for its vCPUs.
pb::Image image_of(const std::vector<pb::KvmVcpuState>& vcpus, const std::string& cpuid, bool same_boot) {
  pb::Image image;
  if (same_boot) save_host(image.mutable_host());
  uint32_t order = 0;
  auto add_object = [&](pb::KvmObject::Kind kind, uint32_t request, int fd) {
    pb::KvmObject* object = kvm_of(&image).add_objects();
    object->set_id(static_cast<uint32_t>(kvm_of(image).objects_size()));
    object->set_kind(kind);
    object->set_order(++order);
    object->set_request(request);
    if (kind == pb::KvmObject::VCPU) object->set_parent(1);
    pb::OpenFile* file = image.add_open_files();
    file->set_id(object->id());
    pb::Descriptor* descriptor = one_process(&image).descriptors.add_descriptors();
    descriptor->set_number(fd);
    descriptor->set_file(file->id());
    file->MutableExtension(pb::kvm)->set_object(object->id());
    return object;
  };
  auto add_record = [&](uint32_t object, uint32_t request, const std::string& payload) {
    pb::KvmRecord* record = kvm_of(&image).add_records();
    record->set_object(object);
    record->set_request(request);
    record->set_order(++order);
    record->set_payload(payload);
  };
  add_object(pb::KvmObject::VM, KVM_CREATE_VM, 5);
  int fd = 6;
  for (const pb::KvmVcpuState& state : vcpus) {
    pb::KvmObject* vcpu = add_object(pb::KvmObject::VCPU, KVM_CREATE_VCPU, fd++);
    *vcpu->mutable_vcpu() = state;
    vcpu->set_number(static_cast<uint64_t>(fd));
    if (cpuid.empty()) continue;
    add_record(vcpu->id(), KVM_SET_CPUID2, cpuid);
    add_record(vcpu->id(), KVM_X86_SETUP_MCE, kMachineChecks);
    kvm_enable_cap synic{};
    synic.cap = KVM_CAP_HYPERV_SYNIC2;
    add_record(vcpu->id(), KVM_ENABLE_CAP, bytes_of(synic));
  }
  return image;
}

std::string problems_of(const pb::Image& image, KvmHost& host) {
  std::vector<Error> problems;
  for (const pb::KvmObject& object : kvm_of(image).objects()) {
    if (object.has_vcpu()) check_msrs(kvm_of(image), object, host, problems);
  }
  std::string text;
  for (const Error& problem : problems) text += problem.message() + "\n";
  return text;
}

// The first vCPU of the only VM that a tape has made.
FakeVcpu& restored(FakeKvm& kvm) { return kvm.vcpus.begin()->second; }

bool restart(FakeKvm& kvm, const pb::Image& image, GuestClock clock = GuestClock::kContinue) {
  TapeDraft tape;
  REQUIRE(plan_kvm(image, FakeKvm::kDevice, kFirstServiceFd, clock, tape).ok());
  return kvm.play(tape);
}

}  // namespace

TEST_CASE(
    "what KVM lists nowhere is saved and comes back: memory types, machine checks, SGX's key, Hyper-V's interrupt controller") {
  for (const FakeHost& processor : {intel_host(), amd_host()}) {
    FakeKvm kvm(processor);
    auto host = ask(kvm);
    const int vcpu = kvm.make_vcpu(kvm.make_vm());
    configure(kvm, vcpu, kWindows, kMachineChecks);
    std::vector<std::pair<uint32_t, uint64_t>> state = {
        {0x2ff, 0xc06},      {0x200, 6},          {0x20f, 0x800},     {0x250, 0x0606060606060606}, {0x26f, 0x0505050505050505},
        {0x277, 0x70106},    {0x400, 0},          {0x425, 0xbad},     {0x427, 0x1234},             {0x289, 1},
        {0x40000080, 1},     {0x40000082, 0x5001}, {0x40000083, 0x6001}, {0x40000090, 0x30},       {0x4000009f, 0x31},
        {0x400000b0, 0x3001}, {0x400000b6, 0x3003}, {0x400000b7, 99}};
    if (processor.msrs.count(0x8c) != 0) state.emplace_back(0x8f, 0x1122334455667788);
    for (const auto& [index, value] : state) set_msr(kvm, vcpu, index, value);

    const pb::Image image = image_of({save(kvm, *host, vcpu, kWindows, kMachineChecks)}, kWindows, false);
    FakeKvm other(processor);
    auto other_host = ask(other);
    CHECK(problems_of(image, *other_host).empty());
    other.vms.clear();
    other.vcpus.clear();
    REQUIRE(restart(other, image));
    for (const auto& [index, value] : state) {
      INFO(std::hex << index);
      CHECK(restored(other).msrs[index] == value);
    }
    // A timer's count comes after its configuration: it may turn the timer on.
    auto written = [&](uint32_t index) {
      const auto& writes = restored(other).msr_writes;
      return std::find_if(writes.rbegin(), writes.rend(), [&](const auto& write) { return write.first == index; }) -
             writes.rbegin();
    };
    CHECK(written(0x400000b6) > written(0x400000b7));
  }
}

TEST_CASE("an MSR that one vCPU does not let be read costs one more round of its own, and no other vCPU's") {
  FakeHost processor = intel_host();
  processor.refused = {0x345, 0xce, 0x38d};  // listed, and refused all the same
  FakeKvm kvm(processor);
  auto host = ask(kvm);
  const int vm = kvm.make_vm(), vcpu = kvm.make_vcpu(vm), other = kvm.make_vcpu(vm);

  // Found out beforehand: the target is asked once.
  kvm.get_msrs_calls = 0;
  const KnownMsrs& known = host->known_msrs("", "");
  CHECK(std::find(known.readable.begin(), known.readable.end(), 0x345) == known.readable.end());
  kvm.get_msrs_calls = 0;
  save(kvm, *host, vcpu, "", "");
  CHECK(kvm.get_msrs_calls == 1);

  // What could not be known: nothing else is lost, and nothing for the next time.
  kvm.vcpus[vcpu].msrs.erase(0x3a);
  const pb::KvmVcpuState without = save(kvm, *host, vcpu, "", "");
  CHECK_FALSE(saved_msr(without, 0x3a).has_value());
  CHECK(saved_msr(without, 0x26f).has_value());
  kvm.get_msrs_calls = 0;
  CHECK(saved_msr(save(kvm, *host, other, "", ""), 0x3a).has_value());
  CHECK(kvm.get_msrs_calls == 1);
  kvm.vcpus[vcpu].msrs[0x3a] = 5;
  CHECK(saved_msr(save(kvm, *host, vcpu, "", ""), 0x3a) == 5u);
}

TEST_CASE("another host must know only the MSRs that the guest can see and has changed") {
  FakeKvm intel(intel_host());
  auto host = ask(intel);
  const int vcpu = intel.make_vcpu(intel.make_vm());
  configure(intel, vcpu, kWindows, kMachineChecks);
  FakeHost less = intel_host();
  for (uint32_t index : {0x480u, 0xe1u, 0x48u, 0x8cu, 0x8du, 0x8eu, 0x8fu}) {
    less.msrs.erase(index);
    less.listed.erase(std::remove(less.listed.begin(), less.listed.end(), index), less.listed.end());
  }
  auto problems_with = [&](FakeKvm& there) {
    const pb::Image image = image_of({save(intel, *host, vcpu, kWindows, kMachineChecks)}, kWindows, false);
    auto other_host = ask(there);
    const std::string problems = problems_of(image, *other_host);
    there.vms.clear();
    there.vcpus.clear();
    CHECK(restart(there, image) == problems.empty());
    return problems;
  };
  {
    INFO("0x480 and the SGX key have the values of a new vCPU, though not zero");
    FakeKvm there(less);
    CHECK(problems_with(there).empty());
  }
  {
    INFO("the guest was never shown WAITPKG nor speculation control");
    set_msr(intel, vcpu, 0xe1, 0x100);
    set_msr(intel, vcpu, 0x48, 1);
    FakeKvm there(less);
    CHECK(problems_with(there).empty());
  }
  {
    INFO("it was shown VMX");
    set_msr(intel, vcpu, 0x480, 77);
    FakeKvm there(less);
    CHECK(problems_with(there).find("MSR 0x480") != std::string::npos);
    CHECK(there.failed.args[5] == 0x480);
  }
}

TEST_CASE("what a guest may see is read off its CPUID, and where nobody can tell it may") {
  CHECK(guest_may_see("", 0x40000080));
  CHECK(guest_may_see(kWindows, 0x40000080));
  CHECK_FALSE(guest_may_see(cpuid_of({leaf(1, 0, 0, 0, 0)}), 0x40000080));
  CHECK(guest_may_see(cpuid_of({leaf(0x40000000, 0, 0x4b4d564b, 0, 0)}), 0x4b564d01));
  CHECK_FALSE(guest_may_see(kWindows, 0x4b564d01));
  CHECK(guest_may_see(cpuid_of({leaf(0x80000008, 0, 1u << 14, 0, 0)}), 0x48));  // either vendor's bit
  CHECK_FALSE(guest_may_see(kWindows, 0x48));
  CHECK(guest_may_see(kWindows, 0x174));
}

TEST_CASE("the shadow stack pointer of a guest is saved and set, and no question where the guest has none") {
  FakeKvm kvm(intel_host());
  auto host = ask(kvm);
  const int vcpu = kvm.make_vcpu(kvm.make_vm());
  configure(kvm, vcpu, kWindows, kMachineChecks);
  kvm.vcpus[vcpu].ssp = 0x7fff0000;
  FakeKvm there(intel_host());
  REQUIRE(restart(there, image_of({save(kvm, *host, vcpu, kWindows, kMachineChecks)}, kWindows, false)));
  CHECK(restored(there).ssp == 0x7fff0000);

  const int plain = kvm.make_vcpu(kvm.make_vm());
  CHECK_FALSE(save(kvm, *host, plain, "", "").has_shadow_stack_pointer());
}

TEST_CASE("TSCs go on from where they stood and stay in step, whatever became of the host's TSC") {
  constexpr int64_t kAway_ns = 20'000'000'000;
  constexpr uint64_t kKhz = 2'000'000, kGap = kAway_ns / 1'000'000 * kKhz;
  FakeKvm kvm(intel_host());
  kvm.host_tsc = 1'000'000'000'000;
  auto host = ask(kvm);
  const int vm = kvm.make_vm(), first = kvm.make_vcpu(vm), second = kvm.make_vcpu(vm);
  kvm.vcpus[first].tsc_offset = -900'000'000'000;
  kvm.vcpus[second].tsc_offset = -900'000'000'000 + 5;  // the guest has set it ahead
  std::vector<pb::KvmVcpuState> states = {save(kvm, *host, first, "", "")};
  kvm.host_tsc += 1000;  // one is asked after the other
  states.push_back(save(kvm, *host, second, "", ""));
  constexpr uint64_t kStood = 100'000'001'000;

  auto tsc_after = [&](bool same_boot, uint64_t host_tsc, GuestClock clock) {
    pb::Image image = image_of(states, "", same_boot);
    image.mutable_host()->set_realtime_ns(clock_ns(CLOCK_REALTIME) - kAway_ns);
    FakeKvm there(intel_host());
    there.host_tsc = host_tsc;
    REQUIRE(restart(there, image, clock));
    std::vector<uint64_t> values;
    for (const auto& [fd, vcpu] : there.vcpus) values.push_back(there.host_tsc + static_cast<uint64_t>(vcpu.tsc_offset));
    return values;
  };
  // The host has counted on; it has started anew after a hibernation, with the same boot id.
  for (uint64_t host_tsc : {kvm.host_tsc + kGap, uint64_t{5'000'000}}) {
    CHECK(tsc_after(true, host_tsc, GuestClock::kContinue) == std::vector<uint64_t>{kStood, kStood + 5});
    const auto advanced = tsc_after(true, host_tsc, GuestClock::kAdvance);
    CHECK(advanced[0] >= kStood + kGap);
    CHECK(advanced[0] < kStood + kGap + 60 * 1000 * kKhz);
    CHECK(advanced[1] - advanced[0] == 5);
  }
  // Elsewhere by value: each goes on from what was read.
  const auto elsewhere = tsc_after(false, 7, GuestClock::kContinue);
  CHECK(elsewhere == std::vector<uint64_t>{kStood - 1000, kStood + 5});
}

TEST_CASE(
    "kvmclock goes on from where it stood, or after the gap, and the date at which it was zero is right in the guest's memory") {
  constexpr uint64_t kSecond = 1'000'000'000, kUptime = 5000 * kSecond;
  constexpr int64_t kAway_ns = 20 * int64_t{kSecond};
  const auto now = static_cast<uint64_t>(clock_ns(CLOCK_REALTIME));
  pb::KvmVcpuState state;
  state.set_msrs(bytes_of(kvm_msr_entry{0x4b564d00, 0, 0x1000}) + bytes_of(kvm_msr_entry{0x4b564d03, 0, 0x2000 | 1}));
  for (bool kvm_knows_real_time : {true, false}) {
    for (GuestClock clock : {GuestClock::kContinue, GuestClock::kAdvance}) {
      pb::Image image = image_of({state}, "", true);
      kvm_clock_data saved{};
      saved.clock = kUptime;
      saved.flags = kvm_knows_real_time ? KVM_CLOCK_REALTIME : 0;
      saved.realtime = now - static_cast<uint64_t>(kAway_ns);
      kvm_of(&image).mutable_objects(0)->mutable_vm()->set_clock(bytes_of(saved));
      image.mutable_host()->set_realtime_ns(static_cast<int64_t>(now) - kAway_ns);
      kvm_userspace_memory_region slot{};
      slot.guest_phys_addr = 0;
      slot.memory_size = 0x10000;
      slot.userspace_addr = 0x7000000;
      pb::KvmRecord* record = kvm_of(&image).add_records();
      record->set_object(1);
      record->set_request(KVM_SET_USER_MEMORY_REGION);
      record->set_order(50);
      record->set_payload(bytes_of(slot));

      FakeKvm kvm(intel_host());
      kvm.real_time_ns = now;
      REQUIRE(restart(kvm, image, clock));
      const FakeVm& vm = kvm.vms.begin()->second;
      const uint64_t gap = clock == GuestClock::kAdvance ? static_cast<uint64_t>(kAway_ns) : 0;
      CHECK(vm.clock_ns >= kUptime + gap);
      CHECK(vm.clock_ns < kUptime + gap + 60 * kSecond);
      CHECK(vm.wall_clock_ns == now - vm.clock_ns);
      // Where KVM can tell the real time it adds the gap itself, at the very moment.
      TapeDraft clock_alone;
      const int other = kvm.make_vm();
      GuestTime(image, clock, static_cast<int64_t>(now), true).plan_clock(kvm_of(image).objects(0), other, clock_alone);
      REQUIRE(kvm.play(clock_alone));
      CHECK(kvm.vms.at(other).clock_ns == kUptime + gap);
      // The guest's scheduler is told of the gap, where it asks.
      CHECK((kvm.memory_added[0x7002000] >= gap && (gap != 0 || kvm.memory_added[0x7002000] == 0)));
    }
  }
}

TEST_CASE("a guest that does not ask for stolen time is named when its clock is put forward") {
  pb::KvmVcpuState state;
  state.set_regs(bytes_of(kvm_regs{}));
  state.set_msrs(bytes_of(kvm_msr_entry{0x4b564d03, 0, 0}));
  pb::Image image = image_of({state}, "", true);
  image.mutable_host()->set_realtime_ns(clock_ns(CLOCK_REALTIME) - 20'000'000'000);
  std::vector<std::string> notes;
  note_guests_that_mind_a_gap(image, GuestClock::kContinue, notes);
  CHECK(notes.empty());
  note_guests_that_mind_a_gap(image, GuestClock::kAdvance, notes);
  CHECK(notes.size() == 1);
}

TEST_CASE("a nested guest keeps its state in and out of system management mode") {
  for (bool smm : {false, true}) {
    FakeKvm kvm(intel_host());
    pb::KvmVcpuState state;
    kvm_nested_state nested{};
    nested.size = sizeof nested;
    nested.flags = smm ? 0 : KVM_STATE_NESTED_GUEST_MODE;
    nested.hdr.vmx.vmxon_pa = 0x3000;
    nested.hdr.vmx.smm.flags = smm ? KVM_STATE_NESTED_SMM_VMXON : 0;
    state.set_nested(bytes_of(nested));
    kvm_vcpu_events events{};
    events.flags = KVM_VCPUEVENT_VALID_SMM;
    events.smi.smm = smm;
    state.set_regs(bytes_of(kvm_regs{}));
    state.set_events(bytes_of(events));
    REQUIRE(restart(kvm, image_of({state}, "", true)));
    CHECK(restored(kvm).nested == bytes_of(nested));
    CHECK(restored(kvm).in_smm == smm);
    CHECK_FALSE(restored(kvm).nested_lost);
    // Registers drop what is pending: events are set once more after them.
    const auto& calls = kvm.calls;
    auto last = [&](unsigned long request) {
      return std::find_if(calls.rbegin(), calls.rend(), [&](const auto& call) { return call.second == request; });
    };
    CHECK(last(KVM_SET_VCPU_EVENTS) < last(KVM_SET_REGS));
  }
}

TEST_CASE("the PIT runs only when there is a local APIC that its ticks can come to") {
  FakeKvm kvm(intel_host());
  pb::KvmVcpuState state;
  state.set_lapic(bytes_of(kvm_lapic_state{}));
  pb::Image image = image_of({state, state}, "", true);
  kvm_of(&image).mutable_objects(0)->mutable_vm()->set_pit(bytes_of(kvm_pit_state2{}));
  REQUIRE(restart(kvm, image));
  CHECK_FALSE(kvm.vms.begin()->second.pit_ticks_lost);
}

TEST_CASE("pending exceptions are asked for before what their delivery changes") {
  FakeKvm kvm(intel_host());
  auto host = ask(kvm);
  const int vcpu = kvm.make_vcpu(kvm.make_vm());
  kvm.calls.clear();
  save(kvm, *host, vcpu, "", "");
  auto place = [&](unsigned long request) {
    return std::find_if(kvm.calls.begin(), kvm.calls.end(),
                        [&](const auto& call) { return call.first == vcpu && call.second == request; });
  };
  REQUIRE(place(KVM_GET_SREGS2) != kvm.calls.end());
  CHECK(place(KVM_GET_VCPU_EVENTS) < place(KVM_GET_SREGS2));
  CHECK(place(KVM_GET_VCPU_EVENTS) < place(KVM_GET_DEBUGREGS));
}

TEST_CASE("capabilities that add to each other are all noted, of others the last call") {
  auto cap = [](uint32_t number, uint64_t argument) {
    kvm_enable_cap cap{};
    cap.cap = number;
    cap.args[0] = argument;
    return cap;
  };
  CHECK_FALSE(replaces(cap(KVM_CAP_X86_DISABLE_EXITS, 1), cap(KVM_CAP_X86_DISABLE_EXITS, 2)));
  CHECK(replaces(cap(KVM_CAP_X86_DISABLE_EXITS, 1), cap(KVM_CAP_X86_DISABLE_EXITS, 1)));
  CHECK_FALSE(replaces(cap(KVM_CAP_DISABLE_QUIRKS2, 1), cap(KVM_CAP_DISABLE_QUIRKS2, 2)));
  CHECK(replaces(cap(KVM_CAP_HALT_POLL, 1), cap(KVM_CAP_HALT_POLL, 2)));
  CHECK_FALSE(replaces(cap(KVM_CAP_HALT_POLL, 1), cap(KVM_CAP_X86_DISABLE_EXITS, 1)));

  FakeKvm kvm(intel_host());
  pb::Image image = image_of({}, "", true);
  for (uint64_t exits : {uint64_t{KVM_X86_DISABLE_EXITS_MWAIT}, uint64_t{KVM_X86_DISABLE_EXITS_HLT}}) {
    pb::KvmRecord* record = kvm_of(&image).add_records();
    record->set_object(1);
    record->set_request(KVM_ENABLE_CAP);
    record->set_order(static_cast<uint32_t>(10 + exits));
    record->set_payload(bytes_of(cap(KVM_CAP_X86_DISABLE_EXITS, exits)));
  }
  REQUIRE(restart(kvm, image));
  CHECK(kvm.vms.begin()->second.disabled_exits == std::set<uint64_t>{KVM_X86_DISABLE_EXITS_MWAIT, KVM_X86_DISABLE_EXITS_HLT});
}
