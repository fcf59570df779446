// A pseudo terminal's slave belongs to whom it was given to, and can be opened by its name; two descriptors of one process
// that has ended are known to be of one process, and others are not. A signal that a file sends names the file's number.

#include "act.h"

static ino_t inode_of(int fd) {
  struct stat status;
  MUST(fstat(fd, &status));
  return status.st_ino;
}

static int pidfd_of(pid_t pid) { return MUST(static_cast<int>(syscall(SYS_pidfd_open, pid, 0))); }

static volatile int g_signalled_by = -1;
static void on_input(int, siginfo_t* info, void*) { g_signalled_by = info->si_fd; }

int main(int argc, char** argv) {
  act::begin(argc, argv);
  struct sigaction action {};
  action.sa_sigaction = on_input;
  action.sa_flags = SA_SIGINFO | SA_RESTART;
  MUST(sigaction(SIGRTMIN, &action, nullptr));
  int ends[2];
  MUST(pipe(ends));
  MUST(fcntl(ends[0], F_SETOWN, getpid()));
  MUST(fcntl(ends[0], F_SETSIG, SIGRTMIN));
  MUST(fcntl(ends[0], F_SETFL, O_ASYNC));
  int master = MUST(posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC));
  MUST(grantpt(master));
  MUST(unlockpt(master));
  char name[64];
  MUST_ZERO(ptsname_r(master, name, sizeof name));
  int slave = MUST(open(name, O_RDWR | O_NOCTTY | O_CLOEXEC));
  if (geteuid() == 0) MUST(fchown(slave, 4711, 4712));
  MUST(fchmod(slave, 0641));
  struct stat before;
  MUST(fstat(slave, &before));

  pid_t child = MUST(fork()), other = MUST(fork());
  if (child == 0 || other == 0) _exit(0);
  int one = pidfd_of(child), two = pidfd_of(child), third = pidfd_of(other);
  for (pid_t pid : {child, other}) MUST(waitpid(pid, nullptr, 0));
  bool has_inodes = inode_of(one) != inode_of(third);

  act::intermission();

  MUST(act::write_text(ends[1], "x"));
  act::eventually("a signal says which file has input", [&] { return g_signalled_by == ends[0]; });
  struct stat after;
  MUST(fstat(slave, &after));
  act::expect_equal("owner", before.st_uid, after.st_uid);
  act::expect_equal("group", before.st_gid, after.st_gid);
  act::expect_equal("mode", before.st_mode, after.st_mode);
  MUST_ZERO(ptsname_r(master, name, sizeof name));
  act::expect("opens by its name", open(name, O_RDWR | O_NOCTTY | O_CLOEXEC) >= 0);

  act::expect_equal("the two are of one process", inode_of(one), inode_of(two));
  if (has_inodes) act::expect("the third is of another", inode_of(one) != inode_of(third));
  for (int fd : {one, two, third}) {
    act::expect_errno("it has ended", ESRCH, syscall(SYS_pidfd_send_signal, fd, 0, nullptr, 0));
  }
  return act::finish();
}
