// inotify: the watches keep their descriptors (also where numbers are missing between them), masks and targets; what
// happens afterwards is reported.

#include <sys/inotify.h>

#include "act.h"

static int inotify_fd = -1;

static std::vector<std::string> events() {
  alignas(inotify_event) char buffer[8192];
  ssize_t got = read(inotify_fd, buffer, sizeof buffer);
  std::vector<std::string> found;
  for (ssize_t at = 0; at < got;) {
    auto* event = reinterpret_cast<inotify_event*>(buffer + at);
    found.push_back(std::to_string(event->wd) + " " + std::to_string(event->mask) + " " +
                    (event->len > 0 ? event->name : ""));
    at += static_cast<ssize_t>(sizeof *event + event->len);
  }
  return found;
}

static void expect_event(int watch, unsigned mask, const std::string& name) {
  std::string wanted = std::to_string(watch) + " " + std::to_string(mask) + " " + name, got = "(nothing)";
  for (const std::string& event : events()) {
    got = event;
    if (event == wanted) return;
  }
  act::fail("event", wanted, got);
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  inotify_fd = MUST(inotify_init1(IN_NONBLOCK | IN_CLOEXEC));
  MUST(mkdir("watched directory", 0755));
  act::make_file("watched file", "x");
  act::make_file("another file", "x");
  int directory = MUST(inotify_add_watch(inotify_fd, "watched directory", IN_CREATE | IN_DELETE));
  int dropped = MUST(inotify_add_watch(inotify_fd, "another file", IN_OPEN));
  int file = MUST(inotify_add_watch(inotify_fd, "watched file", IN_MODIFY | IN_CLOSE_WRITE));
  MUST(inotify_rm_watch(inotify_fd, dropped));
  events();  // IN_IGNORED of the dropped one

  act::intermission();

  act::expect_equal("nothing has happened", static_cast<size_t>(0), events().size());
  act::make_file("watched directory/new file", "");
  expect_event(directory, IN_CREATE, "new file");
  MUST(unlink("watched directory/new file"));
  expect_event(directory, IN_DELETE, "new file");
  int fd = MUST(open("watched file", O_WRONLY));
  MUST(act::write_text(fd, "y"));
  expect_event(file, IN_MODIFY, "");
  close(fd);
  expect_event(file, IN_CLOSE_WRITE, "");
  act::expect_equal("changing a watch finds the old one", file,
                    inotify_add_watch(inotify_fd, "watched file", IN_ATTRIB));
  act::expect_equal("removing a watch", 0, inotify_rm_watch(inotify_fd, directory));
  int added = MUST(inotify_add_watch(inotify_fd, "another file", IN_OPEN));
  act::expect("a new watch has a new number", added != file && added != directory);
  return act::finish();
}
