// Which model-specific registers a vCPU is asked for, and which of them a guest would miss.
//
// KVM_GET_MSR_INDEX_LIST does not name all that KVM_GET_MSRS and KVM_SET_MSRS know (arch/x86/kvm/x86.c, kvm_get_msr_common):
// memory type ranges, machine-check banks, the SGX launch key, and most of Hyper-V's synthetic interrupt controller and timers
// are left out. They are asked for by number.
//
// What one vCPU has depends on its CPUID and its machine checks, and a list that KVM is asked to read ends at the first register
// that it refuses. So before the target is frozen, a vCPU of a VM of our own, which gets the same CPUID and machine checks, is
// asked one register after the other. It also tells what a new vCPU has in them: a register that still has that is no loss on a
// host whose KVM does not know it, nor is one whose feature the guest was never shown.
#include <algorithm>
#include <cstring>
#include <iterator>

#include "modules/kvm.h"
#include "recorder/kvm_calls.h"

namespace vmckpt {
namespace {

struct MsrRange {
  uint32_t first, last, step;
};

// Intel SDM volume 4; AMD APM volume 2, appendix A; include/hyperv/hvgdk.h.
constexpr MsrRange kUnlisted[] = {
    {0x8b, 0x8b, 1},                       // microcode revision
    {0x8c, 0x8f, 1},                       // SGX: hash of the launch enclave's key
    {0x200, 0x20f, 1},                     // MTRRs: eight variable ranges
    {0x250, 0x250, 1}, {0x258, 0x259, 1}, {0x268, 0x26f, 1}, {0x2ff, 0x2ff, 1},  // fixed ones, and what is between
    {0x277, 0x277, 1},                     // PAT
    {0xc0010140, 0xc0010141, 1},           // AMD: errata that the hypervisor works around
};
// Only where KVM lists the one that stands for them.
constexpr uint32_t kSynicControl = 0x40000080, kSynicTimer0 = 0x400000b0;
constexpr MsrRange kSynic[] = {{0x40000082, 0x40000083, 1}, {0x40000090, 0x4000009f, 1}};  // SIEFP, SIMP, SINT0 to 15
// Each timer's configuration before its count: a count that is set may turn the timer on (stimer_set_count).
constexpr MsrRange kSynicTimers[] = {{0x400000b0, 0x400000b7, 1}};

constexpr uint32_t kMceControls = 0x400, kMceControls2 = 0x280;

void add(std::vector<uint32_t>& list, const MsrRange& range) {
  for (uint32_t index = range.first; index <= range.last; index += range.step) list.push_back(index);
}

// What in its CPUID shows a guest that it has a register (Intel SDM volume 4, "if CPUID.01H:ECX[5] = 1" and the like).
struct FeatureOfMsrs {
  uint32_t first, last;
  uint32_t leaf, index;
  uint32_t kvm_cpuid_entry2::*word;
  uint32_t any_of;  // bits
};
constexpr FeatureOfMsrs kFeatures[] = {
    {0x3a, 0x3a, 0x1, 0, &kvm_cpuid_entry2::ecx, 1u << 5 | 1u << 6},       // feature control: VMX, SMX (or SGX)
    {0x3b, 0x3b, 0x7, 0, &kvm_cpuid_entry2::ebx, 1u << 1},                 // TSC_ADJUST
    {0x48, 0x48, 0x7, 0, &kvm_cpuid_entry2::edx, 1u << 26 | 1u << 27 | 1u << 31},  // SPEC_CTRL
    {0x48, 0x48, 0x80000008, 0, &kvm_cpuid_entry2::ebx, 1u << 14 | 1u << 15 | 1u << 24},
    {0x8c, 0x8f, 0x7, 0, &kvm_cpuid_entry2::ecx, 1u << 30},                // SGX launch control
    {0xe1, 0xe1, 0x7, 0, &kvm_cpuid_entry2::ecx, 1u << 5},                 // WAITPKG
    {0xc1, 0xc8, 0xa, 0, &kvm_cpuid_entry2::eax, 0xff},                    // performance counters: their version
    {0x10a, 0x10a, 0x7, 0, &kvm_cpuid_entry2::edx, 1u << 29},              // ARCH_CAPABILITIES
    {0x122, 0x122, 0x7, 0, &kvm_cpuid_entry2::edx, 1u << 29},              // TSX_CTRL, which ARCH_CAPABILITIES announces
    {0x17a, 0x17b, 0x1, 0, &kvm_cpuid_entry2::edx, 1u << 14},              // machine checks
    {0x186, 0x18d, 0xa, 0, &kvm_cpuid_entry2::eax, 0xff},
    {0x1c4, 0x1c5, 0xd, 1, &kvm_cpuid_entry2::eax, 1u << 4},               // XFD
    {0x200, 0x26f, 0x1, 0, &kvm_cpuid_entry2::edx, 1u << 12},              // MTRRs
    {0x277, 0x277, 0x1, 0, &kvm_cpuid_entry2::edx, 1u << 16},              // PAT
    {0x280, 0x29f, 0x1, 0, &kvm_cpuid_entry2::edx, 1u << 14},
    {0x2ff, 0x2ff, 0x1, 0, &kvm_cpuid_entry2::edx, 1u << 12},
    {0x309, 0x30c, 0xa, 0, &kvm_cpuid_entry2::eax, 0xff},
    {0x345, 0x345, 0x1, 0, &kvm_cpuid_entry2::ecx, 1u << 15},              // PERF_CAPABILITIES
    {0x38d, 0x390, 0xa, 0, &kvm_cpuid_entry2::eax, 0xff},
    {0x3f1, 0x3f2, 0x1, 0, &kvm_cpuid_entry2::edx, 1u << 21},              // debug store
    {0x400, 0x47f, 0x1, 0, &kvm_cpuid_entry2::edx, 1u << 14},
    {0x480, 0x493, 0x1, 0, &kvm_cpuid_entry2::ecx, 1u << 5},               // VMX
    {0x4c1, 0x4c8, 0xa, 0, &kvm_cpuid_entry2::eax, 0xff},
    {0x4d0, 0x4d0, 0x1, 0, &kvm_cpuid_entry2::edx, 1u << 14},
    {0x560, 0x587, 0x7, 0, &kvm_cpuid_entry2::ebx, 1u << 25},              // processor trace
    {0x6a0, 0x6a0, 0x7, 0, &kvm_cpuid_entry2::ecx, 1u << 7},               // CET: shadow stacks
    {0x6a0, 0x6a0, 0x7, 0, &kvm_cpuid_entry2::edx, 1u << 20},              // ... indirect branch tracking
    {0x6a2, 0x6a2, 0x7, 0, &kvm_cpuid_entry2::ecx, 1u << 7},
    {0x6a2, 0x6a2, 0x7, 0, &kvm_cpuid_entry2::edx, 1u << 20},
    {0x6a4, 0x6a8, 0x7, 0, &kvm_cpuid_entry2::ecx, 1u << 7},
    {0x6e0, 0x6e0, 0x1, 0, &kvm_cpuid_entry2::ecx, 1u << 24},              // TSC deadline
    {0x6e1, 0x6e1, 0x7, 0, &kvm_cpuid_entry2::ecx, 1u << 31},              // PKS
    {0xd90, 0xd90, 0x7, 0, &kvm_cpuid_entry2::ebx, 1u << 14},              // MPX
    {0xda0, 0xda0, 0xd, 1, &kvm_cpuid_entry2::eax, 1u << 3},               // XSAVES
    {0x14ce, 0x14cf, 0x7, 1, &kvm_cpuid_entry2::eax, 1u << 22},            // LBR
    {0xc0000102, 0xc0000102, 0x80000001, 0, &kvm_cpuid_entry2::edx, 1u << 29},  // long mode
    {0xc0000103, 0xc0000103, 0x80000001, 0, &kvm_cpuid_entry2::edx, 1u << 27},  // RDTSCP
    {0xc0000103, 0xc0000103, 0x7, 0, &kvm_cpuid_entry2::ecx, 1u << 22},         // RDPID
    {0xc0000104, 0xc0000104, 0x8000000a, 0, &kvm_cpuid_entry2::edx, 1u << 4},   // SVM's TSC ratio
    {0xc0000300, 0xc0000303, 0x80000022, 0, &kvm_cpuid_entry2::eax, 1u << 0},   // AMD's second performance monitoring
    {0xc0010114, 0xc0010117, 0x80000001, 0, &kvm_cpuid_entry2::ecx, 1u << 2},   // SVM
    {0xc0010140, 0xc0010141, 0x80000001, 0, &kvm_cpuid_entry2::ecx, 1u << 9},   // OSVW
    {0xc0010200, 0xc001020b, 0x80000001, 0, &kvm_cpuid_entry2::ecx, 1u << 23},  // AMD's extended counters
    {0xc001011f, 0xc001011f, 0x80000008, 0, &kvm_cpuid_entry2::ebx, 1u << 25},  // VIRT_SSBD
};

// The hypervisor that the guest was shown, at 0x40000000 or, where there are two, at 0x40000100.
constexpr uint32_t kHypervisor = 0x40000000, kSecondHypervisor = 0x40000100;
constexpr uint32_t kSaysHyperV = 0x31237648;  // "Hv#1", eax of the leaf after it

std::vector<kvm_cpuid_entry2> entries_of(const std::string& cpuid) {
  std::vector<kvm_cpuid_entry2> entries;
  if (cpuid.size() <= sizeof(kvm_cpuid2)) return entries;
  entries.resize((cpuid.size() - sizeof(kvm_cpuid2)) / sizeof(kvm_cpuid_entry2));
  std::memcpy(entries.data(), cpuid.data() + sizeof(kvm_cpuid2), entries.size() * sizeof(kvm_cpuid_entry2));
  return entries;
}

unsigned long address_of(const std::string& bytes) { return reinterpret_cast<unsigned long>(bytes.data()); }

std::string without_extended_state(const std::string& cpuid) {
  constexpr uint32_t kExtendedState = 0xd;
  std::string less(sizeof(kvm_cpuid2), '\0');
  uint32_t count = 0;
  for (const kvm_cpuid_entry2& entry : entries_of(cpuid)) {
    if (entry.function == kExtendedState) continue;
    less.append(reinterpret_cast<const char*>(&entry), sizeof entry);
    ++count;
  }
  std::memcpy(less.data(), &count, sizeof count);
  return less;
}

bool shows(const std::vector<kvm_cpuid_entry2>& guest, uint32_t leaf, uint32_t index, uint32_t kvm_cpuid_entry2::*word,
           uint32_t any_of) {
  return std::any_of(guest.begin(), guest.end(), [&](const kvm_cpuid_entry2& entry) {
    return entry.function == leaf && entry.index == index && (entry.*word & any_of) != 0;
  });
}

bool shows_hyper_v(const std::vector<kvm_cpuid_entry2>& guest) {
  return std::any_of(guest.begin(), guest.end(),
                     [](const kvm_cpuid_entry2& entry) { return entry.function == kHypervisor + 1 && entry.eax == kSaysHyperV; });
}

bool shows_kvm(const std::vector<kvm_cpuid_entry2>& guest) {
  constexpr uint32_t kSaysKvm = 0x4b4d564b;  // "KVMK", ebx
  return std::any_of(guest.begin(), guest.end(), [](const kvm_cpuid_entry2& entry) {
    return (entry.function == kHypervisor || entry.function == kSecondHypervisor) && entry.ebx == kSaysKvm;
  });
}

}  // namespace

bool guest_may_see(const std::string& cpuid, uint32_t msr) {
  const std::vector<kvm_cpuid_entry2> guest = entries_of(cpuid);
  if (guest.empty()) return true;
  if (msr >= 0x40000000 && msr <= 0x400001ff) return shows_hyper_v(guest);
  if (msr >= 0x4b564d00 && msr <= 0x4b564dff) return shows_kvm(guest);
  bool is_known = false;
  for (const FeatureOfMsrs& feature : kFeatures) {
    if (msr < feature.first || msr > feature.last) continue;
    is_known = true;
    if (shows(guest, feature.leaf, feature.index, feature.word, feature.any_of)) return true;
  }
  return !is_known;
}

std::vector<uint32_t> msrs_to_ask(const KvmHost& host, const std::string& machine_checks) {
  std::vector<uint32_t> list = host.msrs;
  for (const MsrRange& range : kUnlisted) add(list, range);
  auto is_listed = [&](uint32_t index) { return std::find(host.msrs.begin(), host.msrs.end(), index) != host.msrs.end(); };
  if (is_listed(kSynicControl)) for (const MsrRange& range : kSynic) add(list, range);
  if (is_listed(kSynicTimer0)) for (const MsrRange& range : kSynicTimers) add(list, range);
  uint64_t capability = 0;
  if (machine_checks.size() == sizeof capability) std::memcpy(&capability, machine_checks.data(), sizeof capability);
  if (const auto banks = static_cast<uint32_t>(capability & 0xff); banks != 0) {
    add(list, {kMceControls, kMceControls + 4 * banks - 1, 1});
    add(list, {kMceControls2, kMceControls2 + banks - 1, 1});
  }
  // Once each, and in this order: some want others before them.
  std::vector<uint32_t> once;
  for (uint32_t index : list) {
    if (std::find(once.begin(), once.end(), index) == once.end()) once.push_back(index);
  }
  return once;
}

std::string msr_list(const std::vector<uint32_t>& indices) {
  std::string list(sizeof(kvm_msrs) + indices.size() * sizeof(kvm_msr_entry), '\0');
  const auto count = static_cast<uint32_t>(indices.size());
  std::memcpy(list.data(), &count, sizeof count);
  for (size_t i = 0; i < indices.size(); ++i) {
    const kvm_msr_entry entry{indices[i], 0, 0};
    std::memcpy(list.data() + sizeof(kvm_msrs) + i * sizeof entry, &entry, sizeof entry);
  }
  return list;
}

const KnownMsrs& KvmHost::known_msrs(const std::string& cpuid, const std::string& machine_checks) {
  auto [place, is_new] = known.try_emplace(cpuid + machine_checks);
  if (!is_new) return place->second;
  KnownMsrs& msrs = place->second;
  const std::vector<uint32_t> candidates = msrs_to_ask(*this, machine_checks);
  const Fd vm(call(device.get(), KVM_CREATE_VM, 0));
  const Fd vcpu(vm.valid() ? call(vm.get(), KVM_CREATE_VCPU, 0) : -1);
  if (!vcpu.valid()) {
    msrs.readable = this->msrs;
    return msrs;
  }
  // Refused where the guest has more extended state than this process may give its guests (AMX), which no register here depends
  // on.
  if (!cpuid.empty() && call(vcpu.get(), KVM_SET_CPUID2, address_of(cpuid)) != 0) {
    const std::string less = without_extended_state(cpuid);
    call(vcpu.get(), KVM_SET_CPUID2, address_of(less));
  }
  if (!machine_checks.empty()) call(vcpu.get(), KVM_X86_SETUP_MCE, address_of(machine_checks));
  for (uint32_t index : candidates) {
    std::string one = msr_list({index});
    if (call(vcpu.get(), KVM_GET_MSRS, address_of(one)) != 1) continue;
    msrs.readable.push_back(index);
    kvm_msr_entry entry;
    std::memcpy(&entry, one.data() + sizeof(kvm_msrs), sizeof entry);
    msrs.fresh[index] = entry.data;
  }
  return msrs;
}

}  // namespace vmckpt
