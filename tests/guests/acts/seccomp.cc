// A program's own seccomp filters are enforced after restart. The first argument says how they were installed:
//
//   prctl     prctl(PR_SET_SECCOMP), two filters stacked
//   syscall   syscall(SYS_seccomp), two filters stacked
//   tsync     syscall(SYS_seccomp) with SECCOMP_FILTER_FLAG_TSYNC: all threads have both
//   raw       the system call instruction itself: no library call that a recorder could see
//   no-spawn  a filter that kills the process on fork, vfork and clone of a process, as QEMU's -sandbox spawn=deny
//
// The filters answer acct(2) and swapon(2), which a program cannot use by accident, with errnos of their own.

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/prctl.h>

#include <atomic>
#include <thread>

#include "act.h"

constexpr int kFirstErrno = 77;   // EBADFD
constexpr int kSecondErrno = 78;  // EREMCHG

static long raw_syscall3(long number, long a, long b, long c) {
  long result;
  asm volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
  return result;
}

static void install(const std::string& how, std::vector<sock_filter> code) {
  sock_fprog program{static_cast<unsigned short>(code.size()), code.data()};
  if (how == "prctl" || how == "no-spawn") {
    MUST(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program));
  } else if (how == "syscall") {
    MUST(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program));
  } else if (how == "tsync") {
    MUST(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program));
  } else if (how == "raw") {
    long result = raw_syscall3(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, reinterpret_cast<long>(&program));
    MUST(result == 0 ? 0 : -1);
  } else {
    fprintf(stderr, "unknown way \"%s\"\n", how.c_str());
    exit(2);
  }
}

static std::vector<sock_filter> answer(unsigned system_call, unsigned action) {
  return {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, system_call, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, action),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
}

// Kills on fork, vfork and clone without CLONE_THREAD; says ENOSYS to clone3, whose flags a filter cannot see.
static std::vector<sock_filter> no_spawn() {
  return {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone3, 6, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_fork, 4, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_vfork, 3, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone, 0, 4),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args[0])),
      BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, CLONE_THREAD, 2, 0),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
}

static std::string filter_count() { return act::status_field("/proc/thread-self/status", "Seccomp_filters"); }

static void expect_enforced(const std::string& who, int first_errno, int second_errno) {
  act::expect_errno(who + ": acct(2)", first_errno, syscall(SYS_acct, nullptr));
  act::expect_errno(who + ": swapon(2)", second_errno, syscall(SYS_swapon, nullptr, 0));
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  std::string how = act::args.empty() ? "prctl" : act::args[0];
  MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));

  std::atomic<int> ready{0}, proceed{0};
  auto wait_then_check = [&](std::string who, bool filtered) {
    ready++;
    proceed.wait(0);
    if (filtered) expect_enforced(who, kFirstErrno, kSecondErrno);
  };
  if (how == "no-spawn") install(how, no_spawn());
  // A thread that exists already keeps its freedom, but for TSYNC; one made later inherits both filters.
  std::thread older([&] {
    int expected = std::stoi(filter_count()) + (how == "tsync" ? 2 : 0);
    wait_then_check("older thread", how == "tsync");
    act::expect_equal("number of filters of the older thread", std::to_string(expected), filter_count());
  });
  while (ready < 1) act::sleep_ms(1);
  install(how, answer(SYS_acct, SECCOMP_RET_ERRNO | kFirstErrno));
  install(how, answer(SYS_swapon, SECCOMP_RET_ERRNO | kSecondErrno));
  std::thread younger(wait_then_check, "younger thread", true);
  while (ready < 2) act::sleep_ms(1);
  std::string filters = filter_count();

  act::intermission();

  act::expect_equal("number of filters of the main thread", filters, filter_count());
  act::expect_equal("no_new_privs", 1, prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
  expect_enforced("main thread", kFirstErrno, kSecondErrno);
  proceed = 1;
  proceed.notify_all();
  older.join();
  younger.join();
  return act::finish();
}
