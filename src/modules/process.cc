#include "modules/process.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include <asm/prctl.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core/fd.h"
#include "core/proc.h"
#include "image/one_process.h"
#include "memory/address_space.h"
#include "modules/credentials.h"
#include "modules/module.h"
#include "modules/seccomp.h"

#ifndef ARCH_GET_XCOMP_PERM
#define ARCH_GET_XCOMP_PERM 0x1022
#define ARCH_REQ_XCOMP_PERM 0x1023
#endif
#ifndef ARCH_GET_XCOMP_GUEST_PERM
#define ARCH_GET_XCOMP_GUEST_PERM 0x1024
#define ARCH_REQ_XCOMP_GUEST_PERM 0x1025
#endif

namespace vmckpt {
namespace {

constexpr uint32_t kLimits = RLIM_NLIMITS;
// Newer than Debian 12's headers: linux/prctl.h.
constexpr int kPrSetMdwe = 65, kPrGetMdwe = 66, kPrSetMemoryMerge = 67, kPrGetMemoryMerge = 68;
constexpr uint64_t kAmxTileData = 18;  // the one xstate feature that needs permission (kernel: Documentation/arch/x86/xstate.rst)

std::string directory_link(pid_t pid, const char* which) {
  auto link = read_link(fmt::format("/proc/{}/{}", pid, which));
  return link.ok() ? *link : std::string();
}

// A removed one comes back as a removed one: relative paths lead nowhere there.
Result<void> save_working_directory(pid_t pid, pb::FileSystemContext* fs) {
  const Fd fd = VMCKPT_TRY(open_file(fmt::format("/proc/{}/cwd", pid), O_PATH | O_DIRECTORY));
  fs->set_working_directory(directory_link(pid, "cwd"));
  *fs->mutable_working_directory_origin() = inode_of(fd.get());
  struct stat now {}, there {};
  if (::fstat(fd.get(), &now) != 0) return errno_error(fmt::format("look at the working directory of process {}", pid));
  const std::string path = fmt::format("/proc/{}/root{}", pid, fs->working_directory());
  const bool leads_there = ::stat(path.c_str(), &there) == 0 && there.st_ino == now.st_ino && there.st_dev == now.st_dev;
  fs->set_working_directory_removed(fs->working_directory().ends_with(" (deleted)") && !leads_there);
  return {};
}

// With the target's rights; the caller's are lent only for the very folder in which it already was.
Result<void> enter_working_directory(const pb::FileSystemContext& fs, const FileAccess& access) {
  const pb::Inode& then = fs.working_directory_origin();
  Fd fd = VMCKPT_TRY(fs.working_directory_removed()
                         ? access.make_removed_directory(O_PATH)
                         : access.locate(fs.working_directory(), O_DIRECTORY, then));
  if (access.as_target([&] { return ::fchdir(fd.get()); }) == 0) return {};
  if (errno == EACCES && is_same_inode(then, inode_of(fd.get())) && ::fchdir(fd.get()) == 0) return {};
  return errno_error("enter the working directory " + fs.working_directory());
}

// linux/membarrier.h; the first since Linux 6.3.
constexpr uint64_t kMembarrierGetRegistrations = 1 << 9;
constexpr uint32_t kMembarrierRegistrations[] = {1 << 2 /* global */, 1 << 4 /* private */, 1 << 6 /* sync core */,
                                                 1 << 8 /* rseq */};

// "4:memory:/path", "0::/path" (cgroups(7)).
struct Cgroup {
  std::string controllers;  // empty: version 2
  std::string path;
};

std::optional<Cgroup> parse_cgroup(std::string_view line) {
  const size_t first = line.find(':'), second = line.find(':', first + 1);
  if (first == std::string_view::npos || second == std::string_view::npos) return std::nullopt;
  return Cgroup{std::string(line.substr(first + 1, second - first - 1)), std::string(line.substr(second + 1))};
}

// Where the hierarchy is mounted; empty: nowhere.
std::string mount_point_of(const Cgroup& cgroup, const std::string& mountinfo) {
  for (std::string_view line : split_lines(mountinfo)) {
    const size_t separator = line.find(" - ");
    if (separator == std::string_view::npos) continue;
    const auto mount = split_words(line.substr(0, separator)), kind = split_words(line.substr(separator + 3));
    if (mount.size() < 5 || kind.size() < 3) continue;
    const bool version_2 = kind[0] == "cgroup2" && cgroup.controllers.empty();
    const bool version_1 = kind[0] == "cgroup" && !cgroup.controllers.empty() && kind[2].ends_with("," + cgroup.controllers);
    if (version_1 || version_2) return std::string(mount[4]);
  }
  return {};
}

std::string cgroup_path_now(pid_t pid, const Cgroup& wanted) {
  auto text = read_whole_file(fmt::format("/proc/{}/cgroup", pid));
  if (!text.ok()) return {};
  for (std::string_view line : split_lines(*text)) {
    auto cgroup = parse_cgroup(line);
    if (cgroup && cgroup->controllers == wanted.controllers) return cgroup->path;
  }
  return {};
}

struct NamedLimit {
  std::string name;  // "Max open files"
  rlimit limit;
};

// /proc/PID/limits tells everybody; prlimit(2) wants CAP_SYS_RESOURCE for a process of another user. One line for each resource
// in the order of its number, in columns of fixed width (kernel: fs/proc/base.c, proc_pid_limits).
Result<std::vector<NamedLimit>> read_limits(pid_t pid) {
  constexpr size_t kNameColumn = 26;
  const std::string path = fmt::format("/proc/{}/limits", pid);
  const std::string text = VMCKPT_TRY(read_whole_file(path));
  auto value = [](std::string_view word) {
    return word == "unlimited" ? RLIM_INFINITY : std::strtoull(std::string(word).c_str(), nullptr, 10);
  };
  std::vector<NamedLimit> limits;
  for (std::string_view line : split_lines(text)) {
    if (line.starts_with("Limit") || line.size() < kNameColumn) continue;
    auto words = split_words(line.substr(kNameColumn));
    if (words.size() < 2) return error(path + " has an unknown form");
    std::string name(line.substr(0, kNameColumn));
    name.resize(name.find_last_not_of(' ') + 1);
    limits.push_back({name, {value(words[0]), value(words[1])}});
  }
  if (limits.size() < kLimits) return error(path + " has an unknown form");
  limits.resize(kLimits);
  return limits;
}

Result<void> save_limits(pid_t pid, pb::ProcessState* state) {
  const std::vector<NamedLimit> limits = VMCKPT_TRY(read_limits(pid));
  for (uint32_t resource = 0; resource < kLimits; ++resource) {
    pb::ResourceLimit* saved = state->add_limits();
    saved->set_resource(resource);
    saved->set_soft(limits[resource].limit.rlim_cur);
    saved->set_hard(limits[resource].limit.rlim_max);
  }
  return {};
}

// As much of it as can be had without CAP_SYS_RESOURCE.
rlimit at_most(const pb::ResourceLimit& saved, rlim_t hard_now) {
  const rlim_t hard = std::min<rlim_t>(saved.hard(), hard_now);
  return {std::min<rlim_t>(saved.soft(), hard), hard};
}

std::string limit_text(rlim_t value) { return value == RLIM_INFINITY ? "unlimited" : fmt::format("{}", value); }

bool had_other_ids(const pb::Credentials& saved) {
  for (uint32_t uid : saved.uid()) {
    if (uid != ::getuid()) return true;
  }
  for (uint32_t gid : saved.gid()) {
    if (gid != ::getgid()) return true;
  }
  return false;
}

struct ProcessAnswers {
  size_t dumpable, subreaper, thp_disabled, xstate_permission, xstate_guest_permission;
  std::optional<size_t> membarrier, deny_write_execute, memory_merge;  // unless a seccomp filter forbids to ask
  TapeWord subreaper_answer, xstate_permission_answer, xstate_guest_permission_answer;
};

ProcessAnswers ask_process(const pb::Thread& leader, TapeDraft& tape) {
  ProcessAnswers questions{};
  questions.dumpable = tape.call(SYS_prctl, {PR_GET_DUMPABLE, 0, 0, 0, 0});
  questions.subreaper_answer = tape.room(sizeof(int));
  questions.subreaper = tape.call(SYS_prctl, {PR_GET_CHILD_SUBREAPER, questions.subreaper_answer, 0, 0, 0});
  questions.thp_disabled = tape.call(SYS_prctl, {PR_GET_THP_DISABLE, 0, 0, 0, 0});
  questions.xstate_permission_answer = tape.room(sizeof(uint64_t));
  questions.xstate_permission = tape.call(SYS_arch_prctl, {ARCH_GET_XCOMP_PERM, questions.xstate_permission_answer});
  questions.xstate_guest_permission_answer = tape.room(sizeof(uint64_t));
  questions.xstate_guest_permission =
      tape.call(SYS_arch_prctl, {ARCH_GET_XCOMP_GUEST_PERM, questions.xstate_guest_permission_answer});
  auto ask_if_allowed = [&](int64_t number, uint64_t what) -> std::optional<size_t> {
    const uint64_t arguments[6] = {what};
    if (evaluate_filters(leader, number, arguments, 0) != SECCOMP_RET_ALLOW) return std::nullopt;
    return tape.call(number, {what, 0, 0, 0, 0});
  };
  questions.membarrier = ask_if_allowed(SYS_membarrier, kMembarrierGetRegistrations);
  questions.deny_write_execute = ask_if_allowed(SYS_prctl, kPrGetMdwe);
  questions.memory_merge = ask_if_allowed(SYS_prctl, kPrGetMemoryMerge);
  return questions;
}

void save_process_answers(const ProcessAnswers& questions, const TapeDraft& tape, pb::ProcessState* state) {
  state->set_dumpable(static_cast<int32_t>(tape.result(questions.dumpable)));
  state->set_child_subreaper(tape.as<int>(questions.subreaper_answer) != 0);
  if (tape.succeeded(questions.thp_disabled)) {
    const auto thp = static_cast<uint32_t>(tape.result(questions.thp_disabled));
    state->set_thp_disabled(thp & 1);
    state->set_thp_disable_flags(thp & ~1u);
  }
  if (questions.deny_write_execute && tape.succeeded(*questions.deny_write_execute)) {
    state->set_deny_write_execute(static_cast<uint32_t>(tape.result(*questions.deny_write_execute)));
  }
  if (questions.memory_merge) state->set_memory_merge(tape.result(*questions.memory_merge) == 1);
  if (questions.membarrier && tape.succeeded(*questions.membarrier)) {
    state->set_membarrier(static_cast<uint32_t>(tape.result(*questions.membarrier)));
  }
  if (tape.succeeded(questions.xstate_permission)) {
    state->set_xstate_permission(tape.as<uint64_t>(questions.xstate_permission_answer));
  }
  if (tape.succeeded(questions.xstate_guest_permission)) {
    state->set_xstate_guest_permission(tape.as<uint64_t>(questions.xstate_guest_permission_answer));
  }
}

Result<void> save_process(const StoppedWorld& world, pb::Process* process, pb::FileSystemContext* fs) {
  pb::ProcessState* state = process->MutableExtension(pb::process_state);
  const pid_t pid = world.pid();
  StatusFields status = VMCKPT_TRY(read_status(pid));
  std::vector<std::string> stat = VMCKPT_TRY(read_stat(pid));
  if (stat.size() < 49) return error(fmt::format("/proc/{}/stat has an unknown form", pid));
  process->set_pid(world.pid_in_target());
  process->set_process_group(static_cast<int32_t>(status_innermost(status, "NSpgid")));
  process->set_session(static_cast<int32_t>(status_innermost(status, "NSsid")));
  state->set_has_terminal(stat[4] != "0");
  state->set_foreground(state->has_terminal() && stat[5] == stat[2]);
  state->set_command_name(command_of(pid));
  for (const std::string& text : split_nul(VMCKPT_TRY(read_whole_file(fmt::format("/proc/{}/cmdline", pid))))) {
    state->add_arguments(text);
  }
  if (auto environment = read_whole_file(fmt::format("/proc/{}/environ", pid)); environment.ok()) {
    for (const std::string& text : split_nul(*environment)) state->add_environment(text);
  }
  state->set_executable(directory_link(pid, "exe"));
  VMCKPT_TRY(save_working_directory(pid, fs));
  fs->set_root_directory(directory_link(pid, "root"));
  fs->set_umask(static_cast<uint32_t>(std::strtoul(std::string(status_field(status, "Umask")).c_str(), nullptr, 8)));
  VMCKPT_TRY(save_limits(pid, state));
  if (auto text = read_whole_file(fmt::format("/proc/{}/personality", pid)); text.ok()) {
    state->set_personality(static_cast<uint32_t>(parse_hex(*text)));
  }
  if (auto text = read_whole_file(fmt::format("/proc/{}/coredump_filter", pid)); text.ok()) {
    state->set_coredump_filter(static_cast<uint32_t>(parse_hex(split_words(*text).empty() ? "" : split_words(*text)[0])));
  }
  if (auto text = read_whole_file(fmt::format("/proc/{}/oom_score_adj", pid)); text.ok()) {
    state->set_oom_score_adj(static_cast<int32_t>(parse_number(*text)));
  }
  if (auto text = read_whole_file(fmt::format("/proc/{}/cgroup", pid)); text.ok()) {
    for (std::string_view line : split_lines(*text)) state->add_cgroups(std::string(line));
  }
  if (auto text = read_whole_file(fmt::format("/proc/{}/loginuid", pid)); text.ok()) {
    state->set_login_uid(static_cast<uint32_t>(parse_number(*text)));
  }
  const StoppedThread& leader = world.threads().front();
  process->set_state(leader.group_stopped ? pb::Process::STOPPED : pb::Process::RUNNING);
  process->set_stop_signal(leader.stop_signal);
  return {};
}

void check_process(const pb::Process& process, const pb::FileSystemContext& fs, const FileAccess& access,
                   std::vector<Error>& problems) {
  if (!process.HasExtension(pb::process_state)) {
    return problems.push_back(error(fmt::format("the image has no settings of process {}", process.pid())));
  }
  auto located = fs.working_directory_removed()
                     ? Result<Fd>(Fd())
                     : access.locate(fs.working_directory(), O_DIRECTORY, fs.working_directory_origin());
  if (!located.ok()) {
    const Error& why = located.error();
    problems.push_back(error(fmt::format("the working directory {} cannot be used: {}", fs.working_directory(), why.message()),
                             why.cure.empty() ? "make it again" : ""));
  }
  if (fs.root_directory() != "/") {
    problems.push_back(error(fmt::format("the process had the root directory {}", fs.root_directory()),
                             "restart it inside the same chroot"));
  }
  if (state_of(process).deny_write_execute() != 0 && ::prctl(kPrGetMdwe, 0, 0, 0, 0) < 0) {
    problems.push_back(error("the process had forbidden itself memory that is writable and executable (PR_SET_MDWE), which this "
                             "kernel does not know",
                             "restart it on Linux 6.3 or newer"));
  }
}

void plan_process(const pb::Process& process, TapeDraft& tape) {
  const pb::ProcessState& state = state_of(process);
  // Before there are threads, when it costs nothing. A registration too many only costs a little, one too few makes barriers
  // fail, or not reach this process: so where the kernel could not tell, all of them.
  for (uint32_t registration : kMembarrierRegistrations) {
    if (!state.has_membarrier() || (state.membarrier() & registration)) tape.call(SYS_membarrier, {registration, 0, 0});
  }
  if (state.child_subreaper()) tape.call(SYS_prctl, {PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0});
  if (state.thp_disabled()) tape.call(SYS_prctl, {PR_SET_THP_DISABLE, 1, state.thp_disable_flags(), 0, 0});
  if (state.xstate_permission() >> kAmxTileData & 1) {
    tape.call(SYS_arch_prctl, {ARCH_REQ_XCOMP_PERM, kAmxTileData}, true, "ask for AMX");
  }
  // Before any vCPU is made: it fixes the size of their state.
  if (state.xstate_guest_permission() >> kAmxTileData & 1) {
    tape.call(SYS_arch_prctl, {ARCH_REQ_XCOMP_GUEST_PERM, kAmxTileData}, true, "ask for AMX for guests");
  }
}

void plan_memory_rules(const pb::Process& process, TapeDraft& tape) {
  const pb::ProcessState& state = state_of(process);
  if (state.personality() & READ_IMPLIES_EXEC) tape.call(SYS_personality, {state.personality()}, true, "set the personality");
  if (state.memory_merge()) tape.call(SYS_prctl, {kPrSetMemoryMerge, 1, 0, 0, 0});
  // It cannot be taken back, and a program relies on that.
  if (state.deny_write_execute() != 0) {
    tape.call(SYS_prctl, {kPrSetMdwe, state.deny_write_execute(), 0, 0, 0}, true,
              "forbid memory that is writable and executable");
  }
}

void plan_process_end(const pb::Process& process, TapeDraft& tape) {
  const pb::ProcessState& state = state_of(process);
  // Only 0 and 1 can be set; 2 (after a change of credentials) comes by itself.
  if (state.dumpable() == 0 || state.dumpable() == 1) {
    tape.call(SYS_prctl, {PR_SET_DUMPABLE, static_cast<uint64_t>(state.dumpable()), 0, 0, 0});
  }
}

// A process of another user takes its limits from nobody without CAP_SYS_RESOURCE.
void plan_limits(const pb::Process& process, const pb::Credentials& credentials, TapeDraft& tape) {
  if (has_capability(CAP_SYS_RESOURCE) || !had_other_ids(credentials)) return;
  for (const pb::ResourceLimit& saved : state_of(process).limits()) {
    rlimit now{};
    if (::getrlimit(static_cast<__rlimit_resource>(saved.resource()), &now) != 0) continue;
    tape.call(SYS_prlimit64, {0, saved.resource(), tape.data_of(at_most(saved, now.rlim_max)), 0});
  }
}

Result<void> save(StateSave& save) {
  const OneProcessToSave one = one_process(&save.image);
  return save_process(*save.world, &one.process, &one.fs);
}

Result<void> ask(Questions& questions) {
  const ProcessAnswers answers = ask_process(one_process(questions.image).leader, questions.leader());
  questions.when_answered([answers](const std::vector<TapeDraft>& tapes, pb::Image& image) {
    save_process_answers(answers, tapes.front(), one_process(&image).process.MutableExtension(pb::process_state));
  });
  return {};
}

void check(Preflight& preflight) {
  const OneProcess one = one_process(preflight.image);
  check_process(one.process, one.fs, preflight.access, preflight.problems);
}

Result<void> plan(ProcessPlan& process) {
  plan_process(one_process(process.image).process, process.tape);
  return {};
}

Result<void> plan_rules(ProcessPlan& process) {
  plan_memory_rules(one_process(process.image).process, process.tape);
  return {};
}

// Of the whole process, by the leader when it is who it was.
Result<void> plan_end(ThreadPlan& plan) {
  if (!plan.leads) return {};
  plan_process_end(one_process(plan.image).process, plan.tape);
  plan_limits(one_process(plan.image).process, credentials_of(plan.thread), plan.tape);
  return {};
}

// Before descriptors are rebuilt.
Result<void> restore(StateRestore& restore) {
  const OneProcess one = one_process(restore.image);
  const pb::Process& process = one.process;
  const pb::ProcessState& state = state_of(process);
  // A process group or session that the target led is made again; one that it merely joined (its shell's) is restart's own.
  if (process.session() == process.pid() && ::getsid(0) != process.pid()) {
    if (::setsid() < 0) return errno_error("make the session of the process");
  } else if (process.process_group() == process.pid() && ::getpgrp() != process.pid()) {
    if (::setpgid(0, 0) != 0) return errno_error("make the process group of the process");
  }
  ::umask(static_cast<mode_t>(one.fs.umask()));
  VMCKPT_TRY(enter_working_directory(one.fs, restore.access));
  // With READ_IMPLIES_EXEC, all readable memory that is made from now on would be executable: that comes in plan_memory_rules().
  if (::personality(state.personality() & ~uint32_t{READ_IMPLIES_EXEC}) < 0) return errno_error("set the personality");
  (void)write_file("/proc/self/coredump_filter", fmt::format("{:#x}", state.coredump_filter()));
  (void)write_file("/proc/self/oom_score_adj", fmt::format("{}", state.oom_score_adj()));
  // Everybody may give one to a process that has none, and CAP_AUDIT_CONTROL another one; only the process itself.
  if (state.has_login_uid()) (void)write_file("/proc/self/loginuid", fmt::format("{}", state.login_uid()));
  return {};
}

void restore_limits(const pb::Process& process, pid_t pid, std::vector<std::string>& notes) {
  for (const pb::ResourceLimit& saved : state_of(process).limits()) {
    auto resource = static_cast<__rlimit_resource>(saved.resource());
    rlimit limit{saved.soft(), saved.hard()};
    if (::prlimit(pid, resource, &limit, nullptr) == 0) continue;
    rlimit now{};
    if (::prlimit(pid, resource, nullptr, &now) != 0) continue;
    limit = at_most(saved, now.rlim_max);
    (void)::prlimit(pid, resource, &limit, nullptr);
  }
  // Whoever set them: what counts is what they are.
  auto limits = read_limits(pid);
  if (!limits.ok()) return notes.push_back(limits.error().message());
  for (const pb::ResourceLimit& saved : state_of(process).limits()) {
    if (saved.resource() >= limits->size()) continue;
    const auto& [name, now] = (*limits)[saved.resource()];
    if (now.rlim_cur == saved.soft() && now.rlim_max == saved.hard()) continue;
    notes.push_back(fmt::format("the resource limit \"{}\" was {} (hard {}), now it is {} (hard {})", name,
                                limit_text(saved.soft()), limit_text(saved.hard()), limit_text(now.rlim_cur),
                                limit_text(now.rlim_max)));
  }
}

void restore_surroundings(const pb::Process& process, pid_t pid, std::vector<std::string>& notes) {
  const pb::ProcessState& state = state_of(process);
  std::string lost;
  auto mountinfo = read_whole_file("/proc/self/mountinfo");
  for (const std::string& line : state.cgroups()) {
    auto cgroup = parse_cgroup(line);
    if (!cgroup) continue;
    const std::string now = cgroup_path_now(pid, *cgroup);
    if (now.empty() || now == cgroup->path) continue;  // this host has no such hierarchy, or it is there already
    const std::string folder = mountinfo.ok() ? mount_point_of(*cgroup, *mountinfo) : std::string();
    if (!folder.empty()) (void)write_file(folder + cgroup->path + "/cgroup.procs", fmt::format("{}", pid));
    if (cgroup_path_now(pid, *cgroup) == cgroup->path) continue;
    lost += fmt::format("{}{}{}", lost.empty() ? "" : ", ", cgroup->controllers.empty() ? "" : cgroup->controllers + ":",
                        cgroup->path);
  }
  if (!lost.empty())
    notes.push_back("the process is in restart's cgroups, not in those it had, which are gone or may not be entered: " + lost);
  auto login = read_whole_file(fmt::format("/proc/{}/loginuid", pid));
  if (!state.has_login_uid() || !login.ok()) return;
  const auto now = static_cast<uint32_t>(parse_number(*login));
  if (now == state.login_uid()) return;
  auto name = [](uint32_t uid) { return uid == ~uint32_t{0} ? "none" : fmt::format("{}", uid); };
  notes.push_back(fmt::format("the login user id (of audit records) was {}, now it is {}", name(state.login_uid()), name(now)));
}

// The new process itself might not be able to open its last files with its limits.
void take_over(StateTakeOver& state) {
  const pb::Process& process = one_process(state.image).process;
  restore_limits(process, state.pid, state.notes);
  restore_surroundings(process, state.pid, state.notes);
}

}  // namespace

extern const StateModule kProcessModule{
    .name = "process", .save = save, .ask = ask, .check = check, .restore = restore, .plan = plan, .plan_thread = plan_end,
    .take_over = take_over};
extern const StateModule kMemoryRulesModule{.name = "rules of memory", .plan = plan_rules};

}  // namespace vmckpt
