// SPDX-License-Identifier: Apache-2.0

#include "machine.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/stat.h>

#include <vector>

namespace tiny {
namespace {

constexpr uint64_t kTssAddress = 0xfffbd000;  // three pages and one that the guest does not use, as VMX wants them
constexpr uint64_t kIdentityMapAddress = 0xfffbc000;
constexpr uint32_t kMsiAddress = 0xfee00000;  // to LAPIC 0
constexpr uint32_t kLevelMessage = 0x8000 | VECTOR_LEVEL;
constexpr uint32_t kPicPins = 16, kIoapicPins = 24;

// Takes what the descriptor has counted; 0 when that is nothing.
uint64_t take(const Fd& eventfd) {
  uint64_t count = 0;
  if (eventfd.get() >= 0 && read(eventfd.get(), &count, sizeof count) != sizeof count) count = 0;
  return count;
}

void give(const Fd& eventfd) {
  uint64_t one = 1;
  must("write to an eventfd", write(eventfd.get(), &one, sizeof one));
}

Fd make_eventfd() { return Fd(must("eventfd", eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC))); }

void set_slot(int vm, uint32_t slot, uint32_t flags, uint64_t address, const Mapping& memory) {
  kvm_userspace_memory_region region = {};
  region.slot = slot;
  region.flags = flags;
  region.guest_phys_addr = address;
  region.memory_size = memory.bytes();
  region.userspace_addr = reinterpret_cast<uintptr_t>(memory.data());
  MUST_IOCTL(vm, KVM_SET_USER_MEMORY_REGION, &region);
}

}  // namespace

Machine::Machine(const Options& options) : kvm_(must("/dev/kvm", open("/dev/kvm", O_RDWR | O_CLOEXEC))) {
  if (MUST_IOCTL(kvm(), KVM_GET_API_VERSION, 0) != KVM_API_VERSION) {
    errno = ENOTSUP;
    give_up("version of the KVM interface");
  }
  run_bytes_ = static_cast<size_t>(MUST_IOCTL(kvm(), KVM_GET_VCPU_MMAP_SIZE, 0));
  vm_ = Fd(MUST_IOCTL(kvm(), KVM_CREATE_VM, 0));
  if (options.duplicates) vm_ = std::move(vm_).moved_to_duplicate();
  MUST_IOCTL(vm(), KVM_SET_TSS_ADDR, kTssAddress);
  uint64_t identity_map = kIdentityMapAddress;
  MUST_IOCTL(vm(), KVM_SET_IDENTITY_MAP_ADDR, &identity_map);
  add_memory(options);
  load_guest(options);
  add_interrupt_controllers(options);
  if (options.eventfds) add_eventfds();
  if (options.coalesced) {
    kvm_coalesced_mmio_zone zone = {COALESCED_ADDRESS, 0x1000, {0}};
    MUST_IOCTL(vm(), KVM_REGISTER_COALESCED_MMIO, &zone);
    features_ |= FEATURE_COALESCED;
  }
  if (options.spare) features_ |= FEATURE_SPARE;
}

void Machine::add_memory(const Options& options) {
  const int kind = MAP_PRIVATE | MAP_ANONYMOUS;
  ram_ = Mapping(RAM_BYTES, kind, -1);
  rom_ = Mapping(ROM_BYTES, kind, -1);
  far_ = Mapping(FAR_BYTES, kind, -1);
  for (uint32_t n = 0; n < ROM_BYTES / 4; n++) {
    uint32_t word = n * ROM_FACTOR;
    std::memcpy(rom_.data() + n * 4, &word, 4);
  }
  if (options.dont_fork) {
    for (const Mapping* memory : {&ram_, &rom_, &far_}) {
      must("madvise", madvise(memory->data(), memory->bytes(), MADV_DONTFORK));
    }
  }
  set_slot(vm(), 0, 0, 0, ram_);
  set_slot(vm(), 1, KVM_MEM_READONLY, ROM_ADDRESS, rom_);
  // Made elsewhere, deleted, made again where it belongs: as firmware does when it moves a PCI window.
  set_slot(vm(), 2, 0, FAR_ADDRESS + FAR_BYTES, far_);
  set_slot(vm(), 2, 0, FAR_ADDRESS + FAR_BYTES, Mapping());
  set_slot(vm(), 2, KVM_MEM_LOG_DIRTY_PAGES, FAR_ADDRESS, far_);
}

void Machine::load_guest(const Options& options) {
  Fd file(must(options.guest.c_str(), open(options.guest.c_str(), O_RDONLY | O_CLOEXEC)));
  must("read the guest", read(file.get(), ram_.data() + LOAD_ADDRESS, STACKS - LOAD_ADDRESS));
}

void Machine::add_interrupt_controllers(const Options& options) {
  if (options.irqchip == Irqchip::kNone) return;
  features_ |= FEATURE_LAPIC;
  if (options.irqchip == Irqchip::kSplit) {
    kvm_enable_cap split = {};
    split.cap = KVM_CAP_SPLIT_IRQCHIP;
    split.args[0] = kIoapicPins;  // so many GSIs stay for the IOAPIC of the VMM
    MUST_IOCTL(vm(), KVM_ENABLE_CAP, &split);
  } else {
    features_ |= FEATURE_IOAPIC | FEATURE_PIT;
    MUST_IOCTL(vm(), KVM_CREATE_IRQCHIP, 0);
    kvm_pit_config pit = {KVM_PIT_SPEAKER_DUMMY, {0}};
    MUST_IOCTL(vm(), KVM_CREATE_PIT2, &pit);
  }
  add_routes();
}

