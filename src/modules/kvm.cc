#include "modules/kvm.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <functional>
#include <map>
#include <set>

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "core/clock.h"
#include "core/fd.h"
#include "core/proc.h"
#include "image/one_process.h"
#include "modules/eventfd.pb.h"
#include "modules/kvm_descriptor.pb.h"
#include "modules/module.h"
#include "modules/played/operations.h"
#include "modules/seccomp.h"
#include "recorder/kvm_calls.h"
#include "tracer/remote_memory.h"
#include "tracer/remote_tape.h"

namespace vmckpt {
namespace {

// ---- checkpoint ------------------------------------------------------------------------------------------------------

Result<void> refuse_what_was_lost(const KvmNotes& notes) {
  if (notes.overflows != 0) return error("the virtual machine has more KVM objects than the recorder has room for");
  if (notes.foreign_runs != 0) {
    return error("the VMM runs a vCPU through a descriptor that it got in a way the recorder has not seen",
                 "a VMM that gets its vCPUs from another process, or makes its own system calls, cannot be saved");
  }
  if (notes.unknown_request == 0) return {};
  return error(fmt::format("the VMM has used {}, whose effect cannot be restored", kvm_call_name(notes.unknown_request)),
               "configure the VMM without it, or launch with --allow-devices if its loss does no harm");
}

// A number at which the target has the object; -1: none, it is closed.
class ObjectDescriptors {
 public:
  ObjectDescriptors(pid_t pid, const KvmNotes& notes) : fds_(notes.objects.size(), -1) {
    for (size_t fd = 0; fd < notes.fd_objects.size(); ++fd) {
      const uint16_t object = notes.fd_objects[fd];
      if (object == 0 || object >= fds_.size() || fds_[object] >= 0) continue;
      auto link = read_link(fmt::format("/proc/{}/fd/{}", pid, fd));
      if (link.ok() && is_link_of(notes.objects[object], *link)) fds_[object] = static_cast<int>(fd);
    }
  }
  int of(uint32_t object) const { return fds_[object]; }

 private:
  // The number may have been closed, and be another object's now.
  static bool is_link_of(const KvmObject& object, const std::string& link) {
    const std::string vcpu = fmt::format("anon_inode:kvm-vcpu:{}", object.number);
    switch (object.kind) {
      case KvmKind::kVm: return link == "anon_inode:kvm-vm";
      case KvmKind::kVcpu: return link == "anon_inode:kvm-vcpu" || link == vcpu;
      default: return link.starts_with("anon_inode:kvm-");
    }
  }

