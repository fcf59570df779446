// The launched program executes another one (here: itself), and that one is checkpointed. The first argument says how:
//
//   execv       execv(3)
//   clean       execve(2) with an empty environment, so that a recorder passed by LD_PRELOAD must pass itself on
//   fexecve     fexecve(3) of a descriptor
//   thread      execv(3) from a thread that is not the main one: it takes over the process's pid
//   twice       two in a row
//   child       the program forks; the parent ends at once, the child (a daemon, adopted) is checkpointed

#include <thread>

#include "act.h"

extern char** environ;

int main(int argc, char** argv) {
  act::begin(argc, argv);
  std::string how = act::args.empty() ? "execv" : act::args[0];
  if (how != "done") {
    std::string next = how == "twice" ? "execv" : "done";
    std::string self = act::link_text("/proc/self/exe");
    const char* arguments[] = {argv[0], argv[1], next.c_str(), nullptr};
    char** list = const_cast<char**>(arguments);
    const char* empty[] = {nullptr};
    if (how == "clean") {
      execve(self.c_str(), list, const_cast<char**>(empty));
    } else if (how == "fexecve") {
      fexecve(MUST(open(self.c_str(), O_RDONLY | O_CLOEXEC)), list, environ);
    } else if (how == "thread") {
      std::thread([&] { execv(self.c_str(), list); }).join();
    } else if (how == "child") {
      if (MUST(fork()) != 0) _exit(0);
      execv(self.c_str(), list);
    } else {
      execv(self.c_str(), list);
    }
    MUST(-1);
  }

  pid_t pid = getpid();
  std::string command_line = act::file_text("/proc/self/cmdline");
  uint64_t secret = act::random_u64();
  volatile uint64_t copy = secret;

  act::intermission();

  act::expect_equal("pid", pid, getpid());
  act::expect_equal("arguments", command_line, act::file_text("/proc/self/cmdline"));
  act::expect_equal("secret", secret, static_cast<uint64_t>(copy));
  act::expect_equal("a child after restart", 3, act::in_child([] { return 3; }));
  return act::finish();
}
