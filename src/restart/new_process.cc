#include "restart/new_process.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include <fcntl.h>
#include <linux/capability.h>
#include <linux/sched.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/proc.h"
#include "image/one_process.h"
#include "modules/clocks.h"
#include "modules/credentials.h"
#include "modules/host.h"

namespace vmckpt {
namespace {

// The raw call: no libc state needs to follow into children that only make system calls or never return to libc's fork.
long clone3_process(uint64_t flags, uint64_t exit_signal, const pid_t* set_tid) {
  clone_args args{};
  args.flags = flags;
  args.exit_signal = exit_signal;
  args.set_tid = reinterpret_cast<uint64_t>(set_tid);
  args.set_tid_size = set_tid != nullptr ? 1 : 0;
  return ::syscall(SYS_clone3, &args, sizeof args);
}

// Numbers that the kernel gives out next are as good as taken: on a busy host somebody else would have them before we do.
class NextNumbers {
 public:
  NextNumbers() {
    auto last = read_whole_file("/proc/sys/kernel/ns_last_pid");
    auto limit = read_whole_file("/proc/sys/kernel/pid_max");
    if (!last.ok() || !limit.ok()) return;
    last_ = parse_number(*last);
    limit_ = parse_number(*limit);
  }
  bool include(pid_t number) const {
    constexpr int64_t kSoon = 128;
    const int64_t distance = number - last_;
    return limit_ != 0 && (distance > 0 ? distance : distance + limit_) <= kSoon;  // they begin anew at the limit
  }

 private:
  int64_t last_ = 0, limit_ = 0;
};

bool numbers_are_free(const pb::Image& image) {
  const NextNumbers next;
  for (const pb::Thread& thread : one_process(image).process.threads()) {
    if (next.include(thread.tid())) return false;
    struct stat info {};
    // A thread's number is visible here though the folder's listing shows processes only.
    if (::stat(fmt::format("/proc/{}", thread.tid()).c_str(), &info) == 0) return false;
  }
  // A session or group whose leader has gone still occupies its number.
  return ::kill(-one_process(image).process.pid(), 0) != 0;
}

// What the supervisor tells a namespace's first process.
constexpr char kMappedAlready = 'M', kMapOwnUser = 'O';

void say(int fd, const std::string& text) { (void)!::write(fd, text.data(), text.size()); }

// An identity map of one user: what an ordinary user may write (user_namespaces(7)).
Result<void> map_own_user(uid_t uid, gid_t gid) {
  VMCKPT_TRY(write_file("/proc/self/setgroups", "deny"));
  VMCKPT_TRY(write_file("/proc/self/uid_map", fmt::format("{} {} 1", uid, uid)));
  return write_file("/proc/self/gid_map", fmt::format("{} {} 1", gid, gid));
}

// What is mapped here, each id to itself.
Result<std::string> identity_map(const char* own_map) {
  std::string text;
  const std::string own = VMCKPT_TRY(read_whole_file(own_map));
  for (std::string_view line : split_lines(own)) {
    auto words = split_words(line);
    if (words.size() == 3) text += fmt::format("{} {} {}\n", words[0], words[0], words[2]);
  }
  return text;
}

// Only from outside of the namespace, with CAP_SETUID, CAP_SETGID and, for user 0, CAP_SETFCAP.
Result<void> map_all_users(pid_t pid) {
  const std::string users = VMCKPT_TRY(identity_map("/proc/self/uid_map")),
                    groups = VMCKPT_TRY(identity_map("/proc/self/gid_map"));
  VMCKPT_TRY(write_file(fmt::format("/proc/{}/uid_map", pid), users));
  return write_file(fmt::format("/proc/{}/gid_map", pid), groups);
}

// PID 1 of the namespace: adopts and reaps the target's orphans, and ends when nobody else is left there, whether or not the
// supervisor still lives.
[[noreturn]] void live_as_namespace_init(int go_fd, int ready_fd, uid_t uid, gid_t gid) {
  char go = 0;
  if (::read(go_fd, &go, 1) != 1) ::_exit(1);
  if (go == kMapOwnUser) {
    if (auto mapped = map_own_user(uid, gid); !mapped.ok()) {
      std::string text = mapped.error().message();
      // kernel/user_namespace.c, verify_root_map
      if (uid == 0 && mapped.error().err == EPERM) {
        text += '\0';
        text +=
            "user 0 without CAP_SETFCAP cannot be mapped into a user namespace: be another user (with bwrap another --uid), or "
            "have CAP_SYS_ADMIN, CAP_CHECKPOINT_RESTORE or CAP_SETFCAP";
      }
      say(ready_fd, "E" + text);
      ::_exit(1);
    }
  }
  // Ending a namespace's first process needs SIGKILL; without this the others of its user could not look at it.
  ::prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
  ::prctl(PR_SET_NAME, kNamespaceInitName, 0, 0, 0);
  std::string answer = "R";
  if (::mount("none", "/", nullptr, MS_REC | MS_SLAVE, nullptr) != 0 ||
      ::mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, nullptr) != 0) {
    answer += fmt::format("/proc shows the outer process numbers to the target: mounting it again failed ({})",
                          std::strerror(errno));
  }
  say(ready_fd, answer);
  ::setsid();
  sigset_t all;
  sigfillset(&all);
  ::sigprocmask(SIG_SETMASK, &all, nullptr);
  // Its descriptors would keep pipes and terminals open. Standard numbers stay taken, by /dev/null.
  int null = ::open("/dev/null", O_RDWR);
  for (int fd = 0; fd < 3; ++fd) ::dup2(null, fd);
  ::syscall(SYS_close_range, 3, ~0u, 0);
  for (bool inhabited = false;;) {
    while (::waitpid(-1, nullptr, WNOHANG | __WALL) > 0) {
    }
    bool anyone = ::kill(-1, 0) == 0 || errno != ESRCH;
    if (inhabited && !anyone) ::_exit(0);
    inhabited |= anyone;
    // The target is no child of ours, so its end sends no signal here: look now and then.
    timespec wait{inhabited ? 1 : 0, inhabited ? 0 : 10'000'000};
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    ::sigtimedwait(&child, nullptr, &wait);
  }
}

struct NamespaceInit {
  pid_t pid = 0;
  Fd user, pids, mounts;

