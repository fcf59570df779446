// What this host's KVM can do, and whether it is enough for a guest that another host's KVM has run.
#include <algorithm>
#include <cstring>

#include <cpuid.h>
#include <fcntl.h>
#include <sys/ioctl.h>

#include "core/kvm_api.h"
#include "modules/kvm.h"
#include "recorder/kvm_calls.h"

namespace vmckpt {
namespace {


struct FeatureWord {  // a register of CPUID whose bits are features
  uint32_t leaf;
  uint32_t index;
  const char* name;
  uint32_t kvm_cpuid_entry2::*bits;
};

// Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E; Documentation/virt/kvm/x86/cpuid.rst.
constexpr FeatureWord kFeatureWords[] = {
    {0x1, 0, "ecx", &kvm_cpuid_entry2::ecx},        {0x1, 0, "edx", &kvm_cpuid_entry2::edx},
    {0x7, 0, "ebx", &kvm_cpuid_entry2::ebx},        {0x7, 0, "ecx", &kvm_cpuid_entry2::ecx},
    {0x7, 0, "edx", &kvm_cpuid_entry2::edx},        {0x7, 1, "eax", &kvm_cpuid_entry2::eax},
    {0xd, 0, "eax", &kvm_cpuid_entry2::eax},        {0xd, 1, "eax", &kvm_cpuid_entry2::eax},
    {0x80000001, 0, "ecx", &kvm_cpuid_entry2::ecx}, {0x80000001, 0, "edx", &kvm_cpuid_entry2::edx},
    {0x40000001, 0, "eax", &kvm_cpuid_entry2::eax},
};

uint32_t bits_of(const std::vector<kvm_cpuid_entry2>& entries, const FeatureWord& word) {
  for (const kvm_cpuid_entry2& entry : entries) {
    if (entry.function == word.leaf && entry.index == word.index) return entry.*word.bits;
  }
  return 0;
}

std::vector<kvm_cpuid_entry2> entries_in(const std::string& bytes) {
  std::vector<kvm_cpuid_entry2> entries(bytes.size() / sizeof(kvm_cpuid_entry2));
  if (!entries.empty()) std::memcpy(entries.data(), bytes.data(), entries.size() * sizeof(kvm_cpuid_entry2));
  return entries;
}

}  // namespace

size_t most_xsave_bytes() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  __get_cpuid_count(0xd, 0, &eax, &ebx, &ecx, &edx);
  return std::max<size_t>(kPlainXsaveBytes, ecx);
}

Result<std::shared_ptr<KvmHost>> KvmHost::ask() {
  return ask(VMCKPT_TRY(open_file("/dev/kvm", O_RDWR)),
             [](int fd, unsigned long request, unsigned long argument) { return ::ioctl(fd, request, argument); });
}

Result<std::shared_ptr<KvmHost>> KvmHost::ask(Fd device, KvmDoor call) {
  auto host = std::make_shared<KvmHost>();
  host->device = std::move(device);
  host->call = std::move(call);
  auto ask = [&](unsigned long request, void* room) {
    return host->call(host->device.get(), request, reinterpret_cast<unsigned long>(room));
  };
  auto capability = [&](unsigned long number) { return host->call(host->device.get(), KVM_CHECK_EXTENSION, number); };
  const int run_bytes = ask(KVM_GET_VCPU_MMAP_SIZE, nullptr);
  if (run_bytes <= 0) return errno_error("ask KVM for the size of kvm_run");
  host->run_bytes = static_cast<size_t>(run_bytes);
  host->has_xsave2 = capability(KVM_CAP_XSAVE2) > 0;
  host->xsave_bytes = host->has_xsave2 ? most_xsave_bytes() : kPlainXsaveBytes;
  host->has_sregs2 = capability(KVM_CAP_SREGS2) > 0;
  host->has_tsc_offset = capability(KVM_CAP_VCPU_ATTRIBUTES) > 0;
  if (int nested = capability(KVM_CAP_NESTED_STATE); nested > 0) host->nested_bytes = static_cast<size_t>(nested);
  constexpr int kOneReg = 70;  // KVM_CAP_ONE_REG; on x86 from Linux 6.18 on
  host->has_one_reg = capability(kOneReg) > 0;
  kvm_msr_list count{};
  ask(KVM_GET_MSR_INDEX_LIST, &count);  // E2BIG, with the number
  std::vector<uint32_t> list(count.nmsrs + 1);
  list[0] = count.nmsrs;
  if (ask(KVM_GET_MSR_INDEX_LIST, list.data()) != 0) return errno_error("ask KVM for its list of MSRs");
  host->msrs.assign(list.begin() + 1, list.begin() + 1 + list[0]);
  // As many entries as any KVM has (KVM_MAX_CPUID_ENTRIES).
  constexpr size_t kMaxEntries = 256;
  std::vector<uint8_t> supported(sizeof(kvm_cpuid2) + kMaxEntries * sizeof(kvm_cpuid_entry2));
  auto* cpuid = reinterpret_cast<kvm_cpuid2*>(supported.data());
  cpuid->nent = kMaxEntries;
  if (ask(KVM_GET_SUPPORTED_CPUID, cpuid) != 0) return errno_error("ask KVM for the CPUID that it supports");
  host->cpuid.assign(cpuid->entries, cpuid->entries + cpuid->nent);
  return host;
}

