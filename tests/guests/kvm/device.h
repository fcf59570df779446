// SPDX-License-Identifier: Apache-2.0
//
// The device: registers at ports and in memory (layout.h). It counts every access and knows what the next one of each
// vCPU has to be, so that a lost, doubled or torn one is noticed on one side or the other.

#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "machine.h"

namespace tiny {

class Device {
 public:
  Device(const Options& options, Machine& machine);

  // What a vCPU does at a port or at a guest-physical address. `data` holds `bytes` bytes, to be read or filled.
  void read_port(int vcpu, uint16_t port, uint8_t* data, size_t bytes);
  void write_port(int vcpu, uint16_t port, const uint8_t* data, size_t bytes);
  void read_memory(int vcpu, uint64_t address, uint8_t* data, size_t bytes);
  void write_memory(int vcpu, uint64_t address, const uint8_t* data, size_t bytes);
  // Takes the writes that KVM has collected so far.
  void drain(kvm_coalesced_mmio_ring* ring);

  // Printed as "FAIL vcpu N: TEXT"; the process will end with status 1.
  void fail(int vcpu, const std::string& text);
  void set_permit(uint32_t stages);
  void note_interrupted_run();
  // The guest has ended the interrupt of a pin of the VMM's own IOAPIC.
  void end_level_interrupt(int vcpu, int vector);
  // Raises one interrupt of every source whose last one has arrived.
  void raise_interrupts();
  bool has_ended();
  bool is_right();
  // One JSON object.
  std::string counts();

 private:
  struct PerVcpu {
    uint64_t counter = 0, sequence = 0, increment = 0;
    bool sequence_known = false;  // the first number that the guest writes is as good as any
    uint64_t coalesced = 0;
    uint64_t passes = 0, doorbells = 0;
    bool ended = false;
    std::string line;
  };

  void step_counter(PerVcpu& own, uint8_t* data, size_t bytes);
  void step_sequence(int vcpu, const uint8_t* data, size_t bytes);
  void step_coalesced(uint64_t address, const uint8_t* data, size_t bytes);
  uint64_t read_register(int vcpu, uint16_t reg);
  void write_register(int vcpu, uint16_t reg, uint64_t value);
  void take_text(int vcpu, const std::string& text);
  void raise_if_due(int source);
  void fail_locked(int vcpu, const std::string& text);

  Machine& machine_;
  const int vcpus_;
  const uint64_t lose_answer_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::mutex mutex_;
  std::vector<PerVcpu> own_;
  std::array<uint32_t, 4> nonce_{};
  size_t nonce_words_told_ = 0;
  uint32_t permit_ = 0;
  uint64_t answers_ = 0, reads_ = 0, writes_ = 0, interrupted_runs_ = 0;
  uint64_t doorbells_ = 0, resampled_ = 0;
  std::array<uint64_t, SOURCES> raised_{}, acknowledged_{};
  std::array<uint64_t, TICKS> ticks_{};
  bool ready_for_interrupts_ = false;
  bool all_ended_ = false;
  bool right_ = true;
};

}  // namespace tiny
