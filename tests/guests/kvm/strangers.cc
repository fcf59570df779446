// SPDX-License-Identifier: Apache-2.0

#include "strangers.h"

#include <sys/mman.h>

#include <algorithm>

namespace tiny {
namespace {

constexpr size_t kBytes = 3 * 4096;  // of kvm_run
constexpr uint8_t kContent = 0x5c;   // as an exit reason it is none that needs no answer

bool has_content(const Mapping& memory) {
  return std::all_of(memory.data(), memory.data() + memory.bytes(), [](uint8_t byte) { return byte == kContent; });
}

}  // namespace

ReusedNumber::ReusedNumber(int number) : fd_(must("memfd_create", memfd_create("stranger", MFD_CLOEXEC))) {
  must("ftruncate", ftruncate(fd_.get(), kBytes));
  if (fd_.get() != number) {
    must("dup2", dup2(fd_.get(), number));
    fd_ = Fd(number);
  }
  memory_ = Mapping(kBytes, MAP_SHARED, fd_.get());
  std::memset(memory_.data(), kContent, kBytes);
}

bool ReusedNumber::is_untouched() const { return has_content(memory_); }

UnpluggedVcpu::UnpluggedVcpu(Machine& machine, int id) : fd_(MUST_IOCTL(machine.vm(), KVM_CREATE_VCPU, id)) {
  constexpr uint8_t kOut[] = {0xe6, 0x80};  // out %al, $0x80
  constexpr uint64_t kPlace = 0x7000;
  Mapping run(machine.run_bytes(), MAP_SHARED, fd_.get());
  std::memcpy(machine.ram() + kPlace, kOut, sizeof kOut);
  kvm_sregs sregs = {};
  MUST_IOCTL(fd_.get(), KVM_GET_SREGS, &sregs);
  sregs.cs.base = 0;
  sregs.cs.selector = 0;
  MUST_IOCTL(fd_.get(), KVM_SET_SREGS, &sregs);
  kvm_regs regs = {};
  regs.rip = kPlace;
  regs.rflags = 2;
  MUST_IOCTL(fd_.get(), KVM_SET_REGS, &regs);
  MUST_IOCTL(fd_.get(), KVM_RUN, 0);
  void* const place = run.data();
  run = Mapping();
  memory_.emplace(kBytes, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, place);
  std::memset(memory_->data(), kContent, kBytes);
}

bool UnpluggedVcpu::is_untouched() const { return has_content(*memory_); }

}  // namespace tiny
