#include "supervisor/doctor_probes.h"

#include <cstdlib>

#include <fcntl.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/fd.h"

namespace vmckpt {

namespace {

constexpr unsigned kChildSeconds = 10;  // a probe that hangs is ended by SIGALRM

}  // namespace

Probe ok(std::string reason) { return {.state = ProbeState::kOk, .reason = std::move(reason)}; }
Probe limited(std::string reason, std::string cure) {
  return {.state = ProbeState::kLimited, .reason = std::move(reason), .cure = std::move(cure)};
}
Probe missing(std::string reason, std::string cure) {
  return {.state = ProbeState::kMissing, .reason = std::move(reason), .cure = std::move(cure)};
}

std::string why(const Error& error) { return error.message(); }

std::string read_line(const std::string& path) {
  Result<std::string> text = read_whole_file(path, kMiB);
  return text ? text->substr(0, text->find('\n')) : std::string();
}

Result<void> failed(const char* call) { return errno_error(call); }

Result<void> in_child(const std::function<Result<void>()>& body) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) < 0) return failed("pipe");
  Fd reading(ends[0]), writing(ends[1]);
  pid_t child = ::fork();
  if (child < 0) return failed("fork");
  if (child == 0) {
    ::alarm(kChildSeconds);
    Result<void> result = body();
    std::string answer = "+";
    if (!result) answer = fmt::format("-{} {}{}{}", result.error().err, result.error().what, '\0', result.error().cure);
    (void)!::write(writing.get(), answer.data(), answer.size());
    ::_exit(0);
  }
  writing.reset();
  Result<std::string> answer = read_whole_fd(reading.get(), "the probe's answer", kMiB);
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (!answer || answer->empty()) return error(fmt::format("the probe ended early (wait status {:#x})", status));
  if ((*answer)[0] == '+') return {};
  char* rest = nullptr;
  int err = static_cast<int>(std::strtol(answer->c_str() + 1, &rest, 10));
  const std::string what(*rest == ' ' ? rest + 1 : rest);
  const size_t cure = static_cast<size_t>(rest - answer->c_str()) + 1 + what.size() + 1;
  return Error{what, err, cure < answer->size() ? answer->substr(cure) : std::string()};
}

volatile uint64_t Sleeper::marker = 0;

Sleeper::Sleeper() {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) < 0) return;
  Fd reading(ends[0]), writing(ends[1]);
  pid_ = ::fork();
  if (pid_ == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    marker = kChildMarker;
    (void)!::write(writing.get(), "r", 1);
    for (;;) ::pause();
  }
  char ready;
  (void)!::read(reading.get(), &ready, 1);
}

Sleeper::~Sleeper() {
  if (pid_ <= 0) return;
  ::kill(pid_, SIGKILL);
  while (::waitpid(pid_, nullptr, __WALL) < 0 && errno == EINTR) {
  }
}

pid_t fork_with_pid(pid_t wanted) {
  clone_args arguments{};
  arguments.exit_signal = SIGCHLD;
  arguments.set_tid = reinterpret_cast<uint64_t>(&wanted);
  arguments.set_tid_size = 1;
  pid_t pid = static_cast<pid_t>(::syscall(SYS_clone3, &arguments, sizeof arguments));
  if (pid == 0) ::_exit(0);
  if (pid > 0) ::waitpid(pid, nullptr, 0);
  return pid;
}

Result<void> enter_namespaces(int flags) {
  if (::unshare(flags) == 0) return {};
  if (errno != EPERM) return failed("unshare");
  const std::string uid_map = fmt::format("{0} {0} 1", ::geteuid());
  const std::string gid_map = fmt::format("{0} {0} 1", ::getegid());
  if (::unshare(CLONE_NEWUSER | flags) < 0) return failed("unshare with a user namespace");
  VMCKPT_TRY(write_file("/proc/self/setgroups", "deny"));
  VMCKPT_TRY(write_file("/proc/self/uid_map", uid_map));
  return write_file("/proc/self/gid_map", gid_map);
}

const char* namespace_cure() {
  return "allow unprivileged user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, "
         "kernel.apparmor_restrict_unprivileged_userns), or restart as root";
}

}  // namespace vmckpt