  std::vector<int> fds_;
};

bool has_record(const KvmNotes& notes, uint32_t vm, uint32_t request) {
  return std::any_of(notes.records.begin(), notes.records.end(), [&](const KvmRecord& record) {
    return record.valid != 0 && record.object == vm && record.request == request;
  });
}

bool has_split_irqchip(const KvmNotes& notes, uint32_t vm) {
  return std::any_of(notes.records.begin(), notes.records.end(), [&](const KvmRecord& record) {
    if (record.valid == 0 || record.object != vm || record.request != KVM_ENABLE_CAP) return false;
    kvm_enable_cap cap;
    std::memcpy(&cap, notes.heap.data() + record.payload, std::min<size_t>(sizeof cap, record.payload_bytes));
    return cap.cap == KVM_CAP_SPLIT_IRQCHIP;
  });
}

// Whether a VM has irqfds and KVM's PIC and IOAPIC, for which they take their time.
bool has_late_interrupts(const KvmNotes& notes) {
  return std::any_of(notes.records.begin(), notes.records.end(), [&](const KvmRecord& record) {
    return record.valid != 0 && record.request == KVM_IRQFD && has_record(notes, record.object, KVM_CREATE_IRQCHIP);
  });
}

std::string noted_payload(const KvmNotes& notes, uint32_t object, uint32_t request) {
  for (const KvmRecord& record : notes.records) {
    if (record.valid == 0 || record.object != object || record.request != request) continue;
    return std::string(reinterpret_cast<const char*>(notes.heap.data()) + record.payload, record.payload_bytes);
  }
  return {};
}

const KnownMsrs& known_msrs(const KvmNotes& notes, uint32_t vcpu, KvmHost& host) {
  return host.known_msrs(noted_payload(notes, vcpu, KVM_SET_CPUID2), noted_payload(notes, vcpu, KVM_X86_SETUP_MCE));
}

// A VM or vCPU to be asked by one thread of the target.
struct Job {
  uint32_t object;
  bool is_vm;
  bool has_irqchip;
  bool has_pit;
  int fd;
  std::vector<uint32_t> msrs;
  bool msrs_one_by_one = false, has_shadow_stacks = false;
  TapeDraft tape{};
  KvmQuestions questions{};
  pb::KvmObject* saved = nullptr;
};

bool take_answers(Job& job, const KvmHost& host) {
  if (job.is_vm) {
    save_vm(job.questions, job.tape, job.has_irqchip, job.has_pit, job.saved->mutable_vm());
    return true;
  }
  return save_vcpu(job.questions, job.tape, job.has_irqchip, host, job.saved->mutable_vcpu());
}

// As many at the same time as the target has threads.
Result<void> play(StoppedWorld& world, const Ledger& ledger, const pb::Image& image, const KvmHost& host,
                  std::vector<Job>& jobs) {
  for (size_t next = 0; next < jobs.size();) {
    std::vector<ThreadTape> tapes;
    const size_t first = next;
    int index = 0;
    for (Tracee& thread : world.threads()) {
      if (next == jobs.size()) break;
      Job& job = jobs[next++];
      job.tape = TapeDraft();
      job.questions = KvmQuestions();
      if (job.is_vm) {
        ask_vm(job.fd, job.has_irqchip, job.has_pit, job.tape, job.questions);
      } else {
        job.questions.msrs = job.msrs;
        job.questions.msrs_one_by_one = job.msrs_one_by_one;
        job.questions.has_shadow_stacks = job.has_shadow_stacks;
        ask_vcpu(job.fd, job.has_irqchip, host, job.tape, job.questions);
      }
      VMCKPT_TRY(check_tape_against_filters(one_process(image).process.threads(index++), job.tape, TapeNeeds::kNoHarm));
      tapes.push_back({&thread, &job.tape});
    }
    VMCKPT_TRY(play_tapes(world, ledger, tapes));
    for (size_t i = first; i < next; ++i) {
      if (take_answers(jobs[i], host)) continue;
      jobs[i].msrs_one_by_one = true;
      next = i;  // ask this one and those after it again
      break;
    }
  }
  return {};
}

pb::KvmObject::Kind kind_of(KvmKind kind) {
  switch (kind) {
    case KvmKind::kVm: return pb::KvmObject::VM;
    case KvmKind::kVcpu: return pb::KvmObject::VCPU;
    default: return pb::KvmObject::OTHER;
  }
}

void save_records(const KvmNotes& notes, pb::Kvm* saved) {
  std::vector<const KvmRecord*> records;
  for (const KvmRecord& record : notes.records) {
    if (record.valid != 0 && find_kvm_object(*saved, record.object) != nullptr) records.push_back(&record);
  }
  std::sort(records.begin(), records.end(), [](const KvmRecord* a, const KvmRecord* b) { return a->order < b->order; });
  for (const KvmRecord* record : records) {
    pb::KvmRecord* entry = saved->add_records();
    entry->set_object(record->object);
    entry->set_request(record->request);
    entry->set_order(record->order);
    entry->set_argument(record->argument);
    if (record->payload_bytes == 0) continue;
    entry->set_payload(notes.heap.data() + record->payload, record->payload_bytes);
  }
}

}  // namespace

void prepare_kvm(const KvmNotes& notes, KvmHost& host) {
  for (uint32_t i = 1; i < notes.objects.size(); ++i) {
    if (notes.objects[i].kind == KvmKind::kVcpu) known_msrs(notes, i, host);
  }
  if (has_late_interrupts(notes) && !host.irqfd_flush) host.irqfd_flush = IrqfdFlush::make(host);
}

bool has_split_irqchip(const KvmNotes& notes) {
  for (uint32_t i = 1; i < notes.objects.size(); ++i) {
    if (notes.objects[i].kind == KvmKind::kVm && has_split_irqchip(notes, i)) return true;
  }
  return false;
}

Result<void> save_kvm(StoppedWorld& world, const Ledger& ledger, const KvmNotes& notes, KvmHost& host, pb::Image& image) {
  pb::Kvm* saved = &kvm_of(&image);
  saved->set_mm_id(one_process(image).memory.id());
  VMCKPT_TRY(refuse_what_was_lost(notes));
  if (has_late_interrupts(notes)) {
    if (!host.irqfd_flush) host.irqfd_flush = IrqfdFlush::make(host);  // it has got its first irqfd since prepare_kvm()
    VMCKPT_TRY(host.irqfd_flush->run(host));
  }
  const ObjectDescriptors descriptors(world.pid(), notes);
  std::vector<Job> jobs;
  saved->mutable_objects()->Reserve(static_cast<int>(notes.objects.size()));
  for (uint32_t i = 1; i < notes.objects.size(); ++i) {
    const KvmObject& object = notes.objects[i];
    const uint32_t vm = object.kind == KvmKind::kVm ? i : object.parent;
    // With its last descriptor a VM is gone for good, and its vCPUs with theirs.
    const bool is_closed = descriptors.of(i) < 0;
    const bool vm_is_closed = vm == 0 || vm >= notes.objects.size() || descriptors.of(vm) < 0;
    if (is_closed && (object.kind != KvmKind::kVcpu || vm_is_closed)) continue;
    if (vm_is_closed && object.kind == KvmKind::kVcpu) {
      return error(fmt::format("the VMM has closed the VM of its vCPU {} (descriptor {})", object.number, descriptors.of(i)),
                   "only a VM whose descriptor is open can be saved");
    }
    pb::KvmObject* entry = saved->add_objects();
    entry->set_id(i);
    entry->set_kind(kind_of(object.kind));
    entry->set_parent(object.parent);
    entry->set_request(object.request);
    entry->set_number(object.number);
    entry->set_order(object.order);
    if (is_closed || object.kind == KvmKind::kOther) continue;
    const bool in_kernel = has_record(notes, vm, KVM_CREATE_IRQCHIP);
    const bool is_vm = object.kind == KvmKind::kVm;
    const bool has_pit = has_record(notes, vm, KVM_CREATE_PIT2) || has_record(notes, vm, KVM_CREATE_PIT);
    Job& job = jobs.emplace_back(
        Job{i, is_vm, in_kernel || (!is_vm && has_split_irqchip(notes, vm)), has_pit, descriptors.of(i), {}});
    job.saved = entry;
    if (is_vm) continue;
    const KnownMsrs& known = known_msrs(notes, i, host);
    job.msrs = known.readable;
    job.has_shadow_stacks = guest_may_see(noted_payload(notes, i, KVM_SET_CPUID2), kMsrOfShadowStacks);
    for (const auto& [index, value] : known.fresh) {
      const kvm_msr_entry fresh{index, 0, value};
      if (value != 0) entry->mutable_vcpu()->mutable_fresh_msrs()->append(reinterpret_cast<const char*>(&fresh), sizeof fresh);
    }
    if (object.run == 0) continue;
    entry->set_run_address(object.run);
    entry->mutable_vcpu()->mutable_run()->resize(host.run_bytes);
    VMCKPT_TRY(read_memory(world.pid(), RemoteAddr(object.run), entry->mutable_vcpu()->mutable_run()->data(), host.run_bytes));
  }
  VMCKPT_TRY(play(world, ledger, image, host, jobs));
  save_records(notes, saved);
  for (const kvm_cpuid_entry2& entry : host.cpuid) saved->add_host_cpuid(&entry, sizeof entry);
  return {};
}

Result<void> link_kvm_events(const KvmNotes& notes, pb::Image& image) {
  const DescriptorsOfFiles descriptors(one_process(image).descriptors);
  std::set<int> numbers;
  for (const pb::OpenFile& file : image.open_files()) {
    if (!file.HasExtension(pb::eventfd)) continue;
    for (const pb::Descriptor& descriptor : descriptors.of(file)) numbers.insert(descriptor.number());
  }
  auto name_of = [&](int number) {
    return static_cast<size_t>(number) < notes.event_names.size() ? notes.event_names[static_cast<size_t>(number)] : 0;
  };
  // The number that it had then, or another one of the same name. Numbers beyond the recorder's table have no names.
  auto find = [&](int then, uint32_t name) {
    if (numbers.count(then) != 0 && name_of(then) == name) return then;
    auto found = std::find_if(numbers.begin(), numbers.end(), [&](int number) { return name != 0 && name_of(number) == name; });
    return found == numbers.end() ? -1 : *found;
  };
  std::map<uint32_t, const KvmRecord*> noted;
  for (const KvmRecord& record : notes.records) {
    if (record.valid != 0) noted[record.order] = &record;
  }
  for (pb::KvmRecord& entry : *kvm_of(&image).mutable_records()) {
    if (!kvm_call_refers_to_events(entry.request())) continue;
    const KvmRecord& record = *noted.at(entry.order());
    for (int i = 0; i < 2; ++i) {
      int number = -1;
      if (record.event_fds[i] >= 0) {
        number = find(record.event_fds[i], record.event_names[i]);
        if (number < 0) {
          return error(fmt::format("the VMM has closed the eventfd (once descriptor {}) that it gave to {}", record.event_fds[i],
                                   kvm_call_name(entry.request())),
                       "another process may hold it: vhost-user and the like cannot be saved");
        }
      }
      entry.add_events(number);
    }
  }
  return {};
}

// ---- restart ---------------------------------------------------------------------------------------------------------

namespace {

// Numbers of an object in the new process: those of the target, or one that is closed with restart's own.
class RestoredDescriptors {
 public:
  RestoredDescriptors(const pb::Image& image, int first_service_fd) {
    const DescriptorsOfFiles descriptors(one_process(image).descriptors);
    for (const pb::OpenFile& file : image.open_files()) {
      if (file.HasExtension(pb::kvm)) descriptors_[file.GetExtension(pb::kvm).object()] = descriptors.of(file);
    }
    // Far above whatever restart has opened.
    constexpr int kRoomForRestart = 900;
    next_ = first_service_fd + kRoomForRestart;
    for (const pb::KvmObject& object : kvm_of(image).objects()) {
      const auto& own = of(object.id());
      fds_[object.id()] = own.empty() ? next_++ : own.front().number();
    }
  }
  int fd(uint32_t object) const { return fds_.at(object); }
  // Ascending; none: every one was closed.
  const std::vector<pb::Descriptor>& of(uint32_t object) const {
    static const std::vector<pb::Descriptor> kNone;
    auto found = descriptors_.find(object);
    return found == descriptors_.end() ? kNone : found->second;
  }