// Routes as on a PC: the PIT's line 0 goes to pin 2 of the IOAPIC. One more GSI is a message.
void Machine::add_routes() {
  std::vector<kvm_irq_routing_entry> entries;
  auto add_pin = [&](uint32_t gsi, uint32_t chip, uint32_t pin) {
    kvm_irq_routing_entry entry = {};
    entry.gsi = gsi;
    entry.type = KVM_IRQ_ROUTING_IRQCHIP;
    entry.u.irqchip = {chip, pin};
    entries.push_back(entry);
  };
  if (features_ & FEATURE_IOAPIC) {
    for (uint32_t pin = 0; pin < kPicPins; pin++) {
      if (pin != 2) add_pin(pin, pin < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE, pin % 8);
    }
    for (uint32_t pin = 0; pin < kIoapicPins; pin++) {
      if (pin != 2) add_pin(pin, KVM_IRQCHIP_IOAPIC, pin == 0 ? PIN_PIT : pin);
    }
  }
  kvm_irq_routing_entry message = {};
  message.gsi = GSI_MSI_ROUTE;
  message.type = KVM_IRQ_ROUTING_MSI;
  message.u.msi.address_lo = kMsiAddress;
  message.u.msi.data = VECTOR_MSI_ROUTE;
  entries.push_back(message);
  if (is_split()) {  // what the IOAPIC of the VMM has in its redirection table: KVM tells the ends of level-triggered interrupts
    message.gsi = PIN_LEVEL;
    message.u.msi.data = kLevelMessage;
    entries.push_back(message);
  }

  std::vector<uint64_t> words((sizeof(kvm_irq_routing) + entries.size() * sizeof entries[0] + 7) / 8);
  auto* routing = reinterpret_cast<kvm_irq_routing*>(words.data());
  routing->nr = static_cast<uint32_t>(entries.size());
  std::memcpy(routing->entries, entries.data(), entries.size() * sizeof entries[0]);
  MUST_IOCTL(vm(), KVM_SET_GSI_ROUTING, routing);
}

void Machine::add_irqfd(const Fd& eventfd, uint32_t gsi, const Fd* resample) {
  kvm_irqfd irqfd = {};
  irqfd.fd = static_cast<uint32_t>(eventfd.get());
  irqfd.gsi = gsi;
  if (resample) {
    irqfd.flags = KVM_IRQFD_FLAG_RESAMPLE;
    irqfd.resamplefd = static_cast<uint32_t>(resample->get());
  }
  MUST_IOCTL(vm(), KVM_IRQFD, &irqfd);
}

void Machine::add_eventfds() {
  features_ |= FEATURE_EVENTFDS;
  port_doorbell_ = make_eventfd();
  kvm_ioeventfd port = {};
  port.addr = REG_DOORBELL;
  port.len = 4;
  port.fd = port_doorbell_.get();
  port.flags = KVM_IOEVENTFD_FLAG_PIO;
  MUST_IOCTL(vm(), KVM_IOEVENTFD, &port);

  memory_doorbell_ = make_eventfd();
  kvm_ioeventfd memory = {};
  memory.addr = DOORBELL_ADDRESS;
  memory.len = 4;
  memory.fd = memory_doorbell_.get();
  memory.datamatch = DOORBELL_VALUE;
  memory.flags = KVM_IOEVENTFD_FLAG_DATAMATCH;
  MUST_IOCTL(vm(), KVM_IOEVENTFD, &memory);

  if (!has_lapic()) return;
  msi_route_ = make_eventfd();
  add_irqfd(msi_route_, GSI_MSI_ROUTE, nullptr);
  if (!(features_ & FEATURE_IOAPIC)) return;
  irqfd_ = make_eventfd();
  add_irqfd(irqfd_, PIN_IRQFD, nullptr);
  level_ = make_eventfd();
  level_resample_ = make_eventfd();
  add_irqfd(level_, PIN_LEVEL, &level_resample_);
}

void Machine::raise(int source) {
  switch (source) {
    case SOURCE_IRQFD: return give(irqfd_);
    case SOURCE_LEVEL: return is_split() ? signal(kLevelMessage) : give(level_);
    case SOURCE_MSI_ROUTE: return give(msi_route_);
    case SOURCE_SIGNAL: return signal(VECTOR_SIGNAL);
  }
}

void Machine::signal(uint32_t data) {
  kvm_msi message = {};
  message.address_lo = kMsiAddress;
  message.data = data;
  MUST_IOCTL(vm(), KVM_SIGNAL_MSI, &message);
}

bool Machine::take_resample() { return take(level_resample_) != 0; }

uint64_t Machine::take_doorbells() { return take(port_doorbell_) + take(memory_doorbell_); }

}  // namespace tiny
