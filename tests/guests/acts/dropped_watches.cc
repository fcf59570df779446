// Watches of a program that gave up its rights: one on a file that it may not read any more, one on a file of its own. As an
// ordinary user both are its own.

#include <grp.h>
#include <sys/inotify.h>

#include "act.h"

static int inotify_fd;

static int watched() {
  alignas(inotify_event) char buffer[4096];
  ssize_t got = read(inotify_fd, buffer, sizeof buffer);
  return got < static_cast<ssize_t>(sizeof(inotify_event)) ? -1 : reinterpret_cast<inotify_event*>(buffer)->wd;
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  inotify_fd = MUST(inotify_init1(IN_NONBLOCK | IN_CLOEXEC));
  act::make_file("before", "");
  MUST(chmod("before", 0600));
  int before = MUST(inotify_add_watch(inotify_fd, "before", IN_ATTRIB | IN_MODIFY));
  int to_before = MUST(open("before", O_WRONLY | O_CLOEXEC));
  act::drop_rights();
  MUST(mkdir("own", 0755));
  act::make_file("own/after", "");
  MUST(symlink("own", "over"));
  int after = MUST(inotify_add_watch(inotify_fd, "over/after", IN_MODIFY));

  act::intermission();

  act::expect_equal("nothing has happened", -1, watched());
  MUST(write(to_before, "x", 1));
  act::expect_equal("the watch on what it may not read any more", before, watched());
  int to_after = MUST(open("own/after", O_WRONLY | O_CLOEXEC));
  MUST(write(to_after, "x", 1));
  act::expect_equal("the watch on its own", after, watched());
  return act::finish();
}
