// Characters on their way through a raw pseudo terminal at the checkpoint arrive, in both directions.

#include <pty.h>
#include <termios.h>

#include "act.h"

int main(int argc, char** argv) {
  act::begin(argc, argv);
  int master = -1, slave = -1;
  termios modes{};
  cfmakeraw(&modes);
  modes.c_cflag |= CS8 | CREAD;
  modes.c_cc[VMIN] = 1;
  MUST(openpty(&master, &slave, nullptr, &modes, nullptr));
  std::string keys = act::random_text(1000), screen = act::random_text(3000);
  MUST(act::write_text(master, keys));
  MUST(act::write_text(slave, screen));
  act::sleep_ms(20);
  for (int fd : {master, slave}) MUST(fcntl(fd, F_SETFL, O_RDWR | O_NONBLOCK));

  act::intermission();

  auto read_all = [](int fd, size_t bytes) {
    std::string text;
    for (int tries = 0; tries < 50 && text.size() < bytes; tries++, act::sleep_ms(2)) {
      std::string got = act::read_text(fd);
      if (got[0] != '(') text += got;
    }
    return text;
  };
  act::expect_equal("keys on their way", keys, read_all(slave, keys.size()));
  act::expect_equal("output on its way", screen, read_all(master, screen.size()));
  return act::finish();
}
