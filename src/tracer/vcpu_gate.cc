#include "tracer/vcpu_gate.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <map>
#include <set>

#include <sys/syscall.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/fd.h"
#include "core/kvm_api.h"
#include "core/page.h"
#include "core/proc.h"
#include "tracer/remote_memory.h"

namespace vmckpt {
namespace {

constexpr int64_t kLookAgainUs = 30;
constexpr int64_t kKeepClosedUs = 1'000;
constexpr int64_t kOnItsWayUs = 200;

struct Head {
  uint32_t gate, objects_used, records_used, heap_used, next_order, lock, overflows, unknown_request, unknown_object, tolerated,
      foreign_runs, next_event_name;
  KvmRunCode code;
};
static_assert(sizeof(Head) == offsetof(KvmLedger, event_names));

Result<Head> read_head(pid_t pid, RemoteAddr ledger) {
  Head head{};
  VMCKPT_TRY(read_memory(pid, ledger, &head, sizeof head));
  if (head.objects_used >= kKvmObjects || head.records_used > kKvmRecords || head.heap_used > kKvmHeapBytes) {
    return error(fmt::format("the KVM notes of process {} are damaged", pid));
  }
  return head;
}

constexpr std::string_view kRunName = "anon_inode:kvm-vcpu";

bool may_be_of(const RunMapping& mapping, const KvmObject& vcpu) {
  const std::string_view rest = std::string_view(mapping.name).substr(kRunName.size());
  return rest.empty() || rest == ":" + std::to_string(vcpu.number);
}

// Exits that leave nothing to finish: KVM has no completion for them (arch/x86/kvm, complete_userspace_io). A VMM may keep a
// vCPU after them for as long as it likes.
bool leaves_nothing_to_finish(uint32_t exit_reason) {
  switch (exit_reason) {
    case KVM_EXIT_UNKNOWN: case KVM_EXIT_EXCEPTION: case KVM_EXIT_DEBUG: case KVM_EXIT_HLT: case KVM_EXIT_IRQ_WINDOW_OPEN:
    case KVM_EXIT_SHUTDOWN: case KVM_EXIT_FAIL_ENTRY: case KVM_EXIT_INTR: case KVM_EXIT_SET_TPR: case KVM_EXIT_NMI:
    case KVM_EXIT_INTERNAL_ERROR: case KVM_EXIT_SYSTEM_EVENT: case KVM_EXIT_IOAPIC_EOI:
      return true;
    default:
      return false;
  }
}

// ---- what threads are doing -------------------------------------------------------------------------------------------

enum class Whereabouts { kOut, kOutWithExit, kOnItsWay };

// Where the thread that runs a vCPU stands, and what KVM_RUN has answered.
class Threads {
 public:
  Threads(const StoppedWorld& world, const KvmRunCode& code, RemoteAddr first_object)
      : world_(world), code_(code), first_object_(first_object) {}

  Whereabouts of(uint32_t object) {
    const RemoteAddr vcpu = first_object_ + object * sizeof(KvmObject);
    for (const StoppedThread& thread : world_.threads()) {
      if (RemoteAddr(thread.regs.r8) != vcpu || !is_behind_run(RemoteAddr(thread.regs.rip))) continue;
      return by_answer(static_cast<int64_t>(thread.regs.rax));
    }
    // In a signal handler that has interrupted KVM_RUN: some VMMs keep vCPUs there for as long as they are paused.
    if (!looked_at_stacks_) look_at_stacks();
    auto frame = answers_.find(vcpu);
    return frame == answers_.end() ? Whereabouts::kOnItsWay : by_answer(frame->second);
  }

 private:
  // The instruction behind KVM_RUN, or for a thread whose EINTR is hidden the one after it.
  bool is_behind_run(RemoteAddr rip) const { return rip == code_.returns || rip == code_.returns + kSyscallInstructionBytes; }

  // The number of the call: it was stopped before, and has not looked at the gate again yet.
  static Whereabouts by_answer(int64_t answer) {
    return answer < 0 || answer == SYS_ioctl ? Whereabouts::kOut : Whereabouts::kOutWithExit;
  }