  ~NamespaceInit() {
    if (pid == 0) return;
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, __WALL);
  }
  pid_t release() {
    pid_t result = pid;
    pid = 0;
    return result;
  }
};

enum class NamespaceKind { kPids, kPidsAndUsers };

Error namespace_error(bool new_user) {
  const std::string what = new_user ? "make a user and PID namespace" : "make a PID namespace";
  const std::string here = "give vmckpt CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE, or restart outside of this container";
  switch (errno) {
    case EPERM:
      return errno_error(what,
                         "this host or container forbids user namespaces, as do seccomp filters, security modules and plain "
                         "chroots: allow them (sysctl kernel.unprivileged_userns_clone=1, "
                         "kernel.apparmor_restrict_unprivileged_userns=0), or " +
                             here);
    case ENOSPC:
    case EUSERS:
      return errno_error(what, "raise sysctl user.max_user_namespaces and user.max_pid_namespaces, or " + here);
    default:
      return errno_error(what, here);
  }
}

Result<void> make_namespace(NamespaceKind kind, NamespaceInit& init, std::vector<std::string>& notes) {
  const bool new_user = kind == NamespaceKind::kPidsAndUsers;
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return errno_error("make a pipe");
  Fd ready(ends[0]), ready_write(ends[1]);
  if (::pipe2(ends, O_CLOEXEC) != 0) return errno_error("make a pipe");
  Fd go(ends[0]), go_write(ends[1]);
  const uid_t uid = ::geteuid();
  const gid_t gid = ::getegid();
  uint64_t flags = CLONE_NEWPID | CLONE_NEWNS | (new_user ? CLONE_NEWUSER : 0);
  long pid = clone3_process(flags, SIGCHLD, nullptr);
  if (pid < 0) return namespace_error(new_user);
  if (pid == 0) {
    go_write.reset();
    live_as_namespace_init(go.get(), ready_write.get(), uid, gid);
  }
  init.pid = static_cast<pid_t>(pid);
  ready_write.reset();
  const bool map_all = new_user && has_capability(CAP_SETUID) && has_capability(CAP_SETGID);
  const bool mapped = !new_user || (map_all && map_all_users(init.pid).ok());
  const char how = mapped ? kMappedAlready : kMapOwnUser;
  if (::write(go_write.get(), &how, 1) != 1) return errno_error("start the new namespace");
  std::string answer = VMCKPT_TRY(read_whole_fd(ready.get(), "the new namespace"));
  if (answer.empty() || answer[0] != 'R') {
    const size_t end = std::min(answer.find('\0'), answer.size());
    return error("set up the new namespace: " + (answer.empty() ? "its first process ended" : answer.substr(1, end - 1)),
                 end < answer.size() ? answer.substr(end + 1) : std::string());
  }
  if (answer.size() > 1) notes.push_back(answer.substr(1));
  auto open_namespace = [&](const char* kind) { return open_file(fmt::format("/proc/{}/ns/{}", pid, kind), O_RDONLY); };
  if (new_user) init.user = VMCKPT_TRY(open_namespace("user"));
  init.pids = VMCKPT_TRY(open_namespace("pid"));
  init.mounts = VMCKPT_TRY(open_namespace("mnt"));
  return {};
}

struct StarterReport {
  pid_t pid = 0;
  int err = 0;
  char message[500] = {};
};

