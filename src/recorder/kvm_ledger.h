// What the recorder writes down about KVM, and the gate that keeps vCPUs out of the guest while a checkpoint is taken.
// Plain data of fixed layout in libvmckpt.so's zero-initialised memory, like the ledger (ledger.h), which points to it.
//
// The gate. KVM keeps half-finished port and memory-mapped I/O that no ioctl shows; it is complete only once KVM_RUN has been
// entered again (Documentation/virt/kvm/api.rst, KVM_RUN). So the supervisor closes the gate while the target still runs: the
// recorder's wrapper of ioctl(2) then lets a vCPU enter KVM_RUN only to finish such I/O (with immediate_exit), and waits until
// the gate is opened. The VMM sees nothing of it: its call comes back when the guest has something to say, as ever.
//
// Every value of the gate that is odd is a closed one. While the supervisor waits it makes a new one now and then; a vCPU that
// has seen the same for too long opens the gate itself, since then the supervisor is dead. The gate is closed for the way to a
// stop of all threads only: it is open again before anything is saved.
//
// The recorder makes no system call at the gate but the KVM_RUN that the VMM has asked for: the VMM may have locked itself in.
//
// A stop by ptrace makes KVM_RUN answer EINTR, which no signal handler is the reason of. The supervisor gives such a thread the
// registers of a call that begins anew unless a handler runs (ERESTARTNOHAND), but one instruction further on: where the kernel
// steps back by the length of a system call instruction, the thread comes out at `run_returns` with the call's number for an
// answer, and looks at the gate again; with a handler it gets its EINTR. A thread that waits at the gate is treated likewise.
#pragma once

#include <stdint.h>

namespace vmckpt {

constexpr uint32_t kKvmObjects = 2048;
constexpr uint32_t kKvmRecords = 16384;
constexpr uint32_t kKvmHeapBytes = 16u << 20;  // payloads; pages that were never used cost nothing
constexpr uint32_t kKvmKnownFds = 8192;

enum class KvmKind : uint32_t { kNone = 0, kVm = 1, kVcpu = 2, kOther = 3 };

enum class VcpuState : uint32_t {
  kQuiet = 0,    // never run, or KVM_RUN came back with an error (EINTR: nothing is half-finished)
  kRunning = 1,  // inside KVM_RUN
  kExited = 2,   // KVM_RUN came back with an exit that the VMM handles; I/O may be half-finished
};

struct KvmObject {
  KvmKind kind;
  uint32_t parent;   // the VM's index, of vCPUs and of what else was made from a VM
  int32_t fd;        // as it was made
  uint32_t request;  // that made it
  uint64_t number;   // VM type, vCPU id
  uint64_t run;      // where struct kvm_run is mapped, as the supervisor has found it before it closed the gate; 0: nowhere
  uint64_t mapped;   // where the VMM mapped the descriptor last, as far as the recorder knows: what was there may be gone
  VcpuState state;
  uint32_t order;            // among the records
  uint32_t has_signal_mask;  // KVM_SET_SIGNAL_MASK: nothing but KVM_RUN itself can tell that a signal is pending
  uint32_t waited_gate;      // at this value of the gate ...
  uint64_t waits_since;      // ... from this value of the TSC on
};

struct KvmRecord {
  uint32_t valid;
  uint32_t object;
  uint32_t request;
  uint32_t order;
  uint64_t argument;     // of calls that take a value, not a pointer
  uint32_t payload;      // offset in the heap
  uint32_t payload_bytes;
  uint32_t payload_room;
  uint32_t reserved;
  int32_t event_fds[2];     // descriptors in the payload, as they were then; -1: none
  uint32_t event_names[2];  // ... and which eventfds they were (KvmLedger::event_names)
};

struct KvmLedger {
  uint32_t gate;           // odd: closed
  uint32_t objects_used;   // index 0 is nobody
  uint32_t records_used;
  uint32_t heap_used;
  uint32_t next_order;
  uint32_t lock;
  uint32_t overflows;        // what found no room: a checkpoint must refuse
  uint32_t unknown_request;  // a call that the table does not know or cannot replay; 0: none
  uint32_t unknown_object;
  uint32_t tolerated;        // launch --allow-devices: unknown calls are not written down
  uint32_t foreign_runs;     // KVM_RUN on descriptors that belong to no known object: these vCPUs pass the gate by
  uint32_t next_event_name;
  uint64_t run_returns;      // behind the instruction that enters KVM_RUN, which two bytes of nothing follow
  uint64_t wait_begin;       // the code in which a thread waits at the gate
  uint64_t wait_end;
  uint32_t event_names[kKvmKnownFds];  // by number: each eventfd that is made gets a name, duplicates get the same; 0: none
  uint16_t by_fd[kKvmKnownFds];
  KvmObject objects[kKvmObjects];
  KvmRecord records[kKvmRecords];
  uint8_t heap[kKvmHeapBytes];
};

}  // namespace vmckpt
