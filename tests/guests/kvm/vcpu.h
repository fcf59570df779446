// SPDX-License-Identifier: Apache-2.0
//
// A vCPU and the thread that runs it.

#pragma once

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <thread>

#include "device.h"
#include "machine.h"
#include "options.h"
#include "strangers.h"

namespace tiny {

// What the main thread asks of all vCPU threads.
struct Control {
  std::mutex mutex;
  std::condition_variable changed;
  std::atomic<bool> pause{false};
  std::atomic<bool> end{false};
  std::atomic<bool> slow{false};  // the first vCPU's thread does not answer its access
  int parked = 0;  // threads that wait because of `pause`
};

class Vcpu {
 public:
  Vcpu(const Options& options, Machine& machine, Device& device, Control& control, int index);
  void start();
  // Makes the thread leave KVM_RUN soon and look at Control.
  void kick();
  void join() { thread_.join(); }
  // Whether memory that has nothing to do with it has kept what is in it.
  bool strangers_are_untouched() const { return !reused_ || reused_->is_untouched(); }
  int fd() const { return fd_.get(); }
  static void install_signal_handler();
  // How many threads wait in the handler of the kick.
  static int count_parked_in_handler();

 private:
  void set_up(const Options& options);
  void set_cpuid();
  void allow_avx();
  void block_kick();
  void loop();
  bool run();
  void complete_pending_io();
  void park();
  void note_interruption();
  void handle_exit();
  void handle_port();
  kvm_run* state() { return reinterpret_cast<kvm_run*>(run_.data()); }
  void set_immediate_exit(uint8_t value) { __atomic_store_n(&state()->immediate_exit, value, __ATOMIC_SEQ_CST); }

  Machine& machine_;
  Device& device_;
  Control& control_;
  const int index_;
  const bool signal_mask_, reads_reason_, eintr_is_fatal_, parks_in_handler_;
  std::atomic<bool> was_kicked_{false};
  Fd fd_;
  Mapping run_;
  std::optional<ReusedNumber> reused_;
  std::thread thread_;
};

}  // namespace tiny
