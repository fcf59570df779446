// Has the kernel do something for it that nobody can read back, named by the first argument: the checkpoint says what a restarted
// program will not have.

#include <sys/sem.h>

#include "act.h"

int main(int argc, char** argv) {
  act::begin(argc, argv);
  const std::string kind = act::args.empty() ? "semaphore" : act::args[0];
  int set = -1;
  if (kind == "semaphore") {
    set = MUST(semget(IPC_PRIVATE, 1, 0600 | IPC_CREAT));
    sembuf give{0, 1, 0}, take{0, -1, SEM_UNDO};
    MUST(semop(set, &give, 1));
    MUST(semop(set, &take, 1));
  } else if (kind == "removed-semaphore") {
    int removed = MUST(semget(IPC_PRIVATE, 1, 0600 | IPC_CREAT));
    sembuf give{0, 1, SEM_UNDO};
    MUST(semop(removed, &give, 1));
    MUST(semctl(removed, 0, IPC_RMID));
  } else if (kind == "directory") {
    signal(SIGIO, SIG_IGN);
    if (fcntl(MUST(open(".", O_RDONLY)), F_NOTIFY, DN_CREATE | DN_MULTISHOT) != 0) act::skip("F_NOTIFY is not to be had here");
  } else if (kind == "pressure") {
    const int trigger = open("/proc/pressure/cpu", O_RDWR | O_NONBLOCK);
    if (trigger < 0 || act::write_text(trigger, "some 500000 2000000") < 0) act::skip("pressure triggers are not to be had here");
  }

  act::intermission();

  if (set >= 0) MUST(semctl(set, 0, IPC_RMID));
  return act::finish();
}
