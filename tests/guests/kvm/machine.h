// SPDX-License-Identifier: Apache-2.0
//
// The VM: memory, interrupt controllers, routes and event descriptors. Everything that is not a vCPU or the device.

#pragma once

#include <cstdint>

#include "kvm.h"
#include "layout.h"
#include "options.h"

namespace tiny {

class Machine {
 public:
  explicit Machine(const Options& options);

  int kvm() const { return kvm_.get(); }
  int vm() const { return vm_.get(); }
  uint32_t features() const { return features_; }
  void add_feature(uint32_t feature) { features_ |= feature; }
  bool has_lapic() const { return (features_ & FEATURE_LAPIC) != 0; }
  bool is_split() const { return has_lapic() && (features_ & FEATURE_IOAPIC) == 0; }
  uint8_t* ram() { return ram_.data(); }
  size_t run_bytes() const { return run_bytes_; }

  // Raises one interrupt of a SOURCE_.
  void raise(int source);
  // The guest has ended the level interrupt: KVM lowered the line and said so. True once per interrupt.
  bool take_resample();
  // How often the doorbells have rung since last asked.
  uint64_t take_doorbells();

 private:
  void add_memory(const Options& options);
  void add_interrupt_controllers(const Options& options);
  void add_routes();
  void add_eventfds();
  void signal(uint32_t data);
  void add_irqfd(const Fd& eventfd, uint32_t gsi, const Fd* resample);
  void load_guest(const Options& options);

  Fd kvm_, vm_;
  size_t run_bytes_ = 0;
  uint32_t features_ = 0;
  Mapping ram_, rom_, far_;
  Fd irqfd_, level_, level_resample_, msi_route_;
  Fd port_doorbell_, memory_doorbell_;
};

}  // namespace tiny
