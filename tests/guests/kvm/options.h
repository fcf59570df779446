// SPDX-License-Identifier: Apache-2.0
//
// What tiny_vmm is told on its command line.

#pragma once

#include <string>

namespace tiny {

enum class Irqchip { kNone, kSplit, kFull };

struct Options {
  std::string guest;    // a flat binary
  std::string go_file;  // its text is how many stages the guest may go on; an empty file means all
  int vcpus = 1;
  Irqchip irqchip = Irqchip::kNone;
  bool start_all = false;    // with a LAPIC in the kernel: no vCPU waits for SIPI
  bool spare = false;        // one more vCPU, which waits for SIPI until the guest starts it
  bool dont_fork = false;    // MADV_DONTFORK on the guest's memory
  bool eventfds = false;     // ioeventfds, and with a full irqchip irqfds
  bool coalesced = false;    // a coalesced MMIO zone
  bool duplicates = false;   // works through duplicates of the VM's and the vCPUs' descriptors, closes the originals
  long lose_answer = 0;      // the device gives its answer of this number twice: a canary, the guest must notice
  unsigned long fail_ioctl = 0;  // this request fails with EIO once the guest runs, whoever makes it in this process
  bool reads_reason = false;     // looks at exit_reason whatever KVM_RUN answers, and kicks by signal alone: as kvmtool
  bool eintr_is_fatal = false;   // takes an EINTR that no kick explains for an error
  bool parks_in_handler = false; // keeps paused vCPUs in the handler of the kick: as kvmtool
  bool unplug = false;           // has unplugged a vCPU and put something else where its kvm_run was
  std::string locked_in;         // from its first KVM_RUN on a system call filter kills: "own" calls alone, or "checkpoint"'s too
  bool signal_mask = false;  // KVM_SET_SIGNAL_MASK rather than immediate_exit
};

// Ends the process with status 2 when the command line is wrong.
Options parse_options(int argc, char** argv);

}  // namespace tiny
