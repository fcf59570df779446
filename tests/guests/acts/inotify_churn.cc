// inotify over a long life: thousands of watches that the kernel has removed by itself, more live ones than fit the
// recorder's first table, descriptors that were duplicated and closed, a file that is watched and removed but open.
// All that is left is reported on afterwards, and a checkpoint of an ordinary user knows every path.

#include <sys/inotify.h>

#include <algorithm>

#include "act.h"

static int inotify_fd = -1;

static std::vector<std::string> events(int fd) {
  alignas(inotify_event) char buffer[65536];
  std::vector<std::string> found;
  for (ssize_t got; (got = read(fd, buffer, sizeof buffer)) > 0;) {
    for (ssize_t at = 0; at < got;) {
      auto* event = reinterpret_cast<inotify_event*>(buffer + at);
      found.push_back(std::to_string(event->wd) + " " + std::to_string(event->mask) + " " +
                      (event->len > 0 ? event->name : ""));
      at += static_cast<ssize_t>(sizeof *event + event->len);
    }
  }
  return found;
}

// Watches that end without inotify_rm_watch, each on a path of its own.
static void churn(const char* kind, int count) {
  for (int i = 0; i < count; i++) {
    std::string name = std::string(kind) + std::to_string(i);
    act::make_file(name, "");
    MUST(inotify_add_watch(inotify_fd, name.c_str(), IN_OPEN | (strcmp(kind, "once") == 0 ? IN_ONESHOT : 0)));
    close(MUST(open(name.c_str(), O_RDONLY)));
    MUST(unlink(name.c_str()));
    if (i % 1000 == 0) events(inotify_fd);
  }
  events(inotify_fd);
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  inotify_fd = MUST(inotify_init1(IN_NONBLOCK | IN_CLOEXEC));
  constexpr int kLive = 1200;

  churn("deleted", 1500);
  churn("once", 200);
  std::vector<int> live;
  for (int i = 0; i < kLive; i++) {
    std::string name = "live" + std::to_string(i);
    MUST(mkdir(name.c_str(), 0755));
    live.push_back(MUST(inotify_add_watch(inotify_fd, name.c_str(), IN_CREATE)));
  }
  churn("later", 1500);

  MUST(mkdir("twice", 0755));
  int first = MUST(inotify_init1(IN_NONBLOCK | IN_CLOEXEC));
  int on_first = MUST(inotify_add_watch(first, "twice", IN_CREATE));
  int duplicate = MUST(fcntl(first, F_DUPFD_CLOEXEC, 100));
  close(first);

  act::make_file("removed", "content");
  int removed = MUST(open("removed", O_RDWR | O_CLOEXEC));
  int on_removed = MUST(inotify_add_watch(inotify_fd, "removed", IN_MODIFY));
  MUST(unlink("removed"));
  events(inotify_fd);

  act::intermission();

  act::expect_equal("nothing has happened", static_cast<size_t>(0), events(inotify_fd).size());
  for (int i = 0; i < kLive; i++) act::make_file("live" + std::to_string(i) + "/new", "");
  std::vector<std::string> got = events(inotify_fd), wanted;
  for (int watch : live) wanted.push_back(std::to_string(watch) + " " + std::to_string(IN_CREATE) + " new");
  act::expect("each of the watches has reported", got == wanted);
  act::make_file("twice/new", "");
  act::expect("the duplicate reports", events(duplicate) == std::vector<std::string>{std::to_string(on_first) + " " +
                                                                                    std::to_string(IN_CREATE) + " new"});
  MUST(act::write_text(removed, "more"));
  act::expect("the removed file reports", events(inotify_fd) == std::vector<std::string>{std::to_string(on_removed) + " " +
                                                                                        std::to_string(IN_MODIFY) + " "});
  churn("afterwards", 1200);
  return act::finish();
}
