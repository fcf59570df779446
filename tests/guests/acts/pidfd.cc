// A pidfd of the process itself still means the process: it can be signalled, it is not readable (that would say
// that the process has ended), and it names the right pid.

#include <poll.h>

#include <atomic>

#include "act.h"

static std::atomic<int> got{0};

int main(int argc, char** argv) {
  act::begin(argc, argv);
  signal(SIGUSR1, [](int) { got++; });
  int self = static_cast<int>(MUST(syscall(SYS_pidfd_open, getpid(), 0)));

  act::intermission();

  act::expect_equal("close-on-exec", FD_CLOEXEC, fcntl(self, F_GETFD));
  act::expect_equal("pid", std::to_string(getpid()),
                    act::status_field("/proc/self/fdinfo/" + std::to_string(self), "Pid"));
  pollfd ready{self, POLLIN, 0};
  act::expect_equal("not readable", 0, poll(&ready, 1, 0));
  act::expect_equal("signal", 0, syscall(SYS_pidfd_send_signal, self, SIGUSR1, nullptr, 0));
  act::eventually("it arrived", [] { return got == 1; });
  return act::finish();
}
