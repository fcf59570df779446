#include "tracer/vcpu_gate.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <map>

#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/kvm_api.h"
#include "core/proc.h"

namespace vmckpt {
namespace {

constexpr int64_t kKickAgainUs = 2'000;
constexpr int64_t kLookAgainUs = 30;

struct Head {
  uint32_t gate, objects_used, records_used, heap_used, next_order, lock, overflows, unknown_request, unknown_object, tolerated;
};
static_assert(sizeof(Head) == offsetof(KvmLedger, by_fd));

Result<Head> read_head(pid_t pid, uint64_t ledger) {
  Head head{};
  VMCKPT_TRY(read_memory(pid, ledger, &head, sizeof head));
  if (head.objects_used >= kKvmObjects || head.records_used > kKvmRecords || head.heap_used > kKvmHeapBytes) {
    return error(fmt::format("the KVM notes of process {} are damaged", pid));
  }
  return head;
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

// A stop and nothing more: KVM_RUN comes back with EINTR, and the thread goes on to the gate.
void kick(pid_t tid, int64_t deadline_us, InterruptedCalls& interrupted) {
  if (::ptrace(PTRACE_SEIZE, tid, 0, 0) != 0) return;  // ended, or a debugger has it, which the freeze will tell
  bool is_interrupted = false;
  for (int round = 0; monotonic_us() < deadline_us; ++round) {
    // A thread that runs takes it; one that is seized and never interrupted would stay so.
    if (!is_interrupted) is_interrupted = ::ptrace(PTRACE_INTERRUPT, tid, 0, 0) == 0;
    int status = 0;
    pid_t got = ::waitpid(tid, &status, __WALL | WNOHANG);
    if (got == tid && WIFSTOPPED(status)) {
      release_late(tid, status, interrupted);  // it may have got as far as another call by then
      return;
    }
    if (got == tid || (got < 0 && errno != EINTR)) return;
    wait_for_child_signal(round);
  }
}

// Threads by the numbers they have in the target's own PID namespace.
std::map<int32_t, pid_t> threads_by_own_number(pid_t pid) {
  std::map<int32_t, pid_t> threads;
  auto tids = list_threads(pid);
  if (!tids.ok()) return threads;
  for (pid_t tid : *tids) {
    auto status = read_status(pid, tid);
    if (status.ok()) threads[static_cast<int32_t>(status_innermost(*status, "NSpid"))] = tid;
  }
  return threads;
}

}  // namespace

Result<uint32_t> count_kvm_objects(pid_t pid, uint64_t kvm_ledger) {
  if (kvm_ledger == 0) return uint32_t{0};
  return VMCKPT_TRY(read_head(pid, kvm_ledger)).objects_used;
}

Result<std::unique_ptr<KvmNotes>> read_kvm_notes(pid_t pid, uint64_t kvm_ledger) {
  const Head head = VMCKPT_TRY(read_head(pid, kvm_ledger));
  auto notes = std::make_unique<KvmNotes>();
  notes->gate = head.gate;
  notes->overflows = head.overflows;
  notes->unknown_request = head.unknown_request;
  notes->unknown_object = head.unknown_object;
  notes->fd_objects.resize(kKvmKnownFds);
  notes->objects.resize(head.objects_used + 1);
  notes->records.resize(head.records_used);
  notes->heap.resize(head.heap_used);
  auto read = [&](size_t offset, auto& vector) {
    return read_memory(pid, kvm_ledger + offset, vector.data(), vector.size() * sizeof(vector[0]));
  };
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

Result<VcpuGate> VcpuGate::close(pid_t pid, uint64_t kvm_ledger, int64_t timeout_us, InterruptedCalls& interrupted) {
  const Head head = VMCKPT_TRY(read_head(pid, kvm_ledger));
  VcpuGate gate(pid, kvm_ledger, head.gate | 1);
  VMCKPT_TRY(write_memory(pid, kvm_ledger + offsetof(KvmLedger, gate), &gate.closed_value_, sizeof gate.closed_value_));
  VMCKPT_TRY(gate.wait_until_at_rest(timeout_us, interrupted));
  return gate;
}

VcpuGate::VcpuGate(VcpuGate&& other) noexcept
    : pid_(other.pid_), ledger_(std::exchange(other.ledger_, 0)), closed_value_(other.closed_value_) {}

void VcpuGate::open() {
  if (ledger_ == 0) return;
  const uint32_t value = open_value();
  (void)write_memory(pid_, ledger_ + offsetof(KvmLedger, gate), &value, sizeof value);  // fails only when the target has ended
  ledger_ = 0;
}

Result<std::vector<KvmObject>> VcpuGate::read_objects() const {
  const Head head = VMCKPT_TRY(read_head(pid_, ledger_));
  std::vector<KvmObject> objects(head.objects_used + 1);
  VMCKPT_TRY(read_memory(pid_, ledger_ + offsetof(KvmLedger, objects), objects.data(), objects.size() * sizeof(KvmObject)));
  return objects;
}

Result<bool> VcpuGate::is_at_rest(const KvmObject& object) const {
  if (object.kind != KvmKind::kVcpu || object.state == VcpuState::kQuiet) return true;
  if (object.state == VcpuState::kRunning || object.run == 0) return false;
  uint32_t exit_reason = 0;
  VMCKPT_TRY(read_memory(pid_, object.run + offsetof(kvm_run, exit_reason), &exit_reason, sizeof exit_reason));
  return leaves_nothing_to_finish(exit_reason);
}

Result<bool> VcpuGate::all_at_rest() const {
  for (const KvmObject& object : VMCKPT_TRY(read_objects())) {
    if (!VMCKPT_TRY(is_at_rest(object))) return false;
  }
  return true;
}

Result<void> VcpuGate::wait_until_at_rest(int64_t timeout_us, InterruptedCalls& interrupted) {
  const int64_t deadline_us = monotonic_us() + timeout_us;
  std::map<int32_t, pid_t> threads;
  for (int64_t next_kick_us = 0;;) {
    const KvmObject* busy = nullptr;
    const std::vector<KvmObject> objects = VMCKPT_TRY(read_objects());
    const bool kicks = monotonic_us() >= next_kick_us;
    if (kicks) next_kick_us = monotonic_us() + kKickAgainUs;
    for (const KvmObject& object : objects) {
      if (VMCKPT_TRY(is_at_rest(object))) continue;
      busy = &object;
      if (!kicks || object.state != VcpuState::kRunning) continue;
      if (threads.empty()) threads = threads_by_own_number(pid_);
      if (auto thread = threads.find(object.tid); thread != threads.end()) kick(thread->second, deadline_us, interrupted);
    }
    if (busy == nullptr) return {};
    if (monotonic_us() > deadline_us) {
      const char* what = busy->state == VcpuState::kRunning ? "does not leave KVM_RUN" : "has unfinished I/O that the VMM does not complete";
      return error(fmt::format("vCPU {} of process {} {}", busy->number, pid_, what), "try again, or with a longer --freeze-timeout");
    }
    ::usleep(kLookAgainUs);
  }
}

}  // namespace vmckpt
