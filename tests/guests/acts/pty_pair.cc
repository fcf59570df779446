// A pseudo terminal both of whose ends are in the process: modes, window size, packet mode, characters both ways, echo
// and line editing as set. The name of the slave may change.

#include <pty.h>
#include <sys/ioctl.h>
#include <termios.h>

#include "act.h"

struct Terminal {
  int master, slave;
  termios modes;
};

static Terminal make(bool raw) {
  Terminal t{};
  winsize size{};
  size.ws_row = raw ? 33 : 24;
  size.ws_col = raw ? 111 : 80;
  MUST(openpty(&t.master, &t.slave, nullptr, nullptr, &size));
  MUST(tcgetattr(t.slave, &t.modes));
  if (raw) cfmakeraw(&t.modes);
  t.modes.c_cc[VMIN] = 1;
  t.modes.c_cc[VERASE] = '\b';
  MUST(tcsetattr(t.slave, TCSANOW, &t.modes));
  MUST(tcgetattr(t.slave, &t.modes));
  return t;
}

static void expect_same(const std::string& what, const Terminal& t, int rows, int columns) {
  termios now{};
  MUST(tcgetattr(t.slave, &now));
  act::expect_equal(what + ": input modes", t.modes.c_iflag, now.c_iflag);
  act::expect_equal(what + ": output modes", t.modes.c_oflag, now.c_oflag);
  act::expect_equal(what + ": control modes", t.modes.c_cflag, now.c_cflag);
  act::expect_equal(what + ": local modes", t.modes.c_lflag, now.c_lflag);
  act::expect(what + ": control characters", memcmp(t.modes.c_cc, now.c_cc, sizeof now.c_cc) == 0);
  winsize size{};
  MUST(ioctl(t.master, TIOCGWINSZ, &size));
  act::expect_equal(what + ": rows", rows, size.ws_row);
  act::expect_equal(what + ": columns", columns, size.ws_col);
  act::expect_equal(what + ": both are terminals", 2, isatty(t.master) + isatty(t.slave));
  char name[128] = "";
  act::expect_equal(what + ": the master knows its slave", 0, ptsname_r(t.master, name, sizeof name));
  act::expect_equal(what + ": and it is the one held open", std::string(name), std::string(ttyname(t.slave)));
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  Terminal raw = make(true), cooked = make(false);
  MUST(fcntl(raw.master, F_SETFL, O_RDWR | O_NONBLOCK));
  int twin = MUST(fcntl(cooked.slave, F_DUPFD_CLOEXEC, 90));
  int one = 1;
  MUST(ioctl(cooked.master, TIOCPKT, &one));

  act::intermission();

  expect_same("raw", raw, 33, 111);
  expect_same("cooked", cooked, 24, 80);
  act::expect_equal("flags", O_NONBLOCK, fcntl(raw.master, F_GETFL) & O_NONBLOCK);
  MUST(act::write_text(raw.master, "keys\r"));
  act::expect_equal("raw: to the slave", std::string("keys\r"), act::read_text(raw.slave));
  MUST(act::write_text(raw.slave, "screen\n"));
  act::expect_equal("raw: to the master", std::string("screen\n"), act::read_text(raw.master));

  int packet_mode = 0;
  MUST(ioctl(cooked.master, TIOCGPKT, &packet_mode));
  act::expect_equal("packet mode", 1, packet_mode);
  int off = 0;
  MUST(ioctl(cooked.master, TIOCPKT, &off));
  MUST(act::write_text(cooked.master, "typoo\b\n"));
  act::expect_equal("cooked: line edited", std::string("typo\n"), act::read_text(twin));
  act::expect_equal("cooked: echo", std::string("typoo\b \b\r\n"), act::read_text(cooked.master));
  return act::finish();
}
