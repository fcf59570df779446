// SPDX-License-Identifier: Apache-2.0
//
// A vCPU and the thread that runs it.

#pragma once

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "device.h"
#include "machine.h"
#include "options.h"

namespace tiny {

// What the main thread asks of all vCPU threads.
struct Control {
  std::mutex mutex;
  std::condition_variable changed;
  std::atomic<bool> pause{false};
  std::atomic<bool> end{false};
  int parked = 0;  // threads that wait because of `pause`
};

class Vcpu {
 public:
  Vcpu(const Options& options, Machine& machine, Device& device, Control& control, int index);
  void start();
  // Makes the thread leave KVM_RUN soon and look at Control.
  void kick();
  void join() { thread_.join(); }
  int fd() const { return fd_.get(); }
  static void install_signal_handler();

 private:
  void set_up(const Options& options);
  void set_cpuid();
  void allow_avx();
  void block_kick();
  void loop();
  bool run();
  void complete_pending_io();
  void park();
  void handle_exit();
  void handle_port();
  kvm_run* state() { return reinterpret_cast<kvm_run*>(run_.data()); }
  void set_immediate_exit(uint8_t value) { __atomic_store_n(&state()->immediate_exit, value, __ATOMIC_SEQ_CST); }

  Machine& machine_;
  Device& device_;
  Control& control_;
  const int index_;
  const bool signal_mask_;
  Fd fd_;
  Mapping run_;
  std::thread thread_;
};

}  // namespace tiny
