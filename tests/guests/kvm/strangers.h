// SPDX-License-Identifier: Apache-2.0
//
// Memory that has nothing to do with a vCPU, where somebody who believes old notes would take it for struct kvm_run.

#pragma once

#include <optional>

#include "machine.h"

namespace tiny {

// A descriptor's number that was a vCPU's is another file's now, which is mapped as kvm_run was.
class ReusedNumber {
 public:
  explicit ReusedNumber(int number);
  bool is_untouched() const;

 private:
  Fd fd_;
  Mapping memory_;
};

// A vCPU that has run up to an access of a port, and was unplugged then: its kvm_run is unmapped, its descriptor kept, as QEMU
// does.
class UnpluggedVcpu {
 public:
  UnpluggedVcpu(Machine& machine, int id);
  bool is_untouched() const;

 private:
  Fd fd_;
  std::optional<Mapping> memory_;  // at the address of its kvm_run
};

}  // namespace tiny
