// A virtual machine that no vCPU ever runs: MSRs that KVM lists nowhere (memory types, machine-check banks), the date in guest
// memory at which the guest's clock was zero, the clock itself, and capabilities that add to each other.

#include <linux/kvm.h>
#include <sys/ioctl.h>

#include "act.h"

constexpr uint32_t kWallClock = 0x4b564d00;  // MSR_KVM_WALL_CLOCK_NEW
constexpr size_t kMemoryBytes = 0x10000, kWallClockAt = 0x3000;
constexpr int64_t kSecond = 1'000'000'000, kUptime = 5'000'000 * kSecond, kPatience = 300 * kSecond;

struct OneMsr {
  uint32_t count = 1, pad = 0, index = 0, reserved = 0;
  uint64_t value = 0;
};

struct WallClock {  // struct pvclock_wall_clock
  uint32_t version, seconds, nanoseconds;
};

static unsigned long msrs_request(bool set) { return set ? _IOW(KVMIO, 0x89, uint64_t) : _IOWR(KVMIO, 0x88, uint64_t); }

static bool set_msr(int vcpu, uint32_t index, uint64_t value) {
  OneMsr msr;
  msr.index = index;
  msr.value = value;
  return ioctl(vcpu, msrs_request(true), &msr) == 1;
}

static uint64_t get_msr(int vcpu, uint32_t index) {
  OneMsr msr;
  msr.index = index;
  return ioctl(vcpu, msrs_request(false), &msr) == 1 ? msr.value : 0xdead;
}

static int64_t guest_clock(int vm) {
  kvm_clock_data clock{};
  MUST(ioctl(vm, KVM_GET_CLOCK, &clock));
  return static_cast<int64_t>(clock.clock);
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  const int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
  if (kvm < 0) act::skip("/dev/kvm, or the right to open it");
  const int vm = MUST(ioctl(kvm, KVM_CREATE_VM, 0));
  auto* memory = static_cast<uint8_t*>(mmap(nullptr, kMemoryBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  kvm_userspace_memory_region slot{};
  slot.memory_size = kMemoryBytes;
  slot.userspace_addr = reinterpret_cast<uint64_t>(memory);
  MUST(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot));
  // Exits may be left out only before there is a vCPU; more each time.
  kvm_enable_cap exits{};
  exits.cap = KVM_CAP_X86_DISABLE_EXITS;
  for (uint64_t kind : {uint64_t{KVM_X86_DISABLE_EXITS_HLT}, uint64_t{KVM_X86_DISABLE_EXITS_PAUSE}}) {
    exits.args[0] = kind;
    if (ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_X86_DISABLE_EXITS) & static_cast<int>(kind))
      MUST(ioctl(vm, KVM_ENABLE_CAP, &exits));
  }
  const int vcpu = MUST(ioctl(vm, KVM_CREATE_VCPU, 0));
  uint64_t machine_checks = 0;
  MUST(ioctl(kvm, KVM_X86_GET_MCE_CAP_SUPPORTED, &machine_checks));
  machine_checks = (machine_checks & ~uint64_t{0xff}) | 10;
  MUST(ioctl(vcpu, KVM_X86_SETUP_MCE, &machine_checks));

  std::vector<std::pair<uint32_t, uint64_t>> set;
  for (const auto& [index, value] : std::vector<std::pair<uint32_t, uint64_t>>{{0x2ff, 0xc06},
                                                                               {0x200, 0x6},
                                                                               {0x20e, 0x5},
                                                                               {0x250, 0x0606060606060606},
                                                                               {0x258, 0x0505050505050505},
                                                                               {0x26f, 0x0404040404040404},
                                                                               {0x277, 0x0007040600070401},
                                                                               {0x400, 0},
                                                                               {0x401, 0x1234},
                                                                               {0x402, 0x5678},
                                                                               {0x427, 0x9abc},
                                                                               {0x8c, 0x11223344},
                                                                               {0x289, 1}}) {
    if (set_msr(vcpu, index, value)) set.emplace_back(index, value);
  }
  act::expect("this KVM takes memory types and machine checks", set.size() >= 8);
  kvm_clock_data clock{};
  clock.clock = kUptime;
  MUST(ioctl(vm, KVM_SET_CLOCK, &clock));
  act::expect("the wall clock's page", set_msr(vcpu, kWallClock, kWallClockAt));
  const int64_t before = guest_clock(vm);

  act::intermission();

  for (const auto& [index, value] : set) {
    char name[32];
    std::snprintf(name, sizeof name, "MSR %#x", index);
    act::expect_equal(name, value, get_msr(vcpu, index));
  }
  const int64_t now = guest_clock(vm);
  act::expect("the clock goes on from where it stood", now > before && now - before < kPatience);
  WallClock date{};
  std::memcpy(&date, memory + kWallClockAt, sizeof date);
  const int64_t zero_at = date.seconds * kSecond + date.nanoseconds;
  const int64_t error = zero_at - (act::now_ns(CLOCK_REALTIME) - guest_clock(vm));
  act::expect("the date at which it was zero is right to a minute in guest memory",
              error < 60 * kSecond && error > -60 * kSecond);
  return act::finish();
}
