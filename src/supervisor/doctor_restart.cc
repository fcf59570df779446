// Making the target again, at restart.
#include <algorithm>
#include <cstdio>
#include <sstream>

#include <linux/capability.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/fd.h"
#include "core/proc.h"
#include "image/one_process.h"
#include "modules/credentials.h"
#include "restart/new_process.h"
#include "supervisor/doctor_probes.h"
#include "tracer/tape_draft.h"

namespace vmckpt {

Probe probe_set_tid() {
  // A number that was free a moment ago.
  pid_t wanted = ::fork();
  if (wanted == 0) ::_exit(0);
  if (wanted < 0) return missing(why(errno_error("fork")), "raise the limit on the number of processes (ulimit -u)");
  ::waitpid(wanted, nullptr, 0);
  pid_t got = fork_with_pid(wanted);
  if (got == wanted || (got < 0 && errno == EEXIST)) return ok("a process can be created with a chosen free PID");
  Error reason = errno_error("clone3 with set_tid");
  if (reason.err == EPERM) {
    return limited("PIDs cannot be chosen in this PID namespace: a restarted program gets its old PID in a new PID namespace",
                   "run restart with CAP_CHECKPOINT_RESTORE to keep PIDs without a namespace");
  }
  return missing(why(reason), "allow clone3 in this container, and run Linux 5.5 or newer");
}

Probe probe_user_namespace() {
  Result<void> result = in_child([]() -> Result<void> {
    const uid_t uid = ::geteuid();
    if (::unshare(CLONE_NEWUSER) < 0) return failed("unshare");
    return write_file("/proc/self/uid_map", fmt::format("{0} {0} 1", uid));
  });
  if (result) return ok("user namespaces can be created");
  if (::geteuid() == 0 && result.error().err == EPERM && !has_capability(CAP_SETFCAP)) {
    return limited(why(result.error()) + ": user 0 cannot be mapped into a user namespace without CAP_SETFCAP",
                   "run as another user (with bwrap another --uid), or with CAP_SETFCAP");
  }
  return limited(why(result.error()), namespace_cure());
}

namespace {

// Plays a draft in this very process, as the player would.
Result<void> play_here(const TapeDraft& tape) {
  std::vector<uint8_t> memory(tape.bytes());
  const std::vector<uint8_t> laid_out = tape.lay_out(reinterpret_cast<uint64_t>(memory.data()), Tape{});
  std::copy(laid_out.begin(), laid_out.end(), memory.begin());
  const auto* played = reinterpret_cast<const Tape*>(memory.data());
  for (uint32_t i = 0; i < played->calls; ++i) {
    const TapeCall& call = played->call[i];
    const long result = ::syscall(call.number, call.args[0], call.args[1], call.args[2], call.args[3], call.args[4],
                                  call.args[5]);
    if (result < 0 && (call.flags & kTapeMustSucceed)) return failed(tape_call_name(call.number).c_str());
  }
  return {};
}

struct Birth {
  bool own_user_namespace = false;
  std::string note;  // what the namespace cannot have
};

// A process with a chosen number in a namespace of its own, made as restart makes it, which then becomes what we are.
Result<Birth> give_birth() {
  constexpr pid_t kWanted = 4321;
  pb::Image image;
  pb::Process& wanted = one_process(&image).process;
  wanted.set_pid(kWanted);
  pb::Thread* thread = wanted.add_threads();
  thread->set_tid(kWanted);
  save_credentials(VMCKPT_TRY(read_status(::getpid())), thread->MutableExtension(pb::credentials));
  auto become = [&]() -> Result<void> {
    if (::getpid() != kWanted) return error(fmt::format("the process got PID {} instead of {}", ::getpid(), kWanted));
    TapeDraft tape;
    VMCKPT_TRY(plan_credentials(*thread, tape));
    return play_here(tape);
  };
  std::vector<std::string> notes;
  NewProcess process = VMCKPT_TRY(make_process(image, Surroundings::kOwnNamespace, notes, [&](const Birthplace& birthplace) {
    const Result<void> result = become();
    const std::string answer = result.ok() ? "R" : "E" + result.error().message();
    (void)::send(birthplace.channel, answer.data(), answer.size(), MSG_NOSIGNAL);
    ::_exit(0);
  }));
  std::string answer(1, 'N');
  for (ssize_t got = 1; got > 0 && answer[0] == 'N';) {  // notes about clocks come along
    answer.resize(4096);
    got = ::recv(process.channel.get(), answer.data(), answer.size(), 0);
    answer.resize(got > 0 ? static_cast<size_t>(got) : 0);
    if (answer.empty()) answer = "Ethe new process ended early";
  }
  for (pid_t pid : {process.pid, process.namespace_init}) {
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, __WALL);
  }
  if (answer[0] != 'R') return error(answer.substr(1));
  return Birth{process.own_user_namespace, notes.empty() ? std::string() : notes.front()};
}

}  // namespace

