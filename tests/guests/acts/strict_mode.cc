// seccomp's strict mode, entered by children, also under a supervisor whose own filter keeps the kernel from giving it: four
// calls work, any other one ends the thread.

#include <linux/seccomp.h>
#include <sys/prctl.h>

#include "act.h"

// How a child ends that enters strict mode, by prctl or by seccomp, then writes a byte and makes `call`.
static int end_of_child(bool by_prctl, long call) {
  int ends[2];
  MUST(pipe(ends));
  const pid_t child = MUST(fork());
  if (child == 0) {
    const long entered = by_prctl ? prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT)
                                  : syscall(SYS_seccomp, SECCOMP_SET_MODE_STRICT, 0, nullptr);
    if (entered != 0) _exit(2);
    (void)!write(ends[1], "s", 1);
    syscall(call, 0);
    syscall(SYS_exit, 3);
  }
  close(ends[1]);
  char byte = 0;
  act::expect_equal("bytes that the child has written", 1, read(ends[0], &byte, 1));
  close(ends[0]);
  int status = -1;
  MUST(waitpid(child, &status, 0));
  return status;
}

static void check() {
  for (bool by_prctl : {true, false}) {
    act::expect_equal("status of a child that makes an allowed call", 0, end_of_child(by_prctl, SYS_exit));
    act::expect("a child that makes another call is killed", WIFSIGNALED(end_of_child(by_prctl, SYS_getppid)));
  }
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  check();
  act::intermission();
  check();
  return act::finish();
}
