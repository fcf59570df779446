// A program that locks itself in with a list of system calls, and dies of any other, uses everything that the recorder wraps.
// The first argument: "own", its own calls alone, so that a checkpoint must be refused; "checkpoint", those of a checkpoint too.
// The second: how it installs its filters, "prctl" or "syscall".

#include <fcntl.h>
#include <spawn.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <thread>

#include "../lock_in.h"
#include "act.h"

// What the C library makes of the calls below; write(2) only to the standard output.
static const std::vector<long> kOwnCalls = {
    SYS_read, SYS_openat, SYS_close, SYS_fstat, SYS_newfstatat, SYS_lseek, SYS_access, SYS_clock_nanosleep, SYS_nanosleep,
    SYS_restart_syscall, SYS_futex, SYS_mmap, SYS_munmap, SYS_mprotect, SYS_madvise, SYS_brk, SYS_mlockall, SYS_munlockall,
    SYS_inotify_init, SYS_inotify_init1, SYS_inotify_add_watch, SYS_inotify_rm_watch, SYS_eventfd2, SYS_socket, SYS_bind,
    SYS_prctl, SYS_seccomp, SYS_dup, SYS_dup2, SYS_dup3, SYS_fcntl, SYS_chdir, SYS_fchdir, SYS_execve, SYS_execveat,
    SYS_clone, SYS_clone3, SYS_vfork, SYS_wait4, SYS_waitid, SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn,
    SYS_set_robust_list, SYS_rseq, SYS_exit, SYS_exit_group, SYS_unlink,
};

static void allow_write_to_standard_output(std::vector<sock_filter>& program) {
  const sock_filter head[] = {
      lock_in::load(offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_write, 0, 4),
      lock_in::load(offsetof(seccomp_data, args[0])),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 1, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
  };
  program.insert(program.begin(), std::begin(head), std::end(head));
}

static void install(const std::string& how, const std::vector<sock_filter>& code) {
  sock_fprog program{static_cast<unsigned short>(code.size()), const_cast<sock_filter*>(code.data())};
  MUST(how == "prctl" ? prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)
                      : static_cast<int>(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program)));
}

// Files of the working directory, by relative paths: the recorder makes them absolute.
struct Things {
  int watches = -1, event = -1, listener = -1;
};

static void bind_relative(int socket, const char* path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  strcpy(address.sun_path, path);
  MUST(bind(socket, reinterpret_cast<sockaddr*>(&address), sizeof address));
}

static void expect_no_program(const std::string& what, long result) { act::expect_errno(what, ENOENT, result); }

static void use_everything(Things& things) {
  static constexpr char kNothing[] = "./there-is-no-such-program";
  char* argv[] = {const_cast<char*>(kNothing), nullptr};
  char* environment[] = {const_cast<char*>("A=b"), nullptr};
  const size_t bytes = 1 << 16;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  MUST(memory);
  MUST(madvise(memory, bytes, MADV_DONTFORK));
  MUST(syscall(SYS_madvise, memory, bytes, MADV_DOFORK));
  MUST(munmap(memory, bytes));
  if (mlockall(MCL_CURRENT) == 0) MUST(munlockall());

  const int old_watches = MUST(inotify_init());
  close(old_watches);
  things.watches = MUST(inotify_init1(IN_CLOEXEC | IN_NONBLOCK));
  MUST(inotify_rm_watch(things.watches, MUST(inotify_add_watch(things.watches, ".", IN_DELETE))));
  MUST(syscall(SYS_inotify_add_watch, things.watches, "watched", IN_OPEN));
  things.event = MUST(eventfd(7, EFD_SEMAPHORE | EFD_CLOEXEC));
  things.listener = MUST(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  bind_relative(things.listener, "bound");

  const int file = MUST(open("watched", O_RDONLY | O_CLOEXEC));
  const int number = MUST(dup(file));
  MUST(dup2(file, number));
  MUST(dup3(file, number, O_CLOEXEC));
  close(MUST(fcntl(file, F_DUPFD_CLOEXEC, 0)));
  close(number);
  close(file);
  close(MUST(open64("watched", O_RDONLY)));
  close(MUST(openat(AT_FDCWD, "watched", O_RDONLY)));
  act::expect_errno("a device that is not allowed", ENOENT, open("/dev/vhost-net-of-nobody", O_RDWR));
  int waiting = 0;
  MUST(ioctl(things.watches, FIONREAD, &waiting));
  const int here = MUST(open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  MUST(fchdir(here));
  close(here);
  MUST(prctl(PR_SET_NAME, "locked", 0, 0, 0));

  expect_no_program("execve", execve(kNothing, argv, environment));
  expect_no_program("execv", execv(kNothing, argv));
  expect_no_program("execvp", execvp(kNothing, argv));
  expect_no_program("execl", execl(kNothing, kNothing, nullptr));
  pid_t child;
  act::expect_equal("posix_spawn", ENOENT, posix_spawn(&child, kNothing, nullptr, nullptr, argv, environment));
  std::thread([] {}).join();
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  const bool only_own = act::args[0] == "own";
  const std::string how = act::args[1];
  act::make_file("watched", "another file of that name");
  if (mkdir("folder", 0755) != 0 && errno != EEXIST) MUST(-1);
  MUST(chdir("folder"));
  act::make_file("watched", "");
  unlink("bound");
  std::vector<long> calls = kOwnCalls;
  if (!only_own) calls.insert(calls.end(), lock_in::kCallsOfACheckpoint.begin(), lock_in::kCallsOfACheckpoint.end());
  std::vector<sock_filter> program = lock_in::allow_list(calls,
                                                         only_own ? std::vector<uint32_t>{FIONREAD} : std::vector<uint32_t>{});
  allow_write_to_standard_output(program);
  MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
  install(how, program);
  install(how, {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)});  // one more, from inside
  Things things;
  use_everything(things);
  // What was noted after the lock holds in another folder, too.
  MUST(chdir(".."));

  act::intermission();

  uint64_t count = 0;
  act::expect_equal("bytes read of the eventfd", sizeof count, static_cast<size_t>(read(things.event, &count, sizeof count)));
  act::expect_equal("count of the eventfd, a semaphore", 1u, count);
  MUST(chdir("folder"));
  close(MUST(open("watched", O_RDONLY)));
  char event[256];
  act::expect("an event of the watched file", read(things.watches, event, sizeof event) > 0);
  act::expect_equal("the bound socket's file", 0, access("bound", F_OK));
  Things again;
  unlink("bound");
  use_everything(again);
  return act::finish();
}
