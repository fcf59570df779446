#include "modules/credentials.h"

#include <linux/capability.h>
#include <linux/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace vmckpt {
namespace {


void save_ids(std::string_view field, google::protobuf::RepeatedField<uint32_t>* ids) {
  for (std::string_view word : split_words(field)) ids->Add(static_cast<uint32_t>(parse_number(word)));
}

}  // namespace

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

Result<void> check_credentials(const pb::Thread& thread) {
  const pb::Credentials& saved = thread.credentials();
  if (saved.uid_size() != 4 || saved.gid_size() != 4) return error("the image has no user and group ids");
  if (::geteuid() == 0) return {};
  for (uint32_t uid : saved.uid()) {
    if (uid != ::geteuid()) {
      return error(fmt::format("the image's process ran as user {}, you are user {}", uid, ::geteuid()),
                   "restart it as that user, or as root");
    }
  }
  for (uint32_t gid : saved.gid()) {
    if (gid != ::getegid()) {
      return error(fmt::format("the image's process ran with group {}, yours is {}", gid, ::getegid()),
                   fmt::format("use `sg` or `newgrp` to restart it with group {}", gid));
    }
  }
  return {};
}

void plan_credentials(const pb::Thread& thread, bool in_own_user_namespace, TapeDraft& tape) {
  const pb::Credentials& saved = thread.credentials();
  const bool to_root = saved.uid(1) == 0;
  // Capabilities that leave the bounding set must go while CAP_SETPCAP is still there.
  for (uint64_t capability = 0; capability <= 40; ++capability) {
    if (!(saved.capabilities_bounding() >> capability & 1)) tape.call(SYS_prctl, {PR_CAPBSET_DROP, capability, 0, 0, 0});
  }
  // Needs CAP_SETPCAP too.
  if (saved.securebits() != 0) tape.call(SYS_prctl, {PR_SET_SECUREBITS, saved.securebits(), 0, 0, 0});
  if (!in_own_user_namespace && ::geteuid() == 0) {  // anybody else restarts only what ran as himself
    std::vector<uint32_t> groups(saved.groups().begin(), saved.groups().end());
    tape.call(SYS_setgroups, {groups.size(), tape.data(groups.data(), groups.size() * sizeof(uint32_t))}, true,
              fmt::format("set the groups of thread {}", thread.tid()));
    tape.call(SYS_setresgid, {saved.gid(0), saved.gid(1), saved.gid(2)}, true, "set group ids");
    tape.call(SYS_setfsgid, {saved.gid(3)});
    // Without this, leaving user 0 would clear capabilities that the image may say were kept.
    if (!to_root) tape.call(SYS_prctl, {PR_SET_KEEPCAPS, 1, 0, 0, 0});
    tape.call(SYS_setresuid, {saved.uid(0), saved.uid(1), saved.uid(2)}, true, "set user ids");
    tape.call(SYS_setfsuid, {saved.uid(3)});
  }
  struct {
    __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  } head;
  __user_cap_data_struct data[2];
  for (int word = 0; word < 2; ++word) {
    data[word].effective = static_cast<uint32_t>(saved.capabilities_effective() >> (32 * word));
    data[word].permitted = static_cast<uint32_t>(saved.capabilities_permitted() >> (32 * word));
    data[word].inheritable = static_cast<uint32_t>(saved.capabilities_inheritable() >> (32 * word));
  }
  tape.call(SYS_capset, {tape.data_of(head.header), tape.data(data, sizeof data)}, true,
            fmt::format("set the capabilities of thread {}", thread.tid()));
  tape.call(SYS_prctl, {PR_SET_KEEPCAPS, 0, 0, 0, 0});
  for (uint64_t capability = 0; capability <= 40; ++capability) {
    if (saved.capabilities_ambient() >> capability & 1) {
      tape.call(SYS_prctl, {PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0});
    }
  }
  if (saved.no_new_privileges()) tape.call(SYS_prctl, {PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0}, true, "set no_new_privs");
}

}  // namespace vmckpt
