#include "modules/fake_kvm.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include <sys/syscall.h>

#include "modules/played/kvm_msrs.h"
#include "modules/played/operations.h"

namespace vmckpt {
namespace {

constexpr uint32_t kTsc = 0x10, kWallClock = 0x11, kWallClockNew = 0x4b564d00;

template <class T>
T& at(unsigned long address) {
  return *reinterpret_cast<T*>(address);
}

bool is_synic(uint32_t msr) {
  return msr == 0x40000080 || (msr >= 0x40000082 && msr <= 0x40000084) || (msr >= 0x40000090 && msr <= 0x4000009f) ||
         (msr >= 0x400000b0 && msr <= 0x400000b7);
}

void add_range(std::map<uint32_t, uint64_t>& msrs, uint32_t first, uint32_t last, uint64_t value = 0) {
  for (uint32_t index = first; index <= last; ++index) msrs[index] = value;
}

FakeHost hardware_host() {
  FakeHost host;
  host.listed = {0x174, 0x175, 0x176, 0xc0000081, 0xc0000082, 0xc0000083, 0xc0000084, 0xc0000102, 0x10, 0x277, 0xc0000103, 0xda0,
                 // KVM's own, Hyper-V's, and what is emulated on every host
                 0x11, 0x12, 0x4b564d00, 0x4b564d01, 0x4b564d02, 0x4b564d03, 0x4b564d04, 0x4b564d05, 0x4b564d06, 0x4b564d07,
                 0x40000000, 0x40000001, 0x40000020, 0x40000021, 0x40000022, 0x40000023, 0x40000100, 0x40000101, 0x40000102,
                 0x40000103, 0x40000104, 0x40000105, 0x40000003, 0x40000002, 0x40000010, 0x40000080, 0x400000b0, 0x40000073,
                 0x40000106, 0x40000107, 0x40000108, 0x40000118,
                 0x3b, 0x6e0, 0x10a, 0x345, 0x1a0, 0x17a, 0x17b, 0x4d0, 0x9e, 0x34, 0xce, 0x140, 0x8b};
  for (uint32_t index : host.listed) host.msrs[index] = 0;
  host.msrs[0x277] = 0x0007040600070406;
  host.msrs[0x17b] = ~uint64_t{0};
  host.msrs[0x9e] = 0x30000;
  // Not listed, and taken all the same.
  add_range(host.msrs, 0x200, 0x20f);
  add_range(host.msrs, 0x258, 0x259);
  add_range(host.msrs, 0x268, 0x26f);
  host.msrs[0x250] = host.msrs[0x2ff] = 0;
  add_range(host.msrs, 0x40000082, 0x40000083);
  add_range(host.msrs, 0x40000090, 0x4000009f, 0x10000);  // masked
  add_range(host.msrs, 0x400000b0, 0x400000b7);
  host.capabilities = {{KVM_CAP_XSAVE2, 4096}, {KVM_CAP_SREGS2, 1}, {KVM_CAP_VCPU_ATTRIBUTES, 1}, {KVM_CAP_NESTED_STATE, 4224},
                       {KVM_CAP_ADJUST_CLOCK, 0xe}, {KVM_CAP_TSC_CONTROL, 1}};
  return host;
}

}  // namespace

FakeHost intel_host() {
  FakeHost host = hardware_host();
  for (uint32_t index :
       {0x3au,  0x48u, 0xe1u, 0x122u, 0x1c4u, 0x1c5u, 0x38du, 0x38eu, 0x38fu, 0x390u, 0x309u, 0x30au, 0x30bu, 0x186u,
        0x187u, 0xc1u, 0xc2u, 0x1d9u, 0x480u, 0x481u, 0x482u, 0x485u, 0x486u, 0x488u, 0x48au, 0x48bu, 0x491u}) {
    host.listed.push_back(index);
    host.msrs[index] = 0;
  }
  host.msrs[0x480] = 0x00da040000000011;  // nested VMX: not zero in a new vCPU
  host.msrs[0x8c] = 0xa6053e051270b7ac;   // the SGX key that Intel signs with
  host.msrs[0x8d] = 0x6cfbe8ba8b3b413d;
  host.msrs[0x8e] = 0xc4916d99f2b3735d;
  host.msrs[0x8f] = 0xd4f8c05909f9bb3b;
  host.capabilities[70] = 1;  // KVM_CAP_ONE_REG
  return host;
}

FakeHost amd_host() {
  FakeHost host = hardware_host();
  for (uint32_t index :
       {0xc0010117u, 0xc0000104u, 0xc001011fu, 0xc0010015u, 0xc0010200u, 0xc0010201u, 0xc0000300u, 0xc0000301u, 0xc0000302u}) {
    host.listed.push_back(index);
    host.msrs[index] = 0;
  }
  host.msrs[0xc0000104] = 0x100000000;  // a ratio of one
  add_range(host.msrs, 0xc0010140, 0xc0010141);
  return host;
}

int FakeKvm::door(int fd, unsigned long request, unsigned long argument) {
  const int64_t result = ioctl(fd, request, argument);
  if (result >= 0) return static_cast<int>(result);
  errno = static_cast<int>(-result);
  return -1;
}

int FakeKvm::make_vm() { return static_cast<int>(ioctl(kDevice, KVM_CREATE_VM, 0)); }
int FakeKvm::make_vcpu(int vm_fd) { return static_cast<int>(ioctl(vm_fd, KVM_CREATE_VCPU, 0)); }

int64_t FakeKvm::ioctl(int fd, unsigned long request, unsigned long argument) {
  int64_t result = -EBADF;
  if (request == KVM_CHECK_EXTENSION) {
    auto capability = host.capabilities.find(argument);
    return capability == host.capabilities.end() ? 0 : capability->second;
  }
  if (auto vm = vms.find(fd); vm != vms.end()) {
    result = vm_ioctl(fd, vm->second, request, argument);
  } else if (auto vcpu = vcpus.find(fd); vcpu != vcpus.end()) {
    result = vcpu_ioctl(vcpu->second, request, argument);
  } else if (request == KVM_GET_VCPU_MMAP_SIZE) {
    result = 12288;
  } else if (request == KVM_CREATE_VM) {
    vms[next_fd_];
    result = next_fd_++;
  } else if (request == KVM_GET_MSR_INDEX_LIST) {
    auto& list = at<kvm_msr_list>(argument);
    const uint32_t room = list.nmsrs;
    list.nmsrs = static_cast<uint32_t>(host.listed.size());
    if (room < list.nmsrs) return -E2BIG;
    std::memcpy(list.indices, host.listed.data(), host.listed.size() * sizeof(uint32_t));
    result = 0;
  } else if (request == KVM_GET_SUPPORTED_CPUID) {
    at<kvm_cpuid2>(argument).nent = 0;
    result = 0;
  }
  if (result >= 0) calls.emplace_back(fd, request);
  return result;
}

int64_t FakeKvm::vm_ioctl(int fd, FakeVm& vm, unsigned long request, unsigned long argument) {
  if (request == KVM_CREATE_VCPU) {
    FakeVcpu& vcpu = vcpus[next_fd_];
    vcpu.vm = static_cast<uint32_t>(fd);
    vcpu.msrs = host.msrs;
    return next_fd_++;
  }
  if (request == KVM_SET_CLOCK) {  // kvm_vm_ioctl_set_clock
    const auto& clock = at<kvm_clock_data>(argument);
    vm.clock_ns = clock.clock;
    if ((clock.flags & KVM_CLOCK_REALTIME) != 0 && real_time_ns > clock.realtime) vm.clock_ns += real_time_ns - clock.realtime;
    return 0;
  }
  if (request == KVM_SET_PIT2) {  // runs from now on; what it raises into a local APIC that is set later is lost with it
    for (const auto& [number, vcpu] : vcpus) vm.pit_ticks_lost |= vcpu.vm == static_cast<uint32_t>(fd) && !vcpu.lapic_set;
    return 0;
  }
  if (request == KVM_ENABLE_CAP) {
    const auto& cap = at<kvm_enable_cap>(argument);
    if (cap.cap == KVM_CAP_X86_DISABLE_EXITS) {  // each call adds to those before (kvm_vm_ioctl_enable_cap)
      for (uint64_t bit = 1; bit <= KVM_X86_DISABLE_EXITS_CSTATE; bit <<= 1) {
        if (cap.args[0] & bit) vm.disabled_exits.insert(bit);
      }
    }
    return 0;
  }
  return 0;
}

const uint64_t* FakeKvm::find_msr(const FakeVcpu& vcpu, uint32_t index) const {
  if (host.refused.count(index) != 0) return nullptr;
  auto found = vcpu.msrs.find(index);
  return found == vcpu.msrs.end() ? nullptr : &found->second;
}

bool FakeKvm::set_msr(FakeVcpu& vcpu, uint32_t index, uint64_t value) {
  if (find_msr(vcpu, index) == nullptr) return false;
  // synic_set_msr, stimer_set_config: without the capability only nothing may be written
  if (is_synic(index) && !vcpu.synic && value != 0 && value != vcpu.msrs[index]) return false;
  FakeVm& vm = vms.at(static_cast<int>(vcpu.vm));
  if (index == kWallClock || index == kWallClockNew) vm.wall_clock_ns = real_time_ns - vm.clock_ns;  // kvm_write_wall_clock
  if (index == kTsc) vcpu.tsc_offset = static_cast<int64_t>(value - host_tsc);
  vcpu.msrs[index] = value;
  vcpu.msr_writes.emplace_back(index, value);
  return true;
}

int64_t FakeKvm::vcpu_ioctl(FakeVcpu& vcpu, unsigned long request, unsigned long argument) {
  switch (request) {
    case KVM_SET_CPUID2: {
      const auto& cpuid = at<kvm_cpuid2>(argument);
      vcpu.cpuid.assign(cpuid.entries, cpuid.entries + cpuid.nent);
      return 0;
    }
    case KVM_X86_SETUP_MCE: {  // kvm_vcpu_ioctl_x86_setup_mce
      vcpu.machine_checks = at<uint64_t>(argument);
      const auto banks = static_cast<uint32_t>(vcpu.machine_checks & 0xff);
      for (uint32_t bank = 0; bank < banks; ++bank) {
        vcpu.msrs[0x400 + 4 * bank] = ~uint64_t{0};
        for (uint32_t i = 1; i < 4; ++i) vcpu.msrs[0x400 + 4 * bank + i] = 0;
        vcpu.msrs[0x280 + bank] = 0;
      }
      return 0;
    }
    case KVM_GET_MSRS: {  // __msr_io: ends at the first that is refused
      ++get_msrs_calls;
      auto& list = at<kvm_msrs>(argument);
      for (uint32_t i = 0; i < list.nmsrs; ++i) {
        const uint64_t* value = find_msr(vcpu, list.entries[i].index);
        if (value == nullptr) return i;
        list.entries[i].data = list.entries[i].index == kTsc ? host_tsc + static_cast<uint64_t>(vcpu.tsc_offset) : *value;
      }
      return list.nmsrs;
    }
    case KVM_SET_MSRS: {
      const auto& list = at<kvm_msrs>(argument);
      for (uint32_t i = 0; i < list.nmsrs; ++i) {
        if (!set_msr(vcpu, list.entries[i].index, list.entries[i].data)) return i;
      }
      return list.nmsrs;
    }
    case KVM_GET_TSC_KHZ: return host.tsc_khz;
    case KVM_GET_DEVICE_ATTR: at<int64_t>(at<kvm_device_attr>(argument).addr) = vcpu.tsc_offset; return 0;
    case KVM_SET_DEVICE_ATTR: vcpu.tsc_offset = at<int64_t>(at<kvm_device_attr>(argument).addr); return 0;
    case KVM_GET_ONE_REG:
    case KVM_SET_ONE_REG: {  // kvm_translate_kvm_reg: EINVAL where the guest has no shadow stacks
      const bool has_shadow_stacks = std::any_of(vcpu.cpuid.begin(), vcpu.cpuid.end(), [](const kvm_cpuid_entry2& entry) {
        return entry.function == 7 && entry.index == 0 && (entry.ecx & 1u << 7) != 0;
      });
      const auto& reg = at<kvm_one_reg>(argument);
      if (reg.id != 0x2030000300000000 || !has_shadow_stacks) return -EINVAL;
      auto& value = at<uint64_t>(reg.addr);
      (request == KVM_GET_ONE_REG ? value : vcpu.ssp) = request == KVM_GET_ONE_REG ? vcpu.ssp : value;
      return 0;
    }
    case KVM_ENABLE_CAP:
      if (at<kvm_enable_cap>(argument).cap == KVM_CAP_HYPERV_SYNIC || at<kvm_enable_cap>(argument).cap == KVM_CAP_HYPERV_SYNIC2)
        vcpu.synic = true;
      return 0;
    case KVM_GET_VCPU_EVENTS: at<kvm_vcpu_events>(argument) = vcpu.events; return 0;
    case KVM_SET_VCPU_EVENTS: {  // kvm_vcpu_ioctl_x86_set_vcpu_events: entering or leaving SMM leaves nested mode
      vcpu.events = at<kvm_vcpu_events>(argument);
      const bool smm = (vcpu.events.flags & KVM_VCPUEVENT_VALID_SMM) != 0 && vcpu.events.smi.smm != 0;
      if (smm != vcpu.in_smm && !vcpu.nested.empty()) {
        vcpu.nested.clear();
        vcpu.nested_lost = true;
      }
      vcpu.in_smm = smm;
      return 0;
    }
    case KVM_GET_NESTED_STATE: {
      if (vcpu.nested.empty()) {
        at<kvm_nested_state>(argument).size = sizeof(kvm_nested_state);
      } else {
        std::memcpy(&at<char>(argument), vcpu.nested.data(), vcpu.nested.size());
      }
      return 0;
    }
    case KVM_SET_NESTED_STATE: {  // vmx_set_nested_state
      const auto& state = at<kvm_nested_state>(argument);
      if (!vcpu.in_smm && state.hdr.vmx.smm.flags != 0) return -EINVAL;
      if (vcpu.in_smm && (state.flags & KVM_STATE_NESTED_GUEST_MODE) != 0) return -EINVAL;
      vcpu.nested.assign(&at<char>(argument), sizeof state);
      return 0;
    }
    case KVM_SET_LAPIC: vcpu.lapic_set = true; return 0;
    case KVM_KVMCLOCK_CTRL: return -EINVAL;
    default: return 0;
  }
}

bool FakeKvm::play(TapeDraft& tape) {
  std::vector<uint8_t> bytes(tape.bytes());
  const std::vector<uint8_t> placed = tape.lay_out(reinterpret_cast<uint64_t>(bytes.data()), Tape{});
  std::copy(placed.begin(), placed.end(), bytes.begin());
  auto& head = at<Tape>(reinterpret_cast<unsigned long>(bytes.data()));
  std::map<int, int> placed_at;  // descriptors by the numbers that the tape wants them at
  auto real = [&](uint64_t fd) {
    auto found = placed_at.find(static_cast<int>(fd));
    return found == placed_at.end() ? static_cast<int>(fd) : found->second;
  };
  bool all = true;
  for (uint32_t i = 0; i < head.calls && all; ++i) {
    TapeCall& call = head.call[i];
    const auto fd = real(call.args[0]);
    if (call.number == SYS_ioctl) {
      call.result = ioctl(fd, call.args[1], call.args[2]);
    } else if (call.number == kOpMakeDescriptor) {
      call.result = ioctl(fd, call.args[1], call.args[2]);
      placed_at[static_cast<int>(call.args[3])] = static_cast<int>(call.result);
    } else if (call.number == kOpSetMsrs) {  // modules/played/kvm_msrs.cc
      FakeVcpu& vcpu = vcpus.at(fd);
      auto& list = at<kvm_msrs>(call.args[1]);
      for (uint32_t n = 0; n < list.nmsrs && call.result == 0; ++n) {
        const kvm_msr_entry& entry = list.entries[n];
        const uint64_t* value = find_msr(vcpu, entry.index);
        if (set_msr(vcpu, entry.index, entry.data) || (value != nullptr && *value == entry.data)) continue;
        if (entry.reserved == kMsrHidden || (entry.reserved == kMsrFresh && value == nullptr)) continue;
        call.args[5] = entry.index;
        call.result = -EINVAL;
      }
    } else if (call.number == kOpSubtractTsc) {
      for (uint64_t n = 0; n < call.args[1]; ++n) at<uint64_t>(call.args[0] + n * sizeof(uint64_t)) -= host_tsc;
    } else if (call.number == kOpAdd) {
      memory_added[call.args[0]] += call.args[1];
    }
    if (call.result < 0 && (call.flags & kTapeMustSucceed) != 0) {
      failed = call;
      head.failed = i + 1;
      all = false;
    }
  }
  head.done = 1;
  (void)tape.read_back(bytes);
  return all;
}

}  // namespace vmckpt