 private:
  std::map<uint32_t, std::vector<pb::Descriptor>> descriptors_;
  std::map<uint32_t, int> fds_;
  int next_;
};

uint64_t number(int fd) { return static_cast<uint64_t>(fd); }

void plan_object(const pb::KvmObject& object, const RestoredDescriptors& descriptors, int device, TapeDraft& tape) {
  const std::vector<pb::Descriptor>& own = descriptors.of(object.id());
  const int fd = descriptors.fd(object.id());
  const int from = object.kind() == pb::KvmObject::VM ? device : descriptors.fd(object.parent());
  const bool close_on_exec = own.empty() || own.front().close_on_exec();
  tape.call(kOpMakeDescriptor,
            {number(from), object.request(), object.number(), number(fd), close_on_exec ? uint64_t{O_CLOEXEC} : 0}, true,
            fmt::format("{} for descriptor {}", kvm_call_name(object.request()), fd));
  for (size_t i = 1; i < own.size(); ++i) {
    const pb::Descriptor& other = own[i];
    tape.call(SYS_dup3, {number(fd), number(other.number()), other.close_on_exec() ? uint64_t{O_CLOEXEC} : 0}, true,
              fmt::format("put a KVM object at number {}", other.number()));
  }
  if (object.run_address() == 0) return;
  tape.call(SYS_mmap,
            {object.run_address(), object.vcpu().run().size(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, number(fd), 0},
            true, fmt::format("map kvm_run of vCPU {}", object.number()));
}

// The bitmaps lie behind the structure (recorder/kvm_calls.h).
void point_to_bitmaps(const std::string& payload, const TapeWord& argument, TapeDraft& tape) {
  const auto& filter = *reinterpret_cast<const kvm_msr_filter*>(payload.data());
  uint64_t next = sizeof filter;
  for (const kvm_msr_filter_range& range : filter.ranges) {
    if (range.nmsrs == 0) continue;
    const auto pointer = reinterpret_cast<const char*>(&range.bitmap) - payload.data();
    tape.point(argument, static_cast<size_t>(pointer), argument + next);
    next += msr_bitmap_bytes(range);
  }
}

void plan_record(const pb::KvmRecord& record, const RestoredDescriptors& descriptors, TapeDraft& tape) {
  std::string payload = record.payload();
  if (record.request() == KVM_IRQFD) {
    auto* irqfd = reinterpret_cast<kvm_irqfd*>(payload.data());
    irqfd->fd = static_cast<uint32_t>(record.events(0));
    if (record.events(1) >= 0) irqfd->resamplefd = static_cast<uint32_t>(record.events(1));
  } else if (record.request() == KVM_IOEVENTFD) {
    reinterpret_cast<kvm_ioeventfd*>(payload.data())->fd = record.events(0);
  }
  const TapeWord argument = record.has_payload() ? tape.data(payload.data(), payload.size()) : TapeWord(record.argument());
  if (record.request() == KVM_X86_SET_MSR_FILTER) point_to_bitmaps(payload, argument, tape);
  tape.call(SYS_ioctl, {number(descriptors.fd(record.object())), record.request(), argument}, true,
            fmt::format("{} again", kvm_call_name(record.request())));
}

// The offsets are taken from one reading of the host's TSC, as late as can be. Returns where each vCPU's will lie.
std::map<uint32_t, TapeWord> plan_tsc_offsets(const pb::Kvm& kvm, const GuestTime& time, TapeDraft& tape) {
  std::vector<uint64_t> words;
  std::vector<uint32_t> vcpus;
  std::map<uint32_t, TapeWord> places;
  for (const pb::KvmObject& object : kvm.objects()) {
    if (!object.has_vcpu() || !time.tsc_of(object).by_offset) continue;
    vcpus.push_back(object.id());
    words.push_back(time.tsc_of(object).goes_on_at);
  }
  if (words.empty()) return places;
  const TapeWord room = tape.data(words.data(), words.size() * sizeof(uint64_t));
  for (size_t i = 0; i < vcpus.size(); ++i) places[vcpus[i]] = room + i * sizeof(uint64_t);
  tape.call(kOpSubtractTsc, {room, words.size()}, true, "take TSC offsets from the host's TSC");
  return places;
}

}  // namespace

Result<void> plan_kvm(const pb::Image& image, int device, int first_service_fd, GuestClock clock, TapeDraft& tape) {
  const pb::Kvm& kvm = kvm_of(image);
  if (kvm.objects_size() == 0) return {};
  const RestoredDescriptors descriptors(image, first_service_fd);
  // 1. objects and configuration, as the VMM made them: KVM wants some of it before and some after the first vCPU
  std::vector<std::pair<uint32_t, std::function<void()>>> steps;
  for (const pb::KvmObject& object : kvm.objects()) {
    steps.emplace_back(object.order(), [&] { plan_object(object, descriptors, device, tape); });
  }
  for (const pb::KvmRecord& record : kvm.records()) {
    if (!kvm_call_refers_to_events(record.request()))
      steps.emplace_back(record.order(), [&] { plan_record(record, descriptors, tape); });
  }
  std::sort(steps.begin(), steps.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  for (auto& [order, step] : steps) step();
  // 2. state: interrupt controllers first, since a local APIC that is set looks at what they route; the clock before vCPUs, since
  // MSR_KVM_WALL_CLOCK makes KVM write the date at which the clock was zero into the guest's memory
  const int clock_flags = ::ioctl(device, KVM_CHECK_EXTENSION, KVM_CAP_ADJUST_CLOCK);
  const GuestTime time(image, clock, clock_ns(CLOCK_REALTIME), clock_flags > 0 && (clock_flags & KVM_CLOCK_REALTIME) != 0);
  auto plan_clocks = [&] {
    for (const pb::KvmObject& object : kvm.objects()) {
      if (object.has_vm()) time.plan_clock(object, descriptors.fd(object.id()), tape);
    }
  };
  for (const pb::KvmObject& object : kvm.objects()) {
    if (object.has_vm()) plan_vm_state(object.vm(), descriptors.fd(object.id()), tape);
  }
  plan_clocks();
  const auto tsc_offsets = plan_tsc_offsets(kvm, time, tape);
  for (const pb::KvmObject& object : kvm.objects()) {
    if (!object.has_vcpu()) continue;
    auto offset = tsc_offsets.find(object.id());
    plan_vcpu_state(object.vcpu(), payload_of(kvm, object.id(), KVM_SET_CPUID2), time.tsc_of(object),
                    offset == tsc_offsets.end() ? TapeWord() : offset->second, descriptors.fd(object.id()), tape);
  }
  // 3. what runs by itself as late as possible, before any vCPU runs
  for (const pb::KvmObject& object : kvm.objects()) {
    if (object.has_vm()) plan_pit(object.vm(), descriptors.fd(object.id()), tape);
  }
  plan_clocks();
  for (const pb::KvmObject& object : kvm.objects()) {
    if (!object.has_vcpu()) continue;
    // The guest's watchdogs shall not take the gap for a hang. Refused where the guest does not use kvmclock.
    tape.call(SYS_ioctl, {number(descriptors.fd(object.id())), KVM_KVMCLOCK_CTRL, 0});
    time.plan_stolen_time(object, tape);
  }
  // 4. eventfds that inject or are signalled: one that is pending acts at once, on the state that is there
  for (const pb::KvmRecord& record : kvm.records()) {
    if (!kvm_call_refers_to_events(record.request())) continue;
    plan_record(record, descriptors, tape);
  }
  // 5. what the VMM reads in kvm_run: the ioctls above have changed it
  for (const pb::KvmObject& object : kvm.objects()) {
    if (object.run_address() == 0) continue;
    const std::string& run = object.vcpu().run();
    tape.call(kOpCopyBytes, {object.run_address(), tape.data(run.data(), run.size()), run.size()}, true, "fill kvm_run");
  }
  return {};
}

namespace {

Result<void> prepare(StateSave& state) {
  const RemoteAddr kvm_ledger(state.ledger->kvm);
  state.memory_options.is_vmm = VMCKPT_TRY(count_kvm_objects(state.pid, kvm_ledger)) != 0;
  if (!state.memory_options.is_vmm) return {};
  if (!state.kvm_host) state.kvm_host = VMCKPT_TRY(KvmHost::ask());
  // The target may just be writing them: what is missed now is found out later.
  if (auto early_notes = read_kvm_notes(state.pid, kvm_ledger); early_notes.ok()) {
    prepare_kvm(**early_notes, *state.kvm_host);
    state.has_split_irqchip = has_split_irqchip(**early_notes);
  }
  return {};
}

Result<void> quiesce(StateSave& state) {
  const RemoteAddr kvm_ledger(state.ledger->kvm);
  if (kvm_ledger) state.interrupted.set_kvm_run_code(VMCKPT_TRY(find_kvm_run_code(state.pid, kvm_ledger)));
  if (state.memory_options.is_vmm) state.gate.emplace(VMCKPT_TRY(VcpuGate::close(state.pid, kvm_ledger)));
  return {};
}

std::vector<RunMapping> run_mappings_of(const pb::AddressSpace& memory) {
  std::vector<RunMapping> mappings;
  for (const pb::Mapping& mapping : memory.mappings()) {
    if (mapping.kind() == pb::Mapping::VCPU_RUN) mappings.push_back({RemoteAddr(mapping.start()), mapping.name()});
  }
  return mappings;
}

Result<void> save(StateSave& state) {
  if (!state.memory_options.is_vmm) return {};
  state.kvm_notes = VMCKPT_TRY(read_kvm_notes(state.pid, RemoteAddr(state.ledger->kvm)));
  find_runs(run_mappings_of(one_process(state.image).memory), state.kvm_notes->objects);
  return save_kvm(*state.world, *state.ledger, *state.kvm_notes, *state.kvm_host, state.image);
}

Result<void> connect(StateSave& state) {
  if (!state.kvm_notes) return {};
  return link_kvm_events(*state.kvm_notes, state.image);
}

Result<void> restore(StateRestore& state) {
  if (state.image.ExtensionSize(pb::virtual_machines) == 0) return {};
  state.kvm_device = VMCKPT_TRY(state.lift(VMCKPT_TRY(open_file("/dev/kvm", O_RDWR))));
  return {};
}

void check(Preflight& preflight) {
  check_kvm(preflight.image, preflight.cpu_check, preflight.guest_clock, preflight.problems, preflight.notes);
}

Result<void> plan(ProcessPlan& process) {
  return plan_kvm(process.image, process.kvm_device, process.first_service_fd, process.guest_clock, process.tape);
}

}  // namespace

extern const StateModule kVirtualMachinesModule{.name = "virtual machines",
                                                .prepare = prepare,
                                                .quiesce = quiesce,
                                                .save = save,
                                                .connect = connect,
                                                .check = check,
                                                .restore = restore,
                                                .plan = plan};

}  // namespace vmckpt