  // Finds the registers that the kernel keeps below a handler, struct sigcontext (arch/x86/include/uapi/asm/sigcontext.h): r8 and
  // fifteen more, then rip.
  void look_at_stacks() {
    looked_at_stacks_ = true;
    constexpr size_t kRip = 16, kRax = 13, kRsi = 9;  // words behind r8
    constexpr uint64_t kMostBytes = 256 * 1024;
    for (const StoppedThread& thread : world_.threads()) {
      std::vector<uint64_t> words;
      RemoteAddr next(thread.regs.rsp & ~uint64_t{7});
      while (words.size() * 8 < kMostBytes) {
        const uint64_t bytes = kPageBytes - next.value() % kPageBytes;
        const size_t had = words.size();
        words.resize(had + bytes / 8);
        if (!read_memory(world_.pid(), next, words.data() + had, bytes).ok()) {
          words.resize(had);
          break;
        }
        next += bytes;
      }
      for (size_t i = 0; i + kRip < words.size(); ++i) {
        const uint64_t* saved = words.data() + i;
        if (!is_behind_run(RemoteAddr(saved[kRip])) || saved[kRsi] != KVM_RUN) continue;
        answers_.emplace(RemoteAddr(saved[0]), static_cast<int64_t>(saved[kRax]));
      }
    }
  }

