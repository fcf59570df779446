// Named pipes: both ends in the process with content between them, one opened for reading and writing at once, one
// that waits for a writer.

#include <poll.h>

#include "act.h"

int main(int argc, char** argv) {
  act::begin(argc, argv);
  for (const char* name : {"two ends", "one end", "reader only"}) MUST(mkfifo(name, 0600));
  int read_end = MUST(open("two ends", O_RDONLY | O_NONBLOCK));
  int write_end = MUST(open("two ends", O_WRONLY | O_CLOEXEC));
  std::string text = act::random_text(20'000);
  MUST(act::write_text(write_end, text));
  int both = MUST(open("one end", O_RDWR));
  MUST(act::write_text(both, "to myself"));
  int waiting = MUST(open("reader only", O_RDONLY | O_NONBLOCK));

  act::intermission();

  act::expect("content", act::read_text(read_end, text.size()) == text);
  act::expect_errno("then it is empty", EAGAIN, read(read_end, text.data(), 1));
  act::expect_equal("the writing end does not block less", 0, fcntl(write_end, F_GETFL) & O_NONBLOCK);
  act::expect_equal("content of the one opened for both", std::string("to myself"), act::read_text(both));
  act::expect_equal("a child opens the name and writes", 0, act::in_child([] {
    int fd = open("reader only", O_WRONLY);
    return act::write_text(fd, "hello") == 5 ? 0 : 1;
  }));
  act::expect_equal("the waiting reader gets it", std::string("hello"), act::read_text(waiting));
  close(write_end);
  act::expect_equal("end of file once the writer is gone", std::string(), act::read_text(read_end));
  return act::finish();
}