uint32_t KvmHost::tsc_khz() const {
  const Fd vm(call(device.get(), KVM_CREATE_VM, 0));
  const Fd vcpu(vm.valid() ? call(vm.get(), KVM_CREATE_VCPU, 0) : -1);
  const int khz = vcpu.valid() ? call(vcpu.get(), KVM_GET_TSC_KHZ, 0) : -1;
  return khz > 0 ? static_cast<uint32_t>(khz) : 0;
}

bool KvmHost::can_scale_tsc() const { return call(device.get(), KVM_CHECK_EXTENSION, KVM_CAP_TSC_CONTROL) > 0; }

// A guest that tells the time by the TSC measured its frequency once, when it booted.
void check_guest_tsc(const pb::Kvm& kvm, const KvmHost& host, CpuCheck cpu_check, std::vector<Error>& problems,
                     std::vector<std::string>& notes) {
  for (const pb::KvmObject& object : kvm.objects()) {
    const uint32_t guest_khz = object.vcpu().tsc_khz();
    if (guest_khz == 0) continue;
    const uint32_t host_khz = host.tsc_khz();
    const uint32_t difference = guest_khz > host_khz ? guest_khz - host_khz : host_khz - guest_khz;
    // 250 of a million: what KVM itself takes for the same (its parameter tsc_tolerance_ppm).
    if (host_khz == 0 || host.can_scale_tsc() || uint64_t{difference} * 1'000'000 <= uint64_t{guest_khz} * 250) return;
    const std::string what = fmt::format("the guest's TSC runs at {} kHz and this host's at {} kHz, which it cannot scale",
                                         guest_khz, host_khz);
    if (cpu_check == CpuCheck::kNone) {
      notes.push_back(what);
    } else {
      problems.push_back(
          error(what, "restart on a host of that frequency, or pass --cpu-check=none if the guest uses kvmclock only"));
    }
    return;  // vCPUs are alike
  }
}

// A VMM may show its guest bits that KVM does not list (x2APIC, a hypervisor's own): only what the old host listed and this one
// does not can be missed.
void check_guest_cpuid(const pb::Kvm& kvm, const KvmHost& host, CpuCheck cpu_check, std::vector<Error>& problems,
                       std::vector<std::string>& notes) {
  std::vector<kvm_cpuid_entry2> old_host;
  for (const std::string& entry : kvm.host_cpuid()) {
    for (const kvm_cpuid_entry2& one : entries_in(entry)) old_host.push_back(one);
  }
  for (const pb::KvmRecord& record : kvm.records()) {
    if (record.request() != KVM_SET_CPUID2 || record.payload().size() < sizeof(kvm_cpuid2)) continue;
    const auto guest = entries_in(record.payload().substr(sizeof(kvm_cpuid2)));
    std::string missing;
    for (const FeatureWord& word : kFeatureWords) {
      const uint32_t lacking = bits_of(guest, word) & bits_of(old_host, word) & ~bits_of(host.cpuid, word);
      for (int bit = 0; bit < 32; ++bit) {
        if (lacking >> bit & 1)
          missing += fmt::format("{}CPUID {:#x}.{} {} bit {}", missing.empty() ? "" : ", ", word.leaf, word.index, word.name,
                                 bit);
      }
    }
    if (missing.empty()) continue;
    const std::string what = "this host's KVM lacks features that the guest was shown: " + missing;
    if (cpu_check == CpuCheck::kNone) {
      notes.push_back(what);
    } else {
      problems.push_back(error(what, "restart on a host that has them, or pass --cpu-check=none if the guest uses none"));
    }
    return;  // vCPUs are alike
  }
}

}  // namespace vmckpt
