// What the recorder writes down about KVM, and the gate that keeps vCPUs out of the guest while a checkpoint is taken.
// Plain data of fixed layout in libvmckpt.so's zero-initialised memory, like the ledger (ledger.h), which points to it.
//
// The gate. KVM keeps half-finished port and memory-mapped I/O that no ioctl shows; it is complete only once KVM_RUN has been
// entered again (Documentation/virt/kvm/api.rst, KVM_RUN). So the supervisor closes the gate while the target still runs: the
// recorder's wrapper of ioctl(2) then lets a vCPU enter KVM_RUN only to finish such I/O (with immediate_exit), and answers
// EINTR otherwise, as KVM_RUN may at any time. A vCPU that is quiet stays so until the gate is opened. Should the supervisor
// die, vCPUs that were kept waiting too long open the gate themselves.
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
  uint32_t parent;  // the VM's index, of vCPUs and of what else was made from a VM
  int32_t fd;       // as it was made
  uint32_t request; // that made it
  uint64_t number;  // VM type, vCPU id
  uint64_t run;     // where the VMM has mapped struct kvm_run; 0: nowhere
  VcpuState state;
  int32_t tid;           // of the last KVM_RUN, as the thread itself knows it
  uint32_t order;        // among the records
  uint32_t waits;        // at the closed gate
  uint32_t waited_gate;  // ... of this value
  uint32_t reserved;
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
  int32_t event_fds[2];  // descriptors in the payload: as they were then, and which eventfds they were (fdinfo's eventfd-id)
  int64_t event_ids[2];
};

struct KvmLedger {
  uint32_t gate;          // odd: closed
  uint32_t objects_used;  // index 0 is nobody
  uint32_t records_used;
  uint32_t heap_used;
  uint32_t next_order;
  uint32_t lock;
  uint32_t overflows;        // what found no room: a checkpoint must refuse
  uint32_t unknown_request;  // a call that the table does not know or cannot replay; 0: none
  uint32_t unknown_object;
  uint32_t tolerated;        // launch --allow-devices: unknown calls are not written down
  uint16_t by_fd[kKvmKnownFds];
  KvmObject objects[kKvmObjects];
  KvmRecord records[kKvmRecords];
  uint8_t heap[kKvmHeapBytes];
};

}  // namespace vmckpt
