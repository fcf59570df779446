// fork, vfork, posix_spawn, system() and fork+exec work before the checkpoint and after restart; the children have
// their exit statuses reaped, and SIGCHLD arrives.

#include <spawn.h>

#include <atomic>

#include "act.h"

extern char** environ;
static std::atomic<int> sigchld_count{0};

static int reap(pid_t child) {
  int status = 0;
  while (waitpid(child, &status, 0) < 0) {
    if (errno != EINTR) return -errno;
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static const char* const kShell[] = {"sh", "-c", "exit $STATUS", nullptr};
static const char* const kShellEnvironment[] = {"STATUS=23", nullptr};

static void spawn_all(const std::string& when) {
  pid_t child = MUST(fork());
  if (child == 0) _exit(21);
  act::expect_equal(when + ": fork", 21, reap(child));

  child = MUST(vfork());
  if (child == 0) {
    execve("/bin/sh", const_cast<char**>(kShell), const_cast<char**>(kShellEnvironment));
    _exit(127);
  }
  act::expect_equal(when + ": vfork and exec with an environment of its own", 23, reap(child));

  const char* const arguments[] = {"sh", "-c", "exit 24", nullptr};
  MUST_ZERO(posix_spawn(&child, "/bin/sh", nullptr, nullptr, const_cast<char**>(arguments), environ));
  act::expect_equal(when + ": posix_spawn", 24, reap(child));

  int status = system("exit 25");
  act::expect_equal(when + ": system", 25, WEXITSTATUS(status));

  child = MUST(fork());
  if (child == 0) {
    execl("/bin/sh", "sh", "-c", "kill -9 $$", nullptr);
    _exit(127);
  }
  act::expect_equal(when + ": child killed by a signal", 128 + SIGKILL, reap(child));

  FILE* output = popen("echo from a pipe", "r");
  char line[64] = "";
  act::expect(when + ": popen", output != nullptr && fgets(line, sizeof line, output) != nullptr);
  act::expect_equal(when + ": line read from a child", std::string("from a pipe\n"), std::string(line));
  act::expect_equal(when + ": pclose", 0, pclose(output));
  act::expect_errno(when + ": no child is left", ECHILD, waitpid(-1, nullptr, WNOHANG));
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  struct sigaction action {};
  action.sa_handler = [](int) { sigchld_count++; };
  action.sa_flags = SA_RESTART;
  MUST(sigaction(SIGCHLD, &action, nullptr));
  spawn_all("before");
  int before = sigchld_count;

  act::intermission();

  spawn_all("after");
  act::expect("SIGCHLD arrives", sigchld_count > before);
  return act::finish();
}
