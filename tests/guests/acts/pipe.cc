// Pipes whose two ends are in the process: content, order, flags, size; full ones, ones with packets, ones whose other
// end is closed.

#include <sys/ioctl.h>

#include "act.h"

struct Pipe {
  int read_end, write_end;
};

static Pipe make(int flags = 0) {
  int fds[2];
  MUST(pipe2(fds, flags));
  return {fds[0], fds[1]};
}

static int unread_bytes(int fd) {
  int bytes = 0;
  MUST(ioctl(fd, FIONREAD, &bytes));
  return bytes;
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  signal(SIGPIPE, SIG_IGN);
  Pipe empty = make(O_CLOEXEC);
  Pipe filled = make();
  std::string text = act::random_text(30'000);
  MUST(act::write_text(filled.write_end, text));
  int twin = MUST(dup(filled.read_end));

  Pipe full = make(O_NONBLOCK);
  int size = MUST(fcntl(full.write_end, F_SETPIPE_SZ, 256 * 1024));
  std::string full_text = act::random_text(static_cast<size_t>(size));
  act::expect_equal("filled to the brim", size, write(full.write_end, full_text.data(), full_text.size()));

  Pipe packets = make(O_DIRECT);
  for (const char* packet : {"one", "second", "the third"}) MUST(act::write_text(packets.write_end, packet));

  Pipe no_writer = make(), no_reader = make();
  MUST(act::write_text(no_writer.write_end, "last words"));
  close(no_writer.write_end);
  close(no_reader.read_end);

  Pipe partly_read = make();  // the first page is begun, and a byte-sized write follows a large one
  MUST(act::write_text(partly_read.write_end, text.substr(0, 5000)));
  MUST(act::write_text(partly_read.write_end, "!"));
  act::read_text(partly_read.read_end, 1234);
  std::vector<int> flags;
  for (Pipe p : {empty, full, packets}) flags.push_back(fcntl(p.write_end, F_GETFL));

  act::intermission();

  act::expect_equal("flags of the empty one", flags[0], fcntl(empty.write_end, F_GETFL));
  act::expect_equal("flags of the full one", flags[1], fcntl(full.write_end, F_GETFL));
  act::expect_equal("flags of the one with packets", flags[2], fcntl(packets.write_end, F_GETFL));
  act::expect_equal("close-on-exec", FD_CLOEXEC, fcntl(empty.read_end, F_GETFD));
  act::expect_equal("nothing in the empty one", 0, unread_bytes(empty.read_end));
  MUST(act::write_text(empty.write_end, "through"));
  act::expect_equal("through the empty one", std::string("through"), act::read_text(empty.read_end));

  act::expect_equal("bytes in the filled one", text.size(), unread_bytes(filled.read_end));
  act::expect("first half of it", act::read_text(filled.read_end, 15'000) == text.substr(0, 15'000));
  act::expect("second half, by the duplicate", act::read_text(twin, 15'000) == text.substr(15'000));

  act::expect_equal("size of the full one", size, fcntl(full.read_end, F_GETPIPE_SZ));
  act::expect_errno("writing to the full one", EAGAIN, write(full.write_end, "x", 1));
  std::string got;
  while (got.size() < full_text.size()) got += act::read_text(full.read_end, full_text.size() - got.size());
  act::expect("content of the full one", got == full_text);
  act::expect_errno("then it is empty", EAGAIN, read(full.read_end, got.data(), 1));

  for (const char* packet : {"one", "second", "the third"}) {
    act::expect_equal("packet", std::string(packet), act::read_text(packets.read_end));
  }
  act::expect_equal("last words", std::string("last words"), act::read_text(no_writer.read_end));
  act::expect_equal("then the end", std::string(), act::read_text(no_writer.read_end));
  act::expect_errno("writing without a reader", EPIPE, write(no_reader.write_end, "x", 1));
  act::expect("rest of the partly read one",
              act::read_text(partly_read.read_end) == text.substr(1234, 5000 - 1234) + "!");
  return act::finish();
}