// Runs in the starter process; its only product is the new process.
StarterReport start(const pb::Image& image, const NamespaceInit& init, std::vector<std::string>& notes, int channel,
                    const ProcessBody& body) {
  StarterReport report;
  auto fail = [&](const std::string& what) {
    report.err = errno;
    std::strncpy(report.message, what.c_str(), sizeof report.message - 1);
    return report;
  };
  if (init.user && ::setns(init.user.get(), CLONE_NEWUSER) != 0) return fail("enter the user namespace");
  enter_saved_time(image.host(), notes);
  if (init.pids && ::setns(init.pids.get(), CLONE_NEWPID) != 0) return fail("enter the PID namespace");
  if (init.mounts && ::setns(init.mounts.get(), CLONE_NEWNS) != 0) return fail("enter the mount namespace");
  // Gaining capabilities in the user namespace made this memory private to root: open it for the supervisor's ptrace again.
  ::prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
  pid_t wanted = one_process(image).process.pid();
  long pid = clone3_process(CLONE_PARENT, 0, &wanted);
  if (pid == 0) {
    body(Birthplace{channel, init.user.valid()});
    ::_exit(1);
  }
  if (pid < 0) return fail(fmt::format("make a process with the number {}", wanted));
  report.pid = static_cast<pid_t>(pid);
  return report;
}

// One of the three ways. What it has started is gone when it fails.
Result<NewProcess> make_process_in(const pb::Image& image, std::optional<NamespaceKind> kind, std::vector<std::string>& notes,
                                   const ProcessBody& body) {
  NewProcess process;
  int channel[2];
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, channel) != 0) return errno_error("make a socket pair");
  process.channel = Fd(channel[0]);
  Fd body_channel(channel[1]);

  NamespaceInit init;
  if (kind) VMCKPT_TRY(make_namespace(*kind, init, notes));

  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return errno_error("make a pipe");
  Fd report_read(ends[0]), report_write(ends[1]);
  pid_t starter = ::fork();
  if (starter < 0) return errno_error("start a process");
  if (starter == 0) {
    // The new process inherits what the starter has: with the supervisor's end it would not see the supervisor end.
    process.channel.reset();
    std::vector<std::string> starter_notes;
    StarterReport report = start(image, init, starter_notes, body_channel.get(), body);
    (void)!::write(report_write.get(), &report, sizeof report);
    for (const std::string& note : starter_notes) say(body_channel.get(), "N" + note);
    ::_exit(0);
  }
  report_write.reset();
  StarterReport report;
  ssize_t got = ::read(report_read.get(), &report, sizeof report);
  ::waitpid(starter, nullptr, __WALL);
  if (got != static_cast<ssize_t>(sizeof report)) return error("the process that starts the new one ended early");
  if (report.pid == 0) return Error{report.message, report.err, {}};
  process.pid = report.pid;
  process.own_user_namespace = init.user.valid();
  process.namespace_init = init.release();
  return process;
}

}  // namespace

// EEXIST: our own number is taken, so nothing is made; but the kernel asks for the right first (kernel/pid.c, alloc_pid).
bool may_choose_numbers_here() {
  const pid_t own = ::getpid();
  const long made = clone3_process(0, SIGCHLD, &own);
  if (made == 0) ::_exit(0);
  return made < 0 && errno == EEXIST;
}

Result<void> check_process_numbers() {
  if (may_choose_numbers_here() || has_capability(CAP_SYS_ADMIN)) return {};
  auto limit = read_whole_file("/proc/sys/user/max_user_namespaces");
  auto debian = read_whole_file("/proc/sys/kernel/unprivileged_userns_clone");
  if ((limit.ok() && parse_number(*limit) == 0) || (debian.ok() && parse_number(*debian) == 0)) {
    return error("the process needs its old number back, and this host allows you no user namespaces",
                 "set sysctl kernel.unprivileged_userns_clone=1 and user.max_user_namespaces, or restart as root");
  }
  return {};
}

Result<NewProcess> make_process(const pb::Image& image, Surroundings surroundings, std::vector<std::string>& notes,
                                const ProcessBody& body) {
  const bool here = surroundings == Surroundings::kAny && may_choose_numbers_here() && numbers_are_free(image);
  if (here) {
    auto made = make_process_in(image, std::nullopt, notes, body);
    // Somebody may have got the number meanwhile.
    if (made.ok() || made.error().err != EEXIST) return made;
  }
  std::vector<std::string> notes_so_far = notes;
  auto made = make_process_in(image, NamespaceKind::kPids, notes, body);
  if (made.ok() || made.error().err != EPERM) return made;
  notes = std::move(notes_so_far);
  return make_process_in(image, NamespaceKind::kPidsAndUsers, notes, body);
}

}  // namespace vmckpt
