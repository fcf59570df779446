// signalfd: its mask, signals that are pending for it at the checkpoint, and signals that arrive afterwards.

#include <poll.h>
#include <sys/signalfd.h>

#include "act.h"

static signalfd_siginfo take(int fd) {
  signalfd_siginfo info{};
  if (read(fd, &info, sizeof info) != sizeof info) info.ssi_signo = 0;
  return info;
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  sigset_t set;
  sigemptyset(&set);
  for (int number : {SIGUSR1, SIGTERM, SIGRTMIN + 4}) sigaddset(&set, number);
  MUST(sigprocmask(SIG_BLOCK, &set, nullptr));
  int fd = MUST(signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC));
  sigset_t only_usr2;
  sigemptyset(&only_usr2);
  sigaddset(&only_usr2, SIGUSR2);
  MUST(sigprocmask(SIG_BLOCK, &only_usr2, nullptr));
  int other = MUST(signalfd(-1, &only_usr2, SFD_NONBLOCK));

  sigval value{};
  value.sival_int = 99;
  MUST(kill(getpid(), SIGUSR1));
  MUST(sigqueue(getpid(), SIGRTMIN + 4, value));

  act::intermission();

  act::expect_equal("flags", O_RDWR | O_NONBLOCK, fcntl(fd, F_GETFL));
  act::expect_equal("close-on-exec", FD_CLOEXEC, fcntl(fd, F_GETFD));
  act::expect_equal("pending signal", SIGUSR1, take(fd).ssi_signo);
  signalfd_siginfo queued = take(fd);
  act::expect_equal("queued signal", SIGRTMIN + 4, queued.ssi_signo);
  act::expect_equal("its value", 99, queued.ssi_int);
  act::expect_equal("then nothing", 0u, take(fd).ssi_signo);
  MUST(kill(getpid(), SIGTERM));
  MUST(kill(getpid(), SIGUSR2));
  pollfd ready{fd, POLLIN, 0};
  act::expect_equal("poll", 1, poll(&ready, 1, 1000));
  act::expect_equal("signal sent afterwards", SIGTERM, take(fd).ssi_signo);
  act::expect_equal("signal of the other one", SIGUSR2, take(other).ssi_signo);
  act::expect_equal("and nothing else", 0u, take(fd).ssi_signo);
  return act::finish();
}
