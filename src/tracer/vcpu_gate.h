// Brings the vCPUs of a target to rest, outside the guest and with no I/O half-finished (recorder/kvm_ledger.h), and reads what
// the recorder wrote down about KVM.
//
//     close -> stop all threads -> (serve_requests) -> find_busy: none  -> open -> save
//                   ^                                     | one
//                   +-------------- wait_for <------------+ the target runs on, with the gate closed
//
// The stop itself takes vCPUs out of the guest. Busy is one whose VMM is about to answer an exit: it comes to the gate when it
// has done so.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/remote_addr.h"
#include "core/result.h"
#include "recorder/kvm_ledger.h"
#include "tracer/interrupted_calls.h"
#include "tracer/stopped_world.h"

namespace vmckpt {

// A copy of the used part of a target's KvmLedger.
struct KvmNotes {
  uint32_t overflows = 0, unknown_request = 0, unknown_object = 0, foreign_runs = 0;
  std::vector<uint32_t> event_names;  // by descriptor number
  std::vector<uint16_t> fd_objects;   // by descriptor number: index of the object, 0: none
  std::vector<KvmObject> objects;     // from index 1 on; [0] is nobody
  std::vector<KvmRecord> records;
  std::vector<uint8_t> heap;
};

// How many KVM objects the target has made; 0: it does not use KVM.
Result<uint32_t> count_kvm_objects(pid_t pid, RemoteAddr kvm_ledger);
Result<KvmRunCode> find_kvm_run_code(pid_t pid, RemoteAddr kvm_ledger);
Result<std::unique_ptr<KvmNotes>> read_kvm_notes(pid_t pid, RemoteAddr kvm_ledger);

// Where struct kvm_run of a vCPU is mapped, as /proc tells: "anon_inode:kvm-vcpu:ID", before Linux 4.19 without the number.
struct RunMapping {
  RemoteAddr start;
  std::string name;
};
std::vector<RunMapping> run_mappings(std::string_view maps);  // the text of /proc/PID/maps
// Sets `run` of every vCPU. What the recorder has seen is believed only where such a mapping is: a VMM unmaps and moves them,
// and descriptor numbers get another meaning, without the recorder's knowledge.
void find_runs(const std::vector<RunMapping>& mappings, std::vector<KvmObject>& objects);

class VcpuGate {
 public:
  static Result<VcpuGate> close(pid_t pid, RemoteAddr kvm_ledger);

  VcpuGate(VcpuGate&& other) noexcept;
  VcpuGate& operator=(VcpuGate&&) = delete;
  ~VcpuGate() { open(); }
  void open();

  struct Busy {
    uint32_t object;
    uint64_t number;       // of the vCPU
    bool is_in_run;        // on its way into or out of KVM_RUN, else in the VMM's hands
    std::string describe(pid_t pid) const;
  };
  // Every thread is stopped: lets KVM say what it has noted for the VMM and not told it yet, as far as vCPUs can be made to. With
  // a split irqchip that is the end of a level-triggered interrupt.
  Result<void> serve_requests(StoppedWorld& world, const Waiting& waiting, InterruptedCalls& interrupted);
  // Every thread is stopped: a vCPU that is not at rest.
  Result<std::optional<Busy>> find_busy(const StoppedWorld& world);
  // The target runs: waits until the vCPU may have come to rest, until the deadline at the latest; false then.
  Result<bool> wait_for(const Busy& busy, const Waiting& waiting);

 private:
  VcpuGate(pid_t pid, RemoteAddr kvm_ledger, uint32_t closed_value)
      : pid_(pid), ledger_(kvm_ledger), closed_value_(closed_value) {}
  // Tells waiting vCPUs that the supervisor lives. Also closes a gate again that was opened because it seemed dead.
  Result<void> keep_closed();
  Result<std::vector<KvmObject>> read_objects() const;
  Result<void> check_runs() const;
  Result<bool> has_unfinished_io(const KvmObject& object) const;

  pid_t pid_;
  RemoteAddr ledger_;
  uint32_t closed_value_;
};

}  // namespace vmckpt
