// The KVM part of libvmckpt.so: writes down the ioctls that a restart must replay (kvm_calls.h) and keeps the gate at KVM_RUN
// (kvm_ledger.h). The same rules as in recorder.cc.
#include <cstdarg>

#include <fcntl.h>
#include <linux/kcmp.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "recorder/kvm_calls.h"
#include "recorder/kvm_ledger.h"
#include "recorder/recorder.h"

namespace vmckpt {

alignas(4096) static KvmLedger g_kvm;

static_assert(KVM_RUN == 0xae80 && SYS_ioctl == 16);

// vmckpt_kvm_run(fd, vcpu): the one place at which KVM_RUN is entered. vmckpt_kvm_wait(fd, vcpu, gate, closed value, kick, last
// TSC): returns when the gate has another value, *kick is not 0 or the TSC has come so far. No stack, and the vCPU in r8: the
// supervisor moves a thread from one to the other's end (kvm_ledger.h).
asm(R"(
    .pushsection .text
    .p2align 4
    .hidden vmckpt_kvm_run, vmckpt_kvm_run_returns, vmckpt_kvm_wait, vmckpt_kvm_wait_begin, vmckpt_kvm_wait_end
    .globl vmckpt_kvm_run, vmckpt_kvm_run_returns, vmckpt_kvm_wait, vmckpt_kvm_wait_begin, vmckpt_kvm_wait_end
    .type vmckpt_kvm_run, @function
vmckpt_kvm_run:
    movq %rsi, %r8
    movl $0xae80, %esi
    xorl %edx, %edx
    movl $16, %eax
    syscall
vmckpt_kvm_run_returns:
    xchgw %ax, %ax
    ret
    .size vmckpt_kvm_run, . - vmckpt_kvm_run
    .p2align 4
    .type vmckpt_kvm_wait, @function
vmckpt_kvm_wait:
    movq %rdx, %r10
    xchgq %rsi, %r8
vmckpt_kvm_wait_begin:
    pause
    cmpl %ecx, (%r10)
    jne 1f
    cmpb $0, (%rsi)
    jne 1f
    rdtsc
    shlq $32, %rdx
    orq %rdx, %rax
    cmpq %r9, %rax
    jb vmckpt_kvm_wait_begin
1:  movl $16, %eax
    ret
vmckpt_kvm_wait_end:
    .size vmckpt_kvm_wait, . - vmckpt_kvm_wait
    .popsection
)");

extern "C" {
__attribute__((visibility("hidden"))) long vmckpt_kvm_run(int fd, KvmObject* vcpu);
__attribute__((visibility("hidden"))) long vmckpt_kvm_wait(int fd, KvmObject* vcpu, const uint32_t* gate, uint32_t closed_value,
                                                          const uint8_t* kick, uint64_t last_tsc);
__attribute__((visibility("hidden"))) extern const char vmckpt_kvm_run_returns[], vmckpt_kvm_wait_begin[], vmckpt_kvm_wait_end[];
}

uint64_t kvm_ledger_address() {
  g_kvm.tolerated = devices_are_allowed();
  g_kvm.run_returns = reinterpret_cast<uint64_t>(vmckpt_kvm_run_returns);
  g_kvm.wait_begin = reinterpret_cast<uint64_t>(vmckpt_kvm_wait_begin);
  g_kvm.wait_end = reinterpret_cast<uint64_t>(vmckpt_kvm_wait_end);
  return reinterpret_cast<uint64_t>(&g_kvm);
}

void forget_kvm_lock() { __atomic_store_n(&g_kvm.lock, 0, __ATOMIC_RELEASE); }

void name_eventfd(int fd) {
  if (fd < 0 || static_cast<uint32_t>(fd) >= kKvmKnownFds) return;
  __atomic_store_n(&g_kvm.event_names[fd], __atomic_add_fetch(&g_kvm.next_event_name, 1, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
}

// dup(2) and its kin. The number may have been another object's before.
int note_duplicate(int fd, int duplicate) {
  if (duplicate < 0 || duplicate == fd || static_cast<uint32_t>(duplicate) >= kKvmKnownFds) return duplicate;
  const bool known = fd >= 0 && static_cast<uint32_t>(fd) < kKvmKnownFds;
  g_kvm.by_fd[duplicate] = known ? g_kvm.by_fd[fd] : uint16_t{0};
  g_kvm.event_names[duplicate] = known ? g_kvm.event_names[fd] : 0;
  return duplicate;
}

namespace {

constexpr uint64_t kLeaseTicks = uint64_t{1} << 33;      // of a value of the gate: two to four seconds
constexpr uint64_t kPatienceTicks = uint64_t{1} << 22;   // of a vCPU that can be kicked in KVM_RUN only: a millisecond or two
constexpr uint8_t kOurImmediateExit = 2;  // any value but 0 counts (kvm_run.immediate_exit); VMMs write 1
constexpr long kLookAgain = SYS_ioctl;    // what the supervisor gives for an answer; KVM_RUN gives 0 or an error

// Configuration is rare and its notes are short. A thread that cannot get the lock says that a note was lost.
class KvmLock {
 public:
  KvmLock() {
    for (int tries = 0; tries < 10'000'000; ++tries) {
      uint32_t open = 0;
      held_ = __atomic_compare_exchange_n(&g_kvm.lock, &open, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
      if (held_) return;
      __builtin_ia32_pause();
    }
    __atomic_add_fetch(&g_kvm.overflows, 1, __ATOMIC_RELAXED);
  }
  ~KvmLock() {
    if (held_) __atomic_store_n(&g_kvm.lock, 0, __ATOMIC_RELEASE);
  }
  bool held() const { return held_; }

 private:
  bool held_ = false;
};

long ioctl_raw(int fd, uint32_t request, uint64_t argument) {
  return raw_call(SYS_ioctl, fd, static_cast<long>(request), static_cast<long>(argument));
}

void remember_fd(int fd, uint32_t object) {
  if (fd >= 0 && static_cast<uint32_t>(fd) < kKvmKnownFds) g_kvm.by_fd[fd] = static_cast<uint16_t>(object);
}

// A descriptor that came in a way that is not wrapped (from another process): the object is found by comparing open files, as
// long as the program has not locked itself in.
uint32_t find_duplicate(int fd) {
  if (g_kvm.objects_used == 0 || is_locked_in()) return 0;
  const long self = raw_call(SYS_getpid);
  for (uint32_t known = 0; known < kKvmKnownFds; ++known) {
    if (g_kvm.by_fd[known] == 0 || raw_call(SYS_kcmp, self, self, KCMP_FILE, known, fd) != 0) continue;
    remember_fd(fd, g_kvm.by_fd[known]);
    return g_kvm.by_fd[known];
  }
  return 0;
}

uint32_t object_of(int fd) {
  if (fd < 0) return 0;
  const uint32_t known = static_cast<uint32_t>(fd) < kKvmKnownFds ? g_kvm.by_fd[fd] : 0;
  return __builtin_expect(known != 0, 1) ? known : find_duplicate(fd);
}

// ---- the gate ------------------------------------------------------------------------------------------------------

void set_state(KvmObject& vcpu, VcpuState state) { __atomic_store(&vcpu.state, &state, __ATOMIC_RELEASE); }

VcpuState state_after(long result) { return result < 0 ? VcpuState::kQuiet : VcpuState::kExited; }

kvm_run* run_of(const KvmObject& vcpu) { return reinterpret_cast<kvm_run*>(vcpu.run); }

long enter(int fd, KvmObject& vcpu) {
  set_state(vcpu, VcpuState::kRunning);
  const long result = vmckpt_kvm_run(fd, &vcpu);
  // A thread that was stopped came out of KVM_RUN with EINTR: whatever was half-finished has been finished on the way in.
  set_state(vcpu, result == kLookAgain ? VcpuState::kQuiet : state_after(result));
  return result;
}

// KVM completes the I/O and does not enter the guest.
long finish_io(int fd, KvmObject& vcpu) {
  // Whoever kicks this vCPU meanwhile writes 1, and that stays.
  uint8_t* immediate_exit = &run_of(vcpu)->immediate_exit;
  uint8_t expected = 0;
  __atomic_compare_exchange_n(immediate_exit, &expected, kOurImmediateExit, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
  const long result = enter(fd, vcpu);
  expected = kOurImmediateExit;
  const bool was_ours =
      __atomic_compare_exchange_n(immediate_exit, &expected, 0, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
  return result == -EINTR && was_ours ? kLookAgain : result;  // 0: the I/O has another part, which the VMM handles first
}

// As the kernel does when a signal ends KVM_RUN: some VMMs look at nothing else.
long interrupted(KvmObject& vcpu) {
  if (vcpu.run != 0) run_of(vcpu)->exit_reason = KVM_EXIT_INTR;
  return -EINTR;
}

long wait_at_gate(int fd, KvmObject& vcpu, uint32_t gate) {
  static constexpr uint8_t kNobody = 0;
  const uint64_t now = __builtin_ia32_rdtsc();
  if (vcpu.waited_gate != gate) {
    vcpu.waited_gate = gate;
    vcpu.waits_since = now;
  }
  const uint64_t lease_ends = vcpu.waits_since + kLeaseTicks;
  const uint64_t until = vcpu.has_signal_mask != 0 ? now + kPatienceTicks : lease_ends;
  const uint8_t* kick = vcpu.run != 0 ? &run_of(vcpu)->immediate_exit : &kNobody;
  const long result = vmckpt_kvm_wait(fd, &vcpu, &g_kvm.gate, gate, kick, until);
  if (result == 0) {  // the supervisor has let this thread enter KVM_RUN for a moment, and there is an exit
    set_state(vcpu, VcpuState::kExited);
    return 0;
  }
  if (result != kLookAgain) return interrupted(vcpu);
  const uint64_t then = __builtin_ia32_rdtsc();
  // Fails when the gate has got another value, also if this thread was stopped for long until here.
  if (then >= lease_ends) __atomic_compare_exchange_n(&g_kvm.gate, &gate, gate + 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
  const bool still_closed = __atomic_load_n(&g_kvm.gate, __ATOMIC_RELAXED) == gate;
  return still_closed && vcpu.has_signal_mask != 0 && then >= until ? interrupted(vcpu) : kLookAgain;
}

__attribute__((noinline)) long run_at_closed_gate(int fd, KvmObject& vcpu, uint32_t gate) {
  if (vcpu.run != 0) {
    // The VMM wants KVM_RUN to come back at once, and so it does.
    if (__atomic_load_n(&run_of(vcpu)->immediate_exit, __ATOMIC_ACQUIRE) != 0) return enter(fd, vcpu);
    if (vcpu.state == VcpuState::kExited) return finish_io(fd, vcpu);
  }
  return wait_at_gate(fd, vcpu, gate);
}

long run_vcpu(int fd) {
  for (;;) {
    const uint32_t object = object_of(fd);
    KvmObject& vcpu = g_kvm.objects[object];
    if (__builtin_expect(vcpu.kind != KvmKind::kVcpu, 0)) {
      if (object == 0) __atomic_store_n(&g_kvm.foreign_runs, 1, __ATOMIC_RELAXED);
      return ioctl_raw(fd, KVM_RUN, 0);
    }
    const uint32_t gate = __atomic_load_n(&g_kvm.gate, __ATOMIC_RELAXED);
    // One that has seen the gate open and comes into the guest after it was closed is stopped with all others.
    const long result = __builtin_expect(gate & 1, 0) ? run_at_closed_gate(fd, vcpu, gate) : enter(fd, vcpu);
    if (__builtin_expect(result != kLookAgain, 1)) return result;
  }
}

// ---- notes ---------------------------------------------------------------------------------------------------------

// Which eventfd it is, whatever becomes of the number. One that was made by a call that is not wrapped gets its name now.
uint32_t event_name(int fd) {
  if (static_cast<uint32_t>(fd) >= kKvmKnownFds) return 0;
  if (g_kvm.event_names[fd] == 0) name_eventfd(fd);
  return g_kvm.event_names[fd];
}

uint32_t payload_bytes_of(const KvmCall& call, const void* payload) {
  const uint32_t* words = static_cast<const uint32_t*>(payload);
  switch (call.payload) {
    case KvmPayload::kValue: return 0;
    case KvmPayload::kFixed: return _IOC_SIZE(call.request);
    case KvmPayload::kCpuid: return static_cast<uint32_t>(sizeof(kvm_cpuid2) + words[0] * sizeof(kvm_cpuid_entry2));
    case KvmPayload::kRouting: return static_cast<uint32_t>(sizeof(kvm_irq_routing) + words[0] * sizeof(kvm_irq_routing_entry));
    case KvmPayload::kSigmask: return static_cast<uint32_t>(sizeof(kvm_signal_mask) + words[0]);
    case KvmPayload::kPmu: return static_cast<uint32_t>(sizeof(kvm_pmu_event_filter) + words[1] * sizeof(uint64_t));
    case KvmPayload::kMsrFilter: {
      uint32_t bytes = sizeof(kvm_msr_filter);
      for (const kvm_msr_filter_range& range : static_cast<const kvm_msr_filter*>(payload)->ranges)
        bytes += msr_bitmap_bytes(range);
      return bytes;
    }
  }
  return 0;
}

void copy_payload(const KvmCall& call, const void* from, uint32_t bytes, uint8_t* to) {
  if (call.payload != KvmPayload::kMsrFilter) {
    __builtin_memcpy(to, from, bytes);
    return;
  }
  const auto& filter = *static_cast<const kvm_msr_filter*>(from);
  __builtin_memcpy(to, &filter, sizeof filter);
  to += sizeof filter;
  for (const kvm_msr_filter_range& range : filter.ranges) {
    if (range.nmsrs == 0) continue;
    __builtin_memcpy(to, range.bitmap, msr_bitmap_bytes(range));
    to += msr_bitmap_bytes(range);
  }
}

// What a call says about itself, next to the record that an earlier one left.
struct Note {
  const KvmCall* call;
  uint32_t object;
  uint64_t argument;
  const void* payload;
  uint32_t payload_bytes;
  int32_t event_fds[2] = {-1, -1};
  uint32_t event_names[2] = {0, 0};

  template <class T>
  const T& as() const { return *static_cast<const T*>(payload); }
};

template <class T>
const T& payload_of(const KvmRecord& record) {
  return *reinterpret_cast<const T*>(g_kvm.heap + record.payload);
}

bool is_slot(uint32_t request) { return request == KVM_SET_USER_MEMORY_REGION || request == KVM_SET_USER_MEMORY_REGION2; }

bool same_event(const KvmRecord& record, const Note& note) {
  if (record.event_names[0] != 0 && note.event_names[0] != 0) return record.event_names[0] == note.event_names[0];
  return record.event_fds[0] == note.event_fds[0];
}

bool same_key(const KvmRecord& record, const Note& note) {
  switch (note.call->key) {
    case KvmKey::kObject: return true;
    case KvmKey::kArgument: return record.argument == note.argument;
    case KvmKey::kSlot: return payload_of<uint32_t>(record) == note.as<uint32_t>();
    case KvmKey::kCapability: return replaces(payload_of<kvm_enable_cap>(record), note.as<kvm_enable_cap>());
    case KvmKey::kIrqfd: return same_event(record, note) && payload_of<kvm_irqfd>(record).gsi == note.as<kvm_irqfd>().gsi;
    case KvmKey::kIoeventfd: {
      const auto &old = payload_of<kvm_ioeventfd>(record), &now = note.as<kvm_ioeventfd>();
      constexpr uint32_t kKind = KVM_IOEVENTFD_FLAG_DATAMATCH | KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY;
      return same_event(record, note) && old.addr == now.addr && old.len == now.len &&
             (old.flags & kKind) == (now.flags & kKind) &&
             (!(now.flags & KVM_IOEVENTFD_FLAG_DATAMATCH) || old.datamatch == now.datamatch);
    }
    case KvmKey::kZone: {
      const auto &old = payload_of<kvm_coalesced_mmio_zone>(record), &now = note.as<kvm_coalesced_mmio_zone>();
      return old.addr >= now.addr && old.addr + old.size <= now.addr + now.size && old.pio == now.pio;
    }
  }
  return false;
}

bool same_request(uint32_t recorded, uint32_t request) {
  if (request == KVM_UNREGISTER_COALESCED_MMIO) request = KVM_REGISTER_COALESCED_MMIO;
  return recorded == request || (is_slot(recorded) && is_slot(request));
}

bool takes_back(const Note& note) {
  switch (note.call->request) {
    case KVM_UNREGISTER_COALESCED_MMIO: return true;
    case KVM_IRQFD: return (note.as<kvm_irqfd>().flags & KVM_IRQFD_FLAG_DEASSIGN) != 0;
    case KVM_IOEVENTFD: return (note.as<kvm_ioeventfd>().flags & KVM_IOEVENTFD_FLAG_DEASSIGN) != 0;
    case KVM_SET_USER_MEMORY_REGION:
    case KVM_SET_USER_MEMORY_REGION2: return note.as<kvm_userspace_memory_region>().memory_size == 0;
    case KVM_SET_SIGNAL_MASK: return note.payload == nullptr;
    default: return false;
  }
}

// The record to write into: the one with the same key, a free one, or none when there is no room.
KvmRecord* record_for(const Note& note) {
  KvmRecord* free = nullptr;
  for (uint32_t i = 0; i < g_kvm.records_used; ++i) {
    KvmRecord& record = g_kvm.records[i];
    if (record.valid == 0) {
      if (free == nullptr && record.payload_room >= note.payload_bytes) free = &record;
    } else if (record.object == note.object && same_request(record.request, note.call->request) && same_key(record, note)) {
      return &record;
    }
  }
  if (free != nullptr) return free;
  return g_kvm.records_used < kKvmRecords ? &g_kvm.records[g_kvm.records_used++] : nullptr;
}

bool give_room(KvmRecord& record, uint32_t bytes) {
  if (record.payload_room >= bytes) return true;
  uint32_t room = 64;
  while (room < bytes) room *= 2;
  if (room > kKvmHeapBytes - g_kvm.heap_used) return false;
  record.payload = g_kvm.heap_used;
  record.payload_room = room;
  g_kvm.heap_used += room;
  return true;
}

void erase(const Note& note) {
  for (uint32_t i = 0; i < g_kvm.records_used; ++i) {
    KvmRecord& record = g_kvm.records[i];
    if (record.valid != 0 && record.object == note.object && same_request(record.request, note.call->request) &&
        (note.payload == nullptr || same_key(record, note))) {
      record.valid = 0;
    }
  }
}

void write_down(const Note& note) {
  KvmRecord* record = record_for(note);
  if (record == nullptr || !give_room(*record, note.payload_bytes)) {
    ++g_kvm.overflows;
    return;
  }
  record->object = note.object;
  record->request = note.call->request;
  record->order = ++g_kvm.next_order;
  record->argument = note.argument;
  record->payload_bytes = note.payload_bytes;
  for (int i = 0; i < 2; ++i) {
    record->event_fds[i] = note.event_fds[i];
    record->event_names[i] = note.event_names[i];
  }
  if (note.payload_bytes != 0) copy_payload(*note.call, note.payload, note.payload_bytes, g_kvm.heap + record->payload);
  record->valid = 1;
}

void refuse_later(uint32_t request, uint32_t object) {
  if (g_kvm.tolerated != 0 || g_kvm.unknown_request != 0) return;
  g_kvm.unknown_request = request;
  g_kvm.unknown_object = object;
}

void note_events(Note& note) {
  if (note.call->key == KvmKey::kIrqfd) {
    const auto& irqfd = note.as<kvm_irqfd>();
    note.event_fds[0] = static_cast<int32_t>(irqfd.fd);
    if (irqfd.flags & KVM_IRQFD_FLAG_RESAMPLE) note.event_fds[1] = static_cast<int32_t>(irqfd.resamplefd);
  } else if (note.call->key == KvmKey::kIoeventfd) {
    note.event_fds[0] = note.as<kvm_ioeventfd>().fd;
  }
  for (int i = 0; i < 2; ++i) {
    if (note.event_fds[i] >= 0) note.event_names[i] = event_name(note.event_fds[i]);
  }
}

bool is_refused_capability(const Note& note) {
  if (note.call->key != KvmKey::kCapability) return false;
  for (const auto& refused : kRefusedCapabilities) {
    if (note.as<kvm_enable_cap>().cap == refused.number) return true;
  }
  return false;
}

void note_object(int fd, const KvmCall& call, uint64_t argument, int made) {
  if (g_kvm.objects_used + 1 >= kKvmObjects) {
    ++g_kvm.overflows;
    return;
  }
  // The kernel gave the number anew: whoever had it is closed.
  for (uint32_t i = 1; i <= g_kvm.objects_used; ++i) {
    if (g_kvm.objects[i].fd == made) g_kvm.objects[i].fd = -1;
  }
  const uint32_t index = g_kvm.objects_used + 1;
  KvmObject& object = g_kvm.objects[index];
  object.kind = call.request == KVM_CREATE_VM ? KvmKind::kVm : call.request == KVM_CREATE_VCPU ? KvmKind::kVcpu : KvmKind::kOther;
  object.parent = object.kind == KvmKind::kVm ? 0 : object_of(fd);
  object.fd = made;
  object.request = call.request;
  object.number = argument;
  object.run = 0;
  object.mapped = 0;
  object.state = VcpuState::kQuiet;
  object.has_signal_mask = 0;
  object.order = ++g_kvm.next_order;
  __atomic_store_n(&g_kvm.objects_used, index, __ATOMIC_RELEASE);
  remember_fd(made, index);
}

void note_call(int fd, uint32_t request, const KvmCall* call, uint64_t argument, long result) {
  KvmLock lock;
  if (!lock.held()) return;
  if (call != nullptr && call->action == KvmAction::kCreate) return note_object(fd, *call, argument, static_cast<int>(result));
  const uint32_t object = object_of(fd);
  if (call == nullptr || call->action == KvmAction::kRefuse || object == 0) return refuse_later(request, object);
  if (request == KVM_SET_SIGNAL_MASK) g_kvm.objects[object].has_signal_mask = argument != 0;
  Note note{call, object, argument, nullptr, 0};
  if (call->payload != KvmPayload::kValue && argument != 0) {
    note.payload = reinterpret_cast<const void*>(argument);
    note.payload_bytes = payload_bytes_of(*call, note.payload);
    note_events(note);
  }
  if (is_slot(request) && (note.as<kvm_userspace_memory_region>().flags & KVM_MEM_GUEST_MEMFD))
    return refuse_later(request, object);
  if (is_refused_capability(note)) return refuse_later(request, object);
  if (takes_back(note)) return erase(note);
  write_down(note);
}

bool only_asks(uint32_t request, uint64_t argument) {
  return request == KVM_CREATE_DEVICE && (reinterpret_cast<const kvm_create_device*>(argument)->flags & KVM_CREATE_DEVICE_TEST);
}

__attribute__((noinline)) long configure(int fd, uint32_t request, uint64_t argument) {
  const KvmCall* call = find_kvm_call(request);
  if (call != nullptr && call->action == KvmAction::kIgnore) return ioctl_raw(fd, request, argument);
  // From before the call: a checkpoint must not come between it and its note.
  LedgerUpdate update;
  const long result = ioctl_raw(fd, request, argument);
  if (result >= 0 && !only_asks(request, argument)) note_call(fd, request, call, argument, result);
  return result;
}

// A hint and no more: the number may be another file's by now.
void note_mapping(int fd, int flags, off64_t offset, long address) {
  if (address < 0 || fd < 0 || offset != 0 || !(flags & MAP_SHARED) || static_cast<uint32_t>(fd) >= kKvmKnownFds) return;
  const uint32_t object = g_kvm.by_fd[fd];
  if (object != 0 && g_kvm.objects[object].kind == KvmKind::kVcpu) g_kvm.objects[object].mapped = static_cast<uint64_t>(address);
}

}  // namespace
}  // namespace vmckpt

using namespace vmckpt;


EXPORT int ioctl(int fd, unsigned long request, ...) noexcept {
  va_list list;
  va_start(list, request);
  const uint64_t argument = va_arg(list, uint64_t);
  va_end(list);
  if (request == KVM_RUN) return static_cast<int>(libc_result(run_vcpu(fd)));
  const auto number = static_cast<uint32_t>(request);
  if (_IOC_TYPE(number) != KVMIO) return static_cast<int>(libc_result(ioctl_raw(fd, number, argument)));
  return static_cast<int>(libc_result(configure(fd, number, argument)));
}

EXPORT void* mmap(void* address, size_t bytes, int protection, int flags, int fd, off_t offset) noexcept {
  if (!ram_has_room_for_mapping(reinterpret_cast<uint64_t>(address), bytes, flags)) {
    return reinterpret_cast<void*>(libc_result(-ENOMEM));
  }
  const long result = raw_call(SYS_mmap, reinterpret_cast<long>(address), static_cast<long>(bytes), protection, flags, fd,
                               offset);
  if (flags & MAP_FIXED) __atomic_add_fetch(&g_ledger.madvise_generation, 1, __ATOMIC_RELEASE);  // another one in an old place
  note_mapping(fd, flags, offset, result);
  note_ram_mapping(result, bytes, flags);
  return reinterpret_cast<void*>(libc_result(result));
}

EXPORT void* mmap64(void* address, size_t bytes, int protection, int flags, int fd, off64_t offset) noexcept {
  return mmap(address, bytes, protection, flags, fd, offset);
}

EXPORT int dup(int fd) noexcept { return note_duplicate(fd, static_cast<int>(libc_result(raw_call(SYS_dup, fd)))); }

EXPORT int dup2(int fd, int number) noexcept {
  return note_duplicate(fd, static_cast<int>(libc_result(raw_call(SYS_dup2, fd, number))));
}

EXPORT int dup3(int fd, int number, int flags) noexcept {
  return note_duplicate(fd, static_cast<int>(libc_result(raw_call(SYS_dup3, fd, number, flags))));
}

// libc's own does the rest: a lock that is waited for is a cancellation point there.
#define WRAP_FCNTL(name)                                                                  \
  EXPORT int name(int fd, int command, ...) {                                             \
    va_list list;                                                                         \
    va_start(list, command);                                                              \
    void* argument = va_arg(list, void*);                                                 \
    va_end(list);                                                                         \
    REAL(name);                                                                           \
    const int result = real(fd, command, argument);                                       \
    if (command == F_NOTIFY && result == 0) note_directory_watch(fd, reinterpret_cast<long>(argument)); \
    return command == F_DUPFD || command == F_DUPFD_CLOEXEC ? note_duplicate(fd, result) : result; \
  }
WRAP_FCNTL(fcntl)
WRAP_FCNTL(fcntl64)