Probe probe_pid_namespace() {
  auto birth = give_birth();
  if (!birth.ok()) {
    const Error& problem = birth.error();
    return missing(Error{problem.what, problem.err, {}}.message(), problem.cure.empty() ? namespace_cure() : problem.cure);
  }
  return ok(fmt::format("a restarted program can get its old PIDs in a new PID namespace{}",
                        birth->own_user_namespace ? ", inside a user namespace" : ""));
}

Probe probe_time_namespace() {
  static constexpr int64_t kOffsetSeconds = 100000;
  Result<void> result = in_child([]() -> Result<void> {
    timespec before;
    ::clock_gettime(CLOCK_MONOTONIC, &before);
    VMCKPT_TRY(enter_namespaces(CLONE_NEWTIME));
    VMCKPT_TRY(write_file("/proc/self/timens_offsets", fmt::format("monotonic {} 0\n", kOffsetSeconds)));
    return in_child([before]() -> Result<void> {
      timespec now;
      ::clock_gettime(CLOCK_MONOTONIC, &now);
      if (now.tv_sec - before.tv_sec >= kOffsetSeconds) return {};
      return error("the monotonic clock is not changed in a time namespace");
    });
  });
  if (result) return ok("the monotonic clock can continue from its saved value, even after a reboot of this host");
  return limited(
      why(result.error()) + ": after a reboot of this host the monotonic clock jumps for a restarted program",
      fmt::format("run a kernel with CONFIG_TIME_NS (5.6 or newer); {}", namespace_cure()));
}

Probe probe_mount_proc() {
  auto birth = give_birth();
  if (!birth.ok()) return limited("not known: there is no PID namespace to test it in", "see pid-namespace");
  if (birth->note.empty()) return ok("a new /proc can be mounted in a PID namespace");
  return limited(birth->note, "in a container, leave /proc unmasked, or restart as root outside the container");
}

Probe probe_vdso() {
  Result<void> result = in_child([]() -> Result<void> {
    std::string maps = VMCKPT_TRY(read_whole_file("/proc/self/maps"));
    std::istringstream lines(maps);
    bool found = false;
    for (std::string line; std::getline(lines, line);) {
      if (line.find("[vdso") == std::string::npos && line.find("[vvar") == std::string::npos) continue;
      unsigned long start, end;
      if (std::sscanf(line.c_str(), "%lx-%lx", &start, &end) != 2) continue;
      found = true;
      void* to = ::mmap(nullptr, end - start, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (to == MAP_FAILED) return failed("mmap");
      void* from = reinterpret_cast<void*>(start);
      if (::mremap(from, end - start, end - start, MREMAP_MAYMOVE | MREMAP_FIXED, to) == MAP_FAILED) {
        return errno_error("move " + line.substr(line.find('[')));
      }
    }
    if (!found) return error("there is no vdso (vdso=0 on the kernel's command line)");
    return {};
  });
  if (result) return ok("vdso and vvar can be moved to the addresses at which the program had them");
  return missing(why(result.error()), "run a kernel without CONFIG_MSEAL_SYSTEM_MAPPINGS and with a vdso");
}

}  // namespace vmckpt
