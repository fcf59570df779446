#include "modules/host.h"

#include <algorithm>
#include <set>

#include <sys/utsname.h>

#include "core/fd.h"
#include "core/proc.h"
#include "modules/module.h"

namespace vmckpt {
namespace {

// The first processor's entry of /proc/cpuinfo: all of them are alike on the hosts that we know.
std::string_view cpuinfo_field(const std::string& text, std::string_view name) {
  for (std::string_view line : split_lines(text)) {
    if (!line.starts_with(name)) continue;
    size_t colon = line.find(": ");
    if (colon != std::string_view::npos) return line.substr(colon + 2);
  }
  return {};
}

// Flags that no program chooses its code by, or that come and go with the kernel's configuration.
bool matters(std::string_view flag) {
  static const std::set<std::string_view> kKernelsOwn = {
      "constant_tsc", "nonstop_tsc", "rep_good",  "nopl",  "xtopology",    "cpuid",   "tsc_known_freq", "hypervisor",
      "arch_perfmon", "pti",         "ssbd",      "ibrs",  "ibpb",         "stibp",   "ibrs_enhanced",  "tpr_shadow",
      "flexpriority", "ept",         "vpid",      "arat",  "md_clear",     "flush_l1d", "arch_capabilities",
      "vnmi",         "aperfmperf",  "art",       "tsc_reliable", "tsc_deadline_timer", "tsc_adjust", "cpuid_fault"};
  return !kKernelsOwn.contains(flag);
}

uint64_t enabled_xstate_features() {
  uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

std::string this_boot_id() {
  auto text = read_whole_file("/proc/sys/kernel/random/boot_id");
  return text.ok() ? text->substr(0, text->find('\n')) : std::string();
}

}  // namespace

void save_host(pb::Host* host) {
  utsname name{};
  ::uname(&name);
  host->set_kernel_release(name.release);
  host->set_vmckpt_version(VMCKPT_VERSION);
  host->set_xstate_features(enabled_xstate_features());
  if (auto text = read_whole_file("/proc/cpuinfo"); text.ok()) {
    host->set_cpu_model(std::string(cpuinfo_field(*text, "model name")));
    for (std::string_view flag : split_words(cpuinfo_field(*text, "flags"))) host->add_cpu_flags(std::string(flag));
  }
  host->set_boot_id(this_boot_id());
}

bool is_this_boot(const pb::Host& host) { return !host.boot_id().empty() && host.boot_id() == this_boot_id(); }

namespace {

void check_host(const pb::Host& host, CpuCheck cpu_check, std::vector<Error>& problems, std::vector<std::string>& notes) {
  uint64_t missing_features = host.xstate_features() & ~enabled_xstate_features();
  if (missing_features != 0) {
    problems.push_back(error(fmt::format("this processor lacks extended state features {:#x} that the registers were saved with",
                                         missing_features),
                             "restart on a processor like \"" + host.cpu_model() + "\""));
  }
  auto text = read_whole_file("/proc/cpuinfo");
  if (!text.ok()) return;
  std::set<std::string_view> here;
  for (std::string_view flag : split_words(cpuinfo_field(*text, "flags"))) here.insert(flag);
  std::string missing;
  for (const std::string& flag : host.cpu_flags()) {
    if (matters(flag) && !here.contains(flag)) missing += (missing.empty() ? "" : " ") + flag;
  }
  if (missing.empty()) return;
  std::string what = fmt::format("this processor lacks flags of the one that the image was made on: {}", missing);
  if (cpu_check == CpuCheck::kStrict) {
    problems.push_back(error(what, "restart on a processor that has them, or pass --cpu-check=none if the program uses none"));
  } else {
    notes.push_back(what);
  }
}

void check(Preflight& preflight) { check_host(preflight.image.host(), preflight.cpu_check, preflight.problems, preflight.notes); }

}  // namespace

extern const StateModule kHostModule{.name = "host", .check = check};

}  // namespace vmckpt