  const StoppedWorld& world_;
  const KvmRunCode& code_;
  RemoteAddr first_object_;
  bool looked_at_stacks_ = false;
  std::map<RemoteAddr, int64_t> answers_;  // by the vCPU's address
};

}  // namespace

Result<uint32_t> count_kvm_objects(pid_t pid, RemoteAddr kvm_ledger) {
  if (!kvm_ledger) return uint32_t{0};
  return VMCKPT_TRY(read_head(pid, kvm_ledger)).objects_used;
}

Result<KvmRunCode> find_kvm_run_code(pid_t pid, RemoteAddr kvm_ledger) { return VMCKPT_TRY(read_head(pid, kvm_ledger)).code; }

Result<std::unique_ptr<KvmNotes>> read_kvm_notes(pid_t pid, RemoteAddr kvm_ledger) {
  const Head head = VMCKPT_TRY(read_head(pid, kvm_ledger));
  auto notes = std::make_unique<KvmNotes>();
  notes->overflows = head.overflows;
  notes->unknown_request = head.unknown_request;
  notes->unknown_object = head.unknown_object;
  notes->foreign_runs = head.foreign_runs;
  notes->event_names.resize(kKvmKnownFds);
  notes->fd_objects.resize(kKvmKnownFds);
  notes->objects.resize(head.objects_used + 1);
  notes->records.resize(head.records_used);
  notes->heap.resize(head.heap_used);
  auto read = [&](size_t offset, auto& vector) {
    return read_memory(pid, kvm_ledger + offset, vector.data(), vector.size() * sizeof(vector[0]));
  };
  VMCKPT_TRY(read(offsetof(KvmLedger, event_names), notes->event_names));
  VMCKPT_TRY(read(offsetof(KvmLedger, by_fd), notes->fd_objects));
  VMCKPT_TRY(read(offsetof(KvmLedger, objects), notes->objects));
  VMCKPT_TRY(read(offsetof(KvmLedger, records), notes->records));
  VMCKPT_TRY(read(offsetof(KvmLedger, heap), notes->heap));
  for (const KvmRecord& record : notes->records) {
    if (record.payload > head.heap_used || record.payload_bytes > head.heap_used - record.payload) {
      return error(fmt::format("the KVM notes of process {} are damaged", pid));
    }
  }
  return notes;
}

std::vector<RunMapping> run_mappings(std::string_view maps) {
  std::vector<RunMapping> mappings;
  for (std::string_view line : split_lines(maps)) {
    if (line.find(kRunName) == std::string_view::npos) continue;
    auto words = split_words(line);
    if (words.size() < 6 || !words[5].starts_with(kRunName) || parse_hex(words[2]) != 0) continue;
    mappings.push_back({RemoteAddr(parse_hex(words[0].substr(0, words[0].find('-')))), std::string(words[5])});
  }
  return mappings;
}

void find_runs(const std::vector<RunMapping>& mappings, std::vector<KvmObject>& objects) {
  std::set<RemoteAddr> taken;
  // Newest first: an address or number that two have had is the younger one's.
  auto for_each_vcpu = [&](auto function) {
    for (auto object = objects.rbegin(); object != objects.rend(); ++object) {
      if (object->kind == KvmKind::kVcpu) function(*object);
    }
  };
  auto take = [&](KvmObject& object, auto wanted) {
    for (const RunMapping& mapping : mappings) {
      if (!wanted(mapping.start) || !may_be_of(mapping, object) || !taken.insert(mapping.start).second) continue;
      object.run = mapping.start.value();
      return true;
    }
    return false;
  };
  std::vector<KvmObject*> left;
  for_each_vcpu([&](KvmObject& object) {
    const RemoteAddr mapped(object.mapped), before(std::exchange(object.run, 0));
    if (take(object, [&](RemoteAddr start) { return start == mapped; })) return;
    if (take(object, [&](RemoteAddr start) { return start == before; })) return;
    left.push_back(&object);
  });
  for (KvmObject* object : left) take(*object, [](RemoteAddr) { return true; });
}

Result<VcpuGate> VcpuGate::close(pid_t pid, RemoteAddr kvm_ledger) {
  const Head head = VMCKPT_TRY(read_head(pid, kvm_ledger));
  VcpuGate gate(pid, kvm_ledger, head.gate | 1);
  VMCKPT_TRY(gate.check_runs());
  VMCKPT_TRY(gate.keep_closed());
  return gate;
}

VcpuGate::VcpuGate(VcpuGate&& other) noexcept
    : pid_(other.pid_), ledger_(std::exchange(other.ledger_, RemoteAddr())), closed_value_(other.closed_value_) {}

void VcpuGate::open() {
  if (!ledger_) return;
  const uint32_t value = closed_value_ + 1;
  (void)write_memory(pid_, ledger_ + offsetof(KvmLedger, gate), &value, sizeof value);  // fails only when the target has ended
  ledger_ = RemoteAddr();
}

Result<void> VcpuGate::keep_closed() {
  closed_value_ += 2;
  return write_memory(pid_, ledger_ + offsetof(KvmLedger, gate), &closed_value_, sizeof closed_value_);
}

Result<std::vector<KvmObject>> VcpuGate::read_objects() const {
  const Head head = VMCKPT_TRY(read_head(pid_, ledger_));
  std::vector<KvmObject> objects(head.objects_used + 1);
  VMCKPT_TRY(read_memory(pid_, ledger_ + offsetof(KvmLedger, objects), objects.data(), objects.size() * sizeof(KvmObject)));
  return objects;
}

// At the closed gate the recorder writes to where kvm_run is: it must be there.
Result<void> VcpuGate::check_runs() const {
  std::vector<KvmObject> objects = VMCKPT_TRY(read_objects());
  std::vector<uint64_t> before;
  for (const KvmObject& object : objects) before.push_back(object.run);
  find_runs(run_mappings(VMCKPT_TRY(read_whole_file(fmt::format("/proc/{}/maps", pid_)))), objects);
  for (size_t i = 0; i < objects.size(); ++i) {
    if (objects[i].run == before[i]) continue;
    const RemoteAddr address = ledger_ + offsetof(KvmLedger, objects) + i * sizeof(KvmObject) + offsetof(KvmObject, run);
    VMCKPT_TRY(write_memory(pid_, address, &objects[i].run, sizeof objects[i].run));
  }
  return {};
}

// KVM notes the end of an interrupt as a request (KVM_REQ_IOAPIC_EOI_EXIT), which no ioctl shows, and makes an exit of it when
// the vCPU is to enter the guest the next time. A vCPU that was taken out of KVM_RUN in between would be saved without it, and
// the IOAPIC of the VMM would wait for it for ever. With a signal pending KVM serves requests all the same, before it looks at
// signals, and enters no guest (arch/x86/kvm/x86.c, vcpu_enter_guest; with immediate_exit it does not come so far). Twice: the
// first time it may have got an interrupt ready, which some hosts (PVM) end by that.
Result<void> VcpuGate::serve_requests(StoppedWorld& world, const Waiting& waiting, InterruptedCalls& interrupted) {
  constexpr int kTimes = 2;
  const Head head = VMCKPT_TRY(read_head(pid_, ledger_));
  const std::vector<KvmObject> objects = VMCKPT_TRY(read_objects());
  const RemoteAddr first_object = ledger_ + offsetof(KvmLedger, objects);
  for (Tracee& thread : world.threads()) {
    for (int i = 0; i < kTimes; ++i) {
      const uint64_t index = (RemoteAddr(thread.regs.r8) - first_object) / sizeof(KvmObject);
      const bool is_hidden = RemoteAddr(thread.regs.rip) ==
                             head.code.returns + kSyscallInstructionBytes;  // inside the call, or at the gate
      if (thread.group_stopped || !is_hidden || index >= objects.size() || objects[index].kind != KvmKind::kVcpu) break;
      user_regs_struct regs = thread.regs;
      regs.rip = head.code.returns.value();
      regs.rdx = 0;
      VMCKPT_TRY(repeat_call(world, thread, regs, waiting, interrupted));
      if (RemoteAddr(thread.regs.rip) != head.code.returns || thread.regs.rax != 0) continue;
      const VcpuState state = VcpuState::kExited;
      VMCKPT_TRY(write_memory(pid_, first_object + index * sizeof(KvmObject) + offsetof(KvmObject, state), &state, sizeof state));
    }
  }
  return {};
}

// A VMM that has unmapped kvm_run has let go of the vCPU: it will answer nothing any more.
Result<bool> VcpuGate::has_unfinished_io(const KvmObject& object) const {
  if (object.run == 0) return false;
  uint32_t exit_reason = 0;
  VMCKPT_TRY(read_memory(pid_, RemoteAddr(object.run) + offsetof(kvm_run, exit_reason), &exit_reason, sizeof exit_reason));
  return !leaves_nothing_to_finish(exit_reason);
}

Result<std::optional<VcpuGate::Busy>> VcpuGate::find_busy(const StoppedWorld& world) {
  const Head head = VMCKPT_TRY(read_head(pid_, ledger_));
  Threads threads(world, head.code, ledger_ + offsetof(KvmLedger, objects));
  const std::vector<KvmObject> objects = VMCKPT_TRY(read_objects());
  for (uint32_t i = 1; i < objects.size(); ++i) {
    const KvmObject& object = objects[i];
    if (object.kind != KvmKind::kVcpu || object.state == VcpuState::kQuiet) continue;
    Whereabouts whereabouts = object.state == VcpuState::kExited ? Whereabouts::kOutWithExit : threads.of(i);
    if (whereabouts == Whereabouts::kOut) continue;
    const bool is_in_run = whereabouts == Whereabouts::kOnItsWay;
    if (is_in_run || VMCKPT_TRY(has_unfinished_io(object))) return std::optional(Busy{i, object.number, is_in_run});
  }
  return std::optional<Busy>();
}

Result<bool> VcpuGate::wait_for(const Busy& busy, const Waiting& waiting) {
  VMCKPT_TRY(check_runs());  // a vCPU may have been made since, and its kvm_run mapped
  int64_t keep_closed_us = 0;
  const int64_t until_us = busy.is_in_run ? waiting.no_longer_than(kOnItsWayUs).deadline_us() : waiting.deadline_us();
  for (int64_t now_us; (now_us = monotonic_us()) < until_us; ::usleep(kLookAgainUs)) {
    VMCKPT_TRY(waiting.check());
    if (now_us >= keep_closed_us) {
      VMCKPT_TRY(keep_closed());
      keep_closed_us = now_us + kKeepClosedUs;
    }
    KvmObject object{};
    VMCKPT_TRY(read_memory(pid_, ledger_ + offsetof(KvmLedger, objects) + busy.object * sizeof object, &object, sizeof object));
    if (object.state == VcpuState::kQuiet) return true;
    if (!busy.is_in_run && (object.state == VcpuState::kRunning || !VMCKPT_TRY(has_unfinished_io(object)))) return true;
  }
  return busy.is_in_run;
}

std::string VcpuGate::Busy::describe(pid_t pid) const {
  return fmt::format("vCPU {} of process {} {}", number, pid,
                     is_in_run ? "does not leave KVM_RUN" : "has unfinished I/O that the VMM does not complete");
}

}  // namespace vmckpt
