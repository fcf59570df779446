#include "modules/credentials.h"

#include <algorithm>
#include <iterator>

#include <linux/capability.h>
#include <linux/securebits.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core/fd.h"
#include "modules/seccomp.h"

namespace vmckpt {
namespace {

constexpr uint64_t kLastCapability = 40;  // CAP_CHECKPOINT_RESTORE, Linux 5.9

// In the order of linux/capability.h.
constexpr const char* kCapabilityNames[] = {
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP", "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO",
    "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME",
    "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG",
    "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE"};
static_assert(std::size(kCapabilityNames) == kLastCapability + 1);

void save_ids(std::string_view field, google::protobuf::RepeatedField<uint32_t>* ids) {
  for (std::string_view word : split_words(field)) ids->Add(static_cast<uint32_t>(parse_number(word)));
}

std::vector<uint32_t> ids_of(std::string_view field) {
  std::vector<uint32_t> ids;
  for (std::string_view word : split_words(field)) ids.push_back(static_cast<uint32_t>(parse_number(word)));
  return ids;
}

std::vector<uint32_t> sorted(std::vector<uint32_t> ids) {
  std::sort(ids.begin(), ids.end());
  return ids;
}

bool same_ids(const google::protobuf::RepeatedField<uint32_t>& saved, const std::vector<uint32_t>& now) {
  return std::equal(saved.begin(), saved.end(), now.begin(), now.end());
}

bool same_groups(const pb::Credentials& saved, const StatusFields& status) {
  return sorted({saved.groups().begin(), saved.groups().end()}) == sorted(ids_of(status_field(status, "Groups")));
}

std::string list_ids(const google::protobuf::RepeatedField<uint32_t>& ids) {
  std::string text;
  for (uint32_t id : ids) text += fmt::format("{}{}", text.empty() ? "" : ", ", id);
  return text.empty() ? "none" : text;
}

}  // namespace

bool has_capability(int capability) {
  auto status = read_status(::getpid(), static_cast<pid_t>(::syscall(SYS_gettid)));
  return status.ok() && (status_hex(*status, "CapEff") >> capability & 1);
}

bool may_set_groups() {
  auto rule = read_whole_file("/proc/self/setgroups");
  return has_capability(CAP_SETGID) && !(rule.ok() && rule->starts_with("deny"));
}

std::string capability_names(uint64_t capabilities) {
  std::string text;
  for (uint64_t i = 0; i <= kLastCapability; ++i) {
    if (capabilities >> i & 1) text += fmt::format("{}CAP_{}", text.empty() ? "" : ", ", kCapabilityNames[i]);
  }
  return text;
}

FileAccess file_access_of(const pb::Credentials& credentials, FilePolicy policy) {
  if (credentials.uid_size() != 4 || credentials.gid_size() != 4) return FileAccess(policy);
  const FileRights rights{credentials.uid(3), credentials.gid(3), {credentials.groups().begin(), credentials.groups().end()},
                          credentials.capabilities_effective()};
  return FileAccess(rights, policy);
}

void save_credentials(const StatusFields& status, pb::Credentials* saved) {
  save_ids(status_field(status, "Uid"), saved->mutable_uid());
  save_ids(status_field(status, "Gid"), saved->mutable_gid());
  save_ids(status_field(status, "Groups"), saved->mutable_groups());
  saved->set_capabilities_inheritable(status_hex(status, "CapInh"));
  saved->set_capabilities_permitted(status_hex(status, "CapPrm"));
  saved->set_capabilities_effective(status_hex(status, "CapEff"));
  saved->set_capabilities_bounding(status_hex(status, "CapBnd"));
  saved->set_capabilities_ambient(status_hex(status, "CapAmb"));
  saved->set_no_new_privileges(status_number(status, "NoNewPrivs") != 0);
}

Result<void> check_credentials(const pb::Thread& thread, std::vector<std::string>& notes) {
  const pb::Credentials& saved = credentials_of(thread);
  if (saved.uid_size() != 4 || saved.gid_size() != 4) return error("the image has no user and group ids");
  const StatusFields mine = VMCKPT_TRY(read_status(::getpid()));
  if (!same_ids(saved.uid(), ids_of(status_field(mine, "Uid"))) && !has_capability(CAP_SETUID)) {
    for (uint32_t uid : saved.uid()) {
      if (uid == ::geteuid()) continue;
      return error(fmt::format("the image's process ran as user {}, you are user {}", uid, ::geteuid()),
                   "restart it as that user, or as root");
    }
  }
  if (!same_ids(saved.gid(), ids_of(status_field(mine, "Gid"))) && !has_capability(CAP_SETGID)) {
    for (uint32_t gid : saved.gid()) {
      if (gid == ::getegid()) continue;
      return error(fmt::format("the image's process ran with group {}, yours is {}", gid, ::getegid()),
                   fmt::format("use `sg` or `newgrp` to restart it with group {}", gid));
    }
  }
  if (!same_groups(saved, mine) && !may_set_groups()) {
    notes.push_back(fmt::format("the process had the supplementary groups {}, it goes on with yours: you may not set others",
                                list_ids(saved.groups())));
  }
  return {};
}

void note_lost_capabilities(const pb::Thread& thread, bool in_own_user_namespace, std::vector<std::string>& notes) {
  auto mine = read_status(::getpid());
  if (!mine.ok()) return;
  const pb::Credentials& saved = credentials_of(thread);
  const uint64_t wanted = saved.capabilities_permitted() | saved.capabilities_inheritable();
  const uint64_t lost = wanted & ~status_hex(*mine, "CapPrm");
  if (lost != 0)
    notes.push_back("the process goes on without capabilities that restart does not have: " + capability_names(lost));
  if (!filters_of(thread).empty() && !saved.no_new_privileges() && !has_capability(CAP_SYS_ADMIN)) {
    notes.push_back("the process has no_new_privs now: without CAP_SYS_ADMIN its seccomp filters cannot be installed otherwise");
  }
  if (in_own_user_namespace && saved.capabilities_effective() != 0) {
    notes.push_back("the process is in a user namespace of its own: its capabilities hold only there");
  }
}

Result<void> plan_credentials(const pb::Thread& thread, TapeDraft& tape) {
  const pb::Credentials& saved = credentials_of(thread);
  const StatusFields mine = VMCKPT_TRY(read_status(::getpid()));
  const bool to_root = saved.uid(1) == 0;
  // Capabilities that leave the bounding set must go while CAP_SETPCAP is still there.
  const uint64_t bounding = status_hex(mine, "CapBnd");
  for (uint64_t capability = 0; capability <= kLastCapability; ++capability) {
    const bool leaves = (bounding & ~saved.capabilities_bounding()) >> capability & 1;
    if (leaves) tape.call(SYS_prctl, {PR_CAPBSET_DROP, capability, 0, 0, 0});
  }
  // Needs CAP_SETPCAP too. Also to none: restart may have some of its own.
  if (saved.securebits() != static_cast<uint32_t>(::prctl(PR_GET_SECUREBITS)))
    tape.call(SYS_prctl, {PR_SET_SECUREBITS, saved.securebits(), 0, 0, 0});
  if (!same_groups(saved, mine) && may_set_groups()) {
    std::vector<uint32_t> groups(saved.groups().begin(), saved.groups().end());
    tape.call(SYS_setgroups, {groups.size(), tape.data(groups.data(), groups.size() * sizeof(uint32_t))}, true,
              fmt::format("set the supplementary groups {} of thread {}", list_ids(saved.groups()), thread.tid()));
  }
  if (!same_ids(saved.gid(), ids_of(status_field(mine, "Gid")))) {
    tape.call(SYS_setresgid, {saved.gid(0), saved.gid(1), saved.gid(2)}, true,
              fmt::format("set the group ids {} of thread {}", list_ids(saved.gid()), thread.tid()));
    tape.call(SYS_setfsgid, {saved.gid(3)});
  }
  if (!same_ids(saved.uid(), ids_of(status_field(mine, "Uid")))) {
    // Without this, leaving user 0 would clear capabilities that the image may say were kept.
    if (!to_root) tape.call(SYS_prctl, {PR_SET_KEEPCAPS, 1, 0, 0, 0});
    tape.call(SYS_setresuid, {saved.uid(0), saved.uid(1), saved.uid(2)}, true,
              fmt::format("set the user ids {} of thread {}", list_ids(saved.uid()), thread.tid()));
    tape.call(SYS_setfsuid, {saved.uid(3)});
  }
  struct {
    __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  } head;
  const uint64_t available = status_hex(mine, "CapPrm");
  __user_cap_data_struct data[2];
  for (int word = 0; word < 2; ++word) {
    data[word].effective = static_cast<uint32_t>((saved.capabilities_effective() & available) >> (32 * word));
    data[word].permitted = static_cast<uint32_t>((saved.capabilities_permitted() & available) >> (32 * word));
    data[word].inheritable = static_cast<uint32_t>((saved.capabilities_inheritable() & available) >> (32 * word));
  }
  tape.call(SYS_capset, {tape.data_of(head.header), tape.data(data, sizeof data)}, true,
            fmt::format("set the capabilities of thread {}", thread.tid()));
  // Everybody may set this one of the securebits.
  tape.call(SYS_prctl, {PR_SET_KEEPCAPS, saved.securebits() >> SECURE_KEEP_CAPS & 1, 0, 0, 0});
  for (uint64_t capability = 0; capability <= kLastCapability; ++capability) {
    if (saved.capabilities_ambient() >> capability & 1) {
      tape.call(SYS_prctl, {PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0});
    }
  }
  if (saved.no_new_privileges()) tape.call(SYS_prctl, {PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0}, true, "set no_new_privs");
  return {};
}

}  // namespace vmckpt
