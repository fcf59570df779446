// SPDX-License-Identifier: Apache-2.0

#include "vcpu.h"

#include <signal.h>
#include <time.h>

#include <chrono>
#include <string>
#include <vector>

namespace tiny {
namespace {

constexpr int kKick = SIGUSR1;
constexpr uint32_t kCpuidXsave = 1u << 26;  // leaf 1, ECX
constexpr uint64_t kX87SseAvx = 7;  // bits of XCR0

thread_local const Control* t_parks_for = nullptr;  // in KVM_RUN, of a VMM that parks its vCPUs in the handler
std::atomic<int> parked_in_handler{0};

// For the others it is enough that KVM_RUN is interrupted.
void on_kick(int) {
  if (t_parks_for == nullptr) return;
  const int error = errno;
  parked_in_handler++;
  const timespec a_moment = {0, 1'000'000};
  while (t_parks_for->pause) nanosleep(&a_moment, nullptr);
  parked_in_handler--;
  errno = error;
}

}  // namespace

void Vcpu::install_signal_handler() {
  struct sigaction action = {};
  action.sa_handler = on_kick;
  must("sigaction", sigaction(kKick, &action, nullptr));
}

int Vcpu::count_parked_in_handler() { return parked_in_handler; }

Vcpu::Vcpu(const Options& options, Machine& machine, Device& device, Control& control, int index)
    : machine_(machine),
      device_(device),
      control_(control),
      index_(index),
      signal_mask_(options.signal_mask),
      reads_reason_(options.reads_reason),
      eintr_is_fatal_(options.eintr_is_fatal),
      parks_in_handler_(options.parks_in_handler),
      fd_(MUST_IOCTL(machine.vm(), KVM_CREATE_VCPU, index)) {
  run_ = Mapping(machine.run_bytes(), MAP_SHARED, fd());
  if (options.duplicates) {
    const int original = fd();
    fd_ = std::move(fd_).moved_to_duplicate();
    reused_.emplace(original);
  }
  set_up(options);
}

// ---- before it runs -------------------------------------------------------------------------------------------------

void Vcpu::set_up(const Options& options) {
  set_cpuid();
  bool waits_for_sipi = machine_.has_lapic() && index_ > 0 && (!options.start_all || index_ >= options.vcpus);
  if (waits_for_sipi) return;
  if (machine_.has_lapic() && index_ > 0) {
    kvm_mp_state runnable = {KVM_MP_STATE_RUNNABLE};
    MUST_IOCTL(fd(), KVM_SET_MP_STATE, &runnable);
  }
  kvm_sregs sregs = {};
  MUST_IOCTL(fd(), KVM_GET_SREGS, &sregs);
  sregs.cs.base = 0;
  sregs.cs.selector = 0;
  MUST_IOCTL(fd(), KVM_SET_SREGS, &sregs);
  kvm_regs regs = {};
  regs.rip = LOAD_ADDRESS;
  regs.rflags = 2;
  MUST_IOCTL(fd(), KVM_SET_REGS, &regs);
  allow_avx();
}

void Vcpu::set_cpuid() {
  constexpr uint32_t kMost = 256;
  std::vector<uint64_t> words((sizeof(kvm_cpuid2) + kMost * sizeof(kvm_cpuid_entry2)) / 8 + 1);
  auto* cpuid = reinterpret_cast<kvm_cpuid2*>(words.data());
  cpuid->nent = kMost;
  MUST_IOCTL(machine_.kvm(), KVM_GET_SUPPORTED_CPUID, cpuid);
  for (uint32_t n = 0; n < cpuid->nent; n++) {
    kvm_cpuid_entry2& entry = cpuid->entries[n];
    if (entry.function == 1) {
      entry.ebx = (entry.ebx & 0xffffff) | static_cast<uint32_t>(index_) << 24;
      if (entry.ecx & kCpuidXsave) machine_.add_feature(FEATURE_OSXSAVE);
    }
    if (entry.function == 0xb) entry.edx = static_cast<uint32_t>(index_);
  }
  MUST_IOCTL(fd(), KVM_SET_CPUID2, cpuid);
}

// XCR0 is set from here because not every KVM runs XSETBV of the guest.
void Vcpu::allow_avx() {
  if (!__builtin_cpu_supports("avx") || ioctl(machine_.kvm(), KVM_CHECK_EXTENSION, KVM_CAP_XCRS) <= 0) return;
  kvm_xcrs xcrs = {};
  xcrs.nr_xcrs = 1;
  xcrs.xcrs[0].value = kX87SseAvx;
  if (ioctl(fd(), KVM_SET_XCRS, &xcrs) == 0) machine_.add_feature(FEATURE_AVX);
}

// ---- its thread -----------------------------------------------------------------------------------------------------

void Vcpu::start() {
  thread_ = std::thread([this] {
    if (signal_mask_) block_kick();
    loop();
  });
}

// The kick reaches this thread inside of KVM_RUN only, by a signal mask that KVM sets for its duration.
void Vcpu::block_kick() {
  sigset_t inside, kick;
  must("pthread_sigmask", -pthread_sigmask(SIG_BLOCK, nullptr, &inside));
  sigemptyset(&kick);
  sigaddset(&kick, kKick);
  must("pthread_sigmask", -pthread_sigmask(SIG_BLOCK, &kick, nullptr));
  constexpr uint32_t kKernelMaskBytes = 8;  // glibc's sigset_t is longer
  alignas(kvm_signal_mask) uint8_t buffer[sizeof(kvm_signal_mask) + kKernelMaskBytes] = {};
  auto* argument = reinterpret_cast<kvm_signal_mask*>(buffer);
  argument->len = kKernelMaskBytes;
  std::memcpy(argument->sigset, &inside, kKernelMaskBytes);
  MUST_IOCTL(fd(), KVM_SET_SIGNAL_MASK, argument);
}

void Vcpu::kick() {
  was_kicked_ = true;
  if (!signal_mask_ && !reads_reason_) set_immediate_exit(1);
  must("pthread_kill", -pthread_kill(thread_.native_handle(), kKick));
}

void Vcpu::loop() {
  while (!control_.end) {
    if (control_.pause && !parks_in_handler_) {
      complete_pending_io();
      park();
    } else if (run()) {
      handle_exit();
    }
  }
}

// One KVM_RUN. False: it was interrupted, there is no exit to handle.
bool Vcpu::run() {
  if (parks_in_handler_) t_parks_for = &control_;
  int result = ioctl(fd(), KVM_RUN, 0);
  int error = errno;
  t_parks_for = nullptr;
  device_.drain(reinterpret_cast<kvm_coalesced_mmio_ring*>(run_.data() + KVM_COALESCED_MMIO_PAGE_OFFSET * 4096));
  if (result == 0) return true;
  if (error != EINTR && error != EAGAIN) {
    errno = error;
    give_up("KVM_RUN");
  }
  if (eintr_is_fatal_ && error == EINTR && !was_kicked_.exchange(false)) {
    device_.fail(index_, "KVM_RUN was interrupted by nobody");
    control_.end = true;
  }
  note_interruption();
  return reads_reason_;
}

void Vcpu::note_interruption() {
  device_.note_interrupted_run();
  if (signal_mask_) {
    sigset_t kick;
    sigemptyset(&kick);
    sigaddset(&kick, kKick);
    const timespec now = {0, 0};
    sigtimedwait(&kick, nullptr, &now);
  } else {
    set_immediate_exit(0);
  }
}

// The answer to an exit is taken by the next KVM_RUN; state may be looked at only after that.
void Vcpu::complete_pending_io() {
  do {
    if (signal_mask_) {
      pthread_kill(pthread_self(), kKick);
    } else {
      set_immediate_exit(1);
    }
    if (!run()) return;
    handle_exit();
  } while (true);
}

void Vcpu::park() {
  std::unique_lock lock(control_.mutex);
  control_.parked++;
  control_.changed.notify_all();
  control_.changed.wait(lock, [this] { return !control_.pause || control_.end; });
  control_.parked--;
}

void Vcpu::handle_exit() {
  while (index_ == 0 && control_.slow && !control_.end) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  kvm_run& exit = *state();
  switch (exit.exit_reason) {
    case KVM_EXIT_IO: return handle_port();
    case KVM_EXIT_MMIO:
      if (exit.mmio.is_write) {
        device_.write_memory(index_, exit.mmio.phys_addr, exit.mmio.data, exit.mmio.len);
      } else {
        device_.read_memory(index_, exit.mmio.phys_addr, exit.mmio.data, exit.mmio.len);
      }
      return;
    case KVM_EXIT_HLT: {  // without an interrupt controller nothing wakes it
      std::unique_lock lock(control_.mutex);
      control_.changed.wait(lock, [this] { return control_.pause || control_.end; });
      return;
    }
    case KVM_EXIT_IOAPIC_EOI: return device_.end_level_interrupt(index_, exit.eoi.vector);
    case KVM_EXIT_INTR:
    case KVM_EXIT_IRQ_WINDOW_OPEN: return;
    default: {
      kvm_regs regs = {};
      ioctl(fd(), KVM_GET_REGS, &regs);
      char text[100];
      std::snprintf(text, sizeof text, "exit reason %u suberror %u at rip 0x%llx", exit.exit_reason,
                    exit.exit_reason == KVM_EXIT_INTERNAL_ERROR ? exit.internal.suberror : 0, regs.rip);
      device_.fail(index_, text);
      control_.end = true;
    }
  }
}

void Vcpu::handle_port() {
  const kvm_run& exit = *state();
  uint8_t* data = run_.data() + exit.io.data_offset;
  for (uint32_t n = 0; n < exit.io.count; n++, data += exit.io.size) {
    if (exit.io.direction == KVM_EXIT_IO_IN) {
      device_.read_port(index_, exit.io.port, data, exit.io.size);
    } else if (exit.io.port == REG_INJECT_NMI) {
      MUST_IOCTL(fd(), KVM_NMI, 0);
    } else {
      device_.write_port(index_, exit.io.port, data, exit.io.size);
    }
  }
}

}  // namespace tiny
