// Interrupts that are on their way from an irqfd to KVM's PIC and IOAPIC. The one who signals the eventfd does not inject them:
// KVM leaves that to a kernel thread (virt/kvm/eventfd.c, irqfd_wakeup and irqfd_inject; messages for a local APIC alone come at
// once), and takes the count out of the eventfd first. Between the two the interrupt is in no state that can be read, and an
// image that is made then has lost it. Each processor has its queue for such work and begins it in order
// (Documentation/core-api/workqueue.rst). So an interrupt of a VM of our own, signalled on every processor and awaited, has all
// before it in front.
#include <algorithm>

#include <sched.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/kvm_api.h"
#include "modules/kvm.h"

namespace vmckpt {
namespace {

constexpr uint32_t kPin = 3;  // of the master PIC, in the routing that KVM_CREATE_IRQCHIP makes
constexpr int64_t kPatienceUs = 2'000'000;

class OwnAffinity {
 public:
  OwnAffinity() { known_ = ::sched_getaffinity(0, sizeof before_, &before_) == 0; }
  ~OwnAffinity() {
    if (known_) ::sched_setaffinity(0, sizeof before_, &before_);
  }
  // False: there is no such processor, or it is not for this process, nor for what it has started.
  bool go_to(int processor) const {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(static_cast<size_t>(processor), &one);
    return known_ && ::sched_setaffinity(0, sizeof one, &one) == 0;
  }

 private:
  cpu_set_t before_;
  bool known_ = false;
};

}  // namespace

IrqfdFlush IrqfdFlush::make(const KvmHost& host) {
  IrqfdFlush flush;
  flush.event_ = Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  flush.vm_ = Fd(host.call(host.device.get(), KVM_CREATE_VM, 0));
  kvm_irqfd irqfd{};
  irqfd.fd = static_cast<uint32_t>(flush.event_.get());
  irqfd.gsi = kPin;
  if (!flush.event_ || !flush.vm_ || host.call(flush.vm_.get(), KVM_CREATE_IRQCHIP, 0) != 0 ||
      host.call(flush.vm_.get(), KVM_IRQFD, reinterpret_cast<unsigned long>(&irqfd)) != 0) {
    flush.vm_.reset();
  }
  return flush;
}

Result<void> IrqfdFlush::run(const KvmHost& host) const {
  if (!vm_) return error("make a VM of its own, to wait for interrupts that are on their way", "try again");
  auto pic = [&](unsigned long request, kvm_irqchip& chip) {
    chip.chip_id = KVM_IRQCHIP_PIC_MASTER;
    return host.call(vm_.get(), request, reinterpret_cast<unsigned long>(&chip)) == 0;
  };
  const OwnAffinity affinity;
  const long processors = std::min<long>(::sysconf(_SC_NPROCESSORS_CONF), CPU_SETSIZE);
  for (int processor = 0; processor < processors; ++processor) {
    if (!affinity.go_to(processor)) continue;
    kvm_irqchip chip{};
    if (!pic(KVM_SET_IRQCHIP, chip)) return errno_error("reset the interrupt controller of a VM of its own");
    if (::eventfd_write(event_.get(), 1) != 0) return errno_error("signal an irqfd of its own");
    const int64_t deadline_us = monotonic_us() + kPatienceUs;
    for (chip = {}; (chip.chip.pic.irr >> kPin & 1) == 0; ::sched_yield()) {
      if (!pic(KVM_GET_IRQCHIP, chip)) return errno_error("read the interrupt controller of a VM of its own");
      if (monotonic_us() > deadline_us) {
        return error(fmt::format("interrupts on their way to the VM are not delivered by processor {}", processor),
                     "the host is overloaded; try again later");
      }
    }
  }
  return {};
}

}  // namespace vmckpt
