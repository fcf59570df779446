#include "catch.h"

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <set>

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "supervisor/doctor.h"

namespace vmckpt {
namespace {

const Probe* find(const std::vector<Probe>& probes, const std::string& name) {
  auto at = std::find_if(probes.begin(), probes.end(), [&](const Probe& probe) { return probe.name == name; });
  return at == probes.end() ? nullptr : &*at;
}

void forbid(unsigned system_call) {
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, system_call, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  sock_fprog program{static_cast<unsigned short>(std::size(filter)), filter};
  ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  if (::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) < 0) ::_exit(77);
}

}  // namespace

TEST_CASE("every probe has a name of its own and a reason, and what is missing has a cure") {
  const auto probes = run_probes("/tmp");
  std::set<std::string> names;
  for (const Probe& probe : probes) {
    INFO(probe.name << ": " << probe.reason);
    CHECK(names.insert(probe.name).second);
    CHECK_FALSE(probe.reason.empty());
    if (probe.state == ProbeState::kMissing) CHECK_FALSE(probe.cure.empty());
    if (probe.state == ProbeState::kOk) CHECK(probe.cure.empty());
  }
  CHECK(names.size() > 20);
}

TEST_CASE("the probes leave no process behind") {
  run_probes("/tmp");
  CHECK(::waitpid(-1, nullptr, WNOHANG) == -1);
  CHECK(errno == ECHILD);
}

TEST_CASE("a system call that this sandbox forbids is noticed by trying it") {
  pid_t child = ::fork();
  if (child == 0) {
    forbid(SYS_kcmp);
    const auto probes = run_probes("/tmp");
    const Probe* kcmp = find(probes, "kcmp");
    bool noticed =
        kcmp != nullptr && kcmp->state == ProbeState::kMissing && kcmp->reason.find("EPERM") != std::string::npos;
    ::_exit(noticed && !host_is_usable(probes) ? 0 : 1);
  }
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(status == 0);
}

TEST_CASE("choosing PIDs directly and PID namespaces stand in for one another") {
  const auto probes = run_probes("/tmp");
  const Probe* set_tid = find(probes, "set-tid");
  const Probe* pid_namespace = find(probes, "pid-namespace");
  REQUIRE(set_tid != nullptr);
  REQUIRE(pid_namespace != nullptr);
  CHECK_FALSE(set_tid->required);
  CHECK(pid_namespace->required == (set_tid->state != ProbeState::kOk));
}

TEST_CASE("an image directory that is not there makes the host unusable for it") {
  const auto probes = run_probes("/nowhere/at/all");
  const Probe* directory = find(probes, "image-dir");
  REQUIRE(directory != nullptr);
  CHECK(directory->state == ProbeState::kMissing);
  CHECK_FALSE(host_is_usable(probes));
}

}  // namespace vmckpt
