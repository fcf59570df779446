// Brings the vCPUs of a running target to rest, outside the guest and with no I/O half-finished (recorder/kvm_ledger.h), and
// reads what the recorder wrote down about KVM.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "core/result.h"
#include "recorder/kvm_ledger.h"
#include "tracer/interrupted_calls.h"
#include "tracer/stopped_world.h"

namespace vmckpt {

// A copy of the used part of a target's KvmLedger.
struct KvmNotes {
  uint32_t gate = 0, overflows = 0, unknown_request = 0, unknown_object = 0;
  std::vector<uint16_t> fd_objects;  // by descriptor number: index of the object, 0: none
  std::vector<KvmObject> objects;    // from index 1 on; [0] is nobody
  std::vector<KvmRecord> records;
  std::vector<uint8_t> heap;
};

// How many KVM objects the target has made; 0: it does not use KVM.
Result<uint32_t> count_kvm_objects(pid_t pid, uint64_t kvm_ledger);
Result<std::unique_ptr<KvmNotes>> read_kvm_notes(pid_t pid, uint64_t kvm_ledger);

class VcpuGate {
 public:
  // Closes the gate and waits until every vCPU is at rest. On failure the gate is open again.
  static Result<VcpuGate> close(pid_t pid, uint64_t kvm_ledger, int64_t timeout_us, InterruptedCalls& interrupted);

  VcpuGate(VcpuGate&& other) noexcept;
  VcpuGate& operator=(VcpuGate&&) = delete;
  ~VcpuGate() { open(); }
  void open();

  // Once every thread is stopped: whether all vCPUs are still at rest. One that was entering KVM_RUN when the gate closed may
  // not have been seen.
  Result<bool> all_at_rest() const;
  uint32_t open_value() const { return closed_value_ + 1; }

 private:
  VcpuGate(pid_t pid, uint64_t kvm_ledger, uint32_t closed_value)
      : pid_(pid), ledger_(kvm_ledger), closed_value_(closed_value) {}
  Result<std::vector<KvmObject>> read_objects() const;
  Result<void> wait_until_at_rest(int64_t timeout_us, InterruptedCalls& interrupted);
  Result<bool> is_at_rest(const KvmObject& object) const;

  pid_t pid_;
  uint64_t ledger_;
  uint32_t closed_value_;
};

}  // namespace vmckpt
