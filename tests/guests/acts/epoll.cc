// epoll: every registration with its events and data, whatever it watches (pipe, eventfd, timerfd, socket, another
// epoll), level- and edge-triggered, one-shot armed and used up, an event that is ready but not yet fetched, and a
// registration under a number that has been closed since (the open file lives on under another).

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/timerfd.h>

#include <algorithm>
#include <map>

#include "act.h"

static int epoll_fd = -1;

struct BusyPoll {  // struct epoll_params (linux/eventpoll.h)
  uint32_t microseconds;
  uint16_t budget;
  uint8_t prefer, padding;
};
constexpr unsigned long kSetBusyPoll = _IOW(0x8a, 0x01, BusyPoll), kGetBusyPoll = _IOR(0x8a, 0x02, BusyPoll);

static void add(int epoll, int fd, uint32_t events, uint64_t data) {
  epoll_event event{};
  event.events = events;
  event.data.u64 = data;
  MUST(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
}

static void add_one(int fd) {
  uint64_t one = 1;
  MUST(write(fd, &one, sizeof one));
}

// What is ready now: data -> events.
static std::map<uint64_t, uint32_t> ready(int epoll, int timeout_ms) {
  epoll_event events[32];
  std::map<uint64_t, uint32_t> found;
  int count = epoll_wait(epoll, events, 32, timeout_ms);
  for (int i = 0; i < count; i++) found[events[i].data.u64] = events[i].events;
  return found;
}

// The registrations as the kernel lists them, without the inode, and without the events of a used-up one-shot: it has
// none, but can only be made again with EPOLLERR and EPOLLHUP, which the kernel adds.
static std::vector<std::string> registrations(int epoll) {
  std::vector<std::string> found;
  for (const std::string& line : act::lines_of(act::file_text("/proc/self/fdinfo/" + std::to_string(epoll)))) {
    int fd;
    unsigned events;
    unsigned long data;
    if (std::sscanf(line.c_str(), "tfd: %d events: %x data: %lx", &fd, &events, &data) != 3) continue;
    if ((events & EPOLLONESHOT) != 0 && (events & EPOLLIN) == 0) events = EPOLLONESHOT;
    found.push_back("fd " + std::to_string(fd) + " events " + std::to_string(events) + " data " + std::to_string(data));
  }
  std::sort(found.begin(), found.end());
  return found;
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  epoll_fd = MUST(epoll_create1(EPOLL_CLOEXEC));
  int level = MUST(eventfd(0, EFD_NONBLOCK)), edge = MUST(eventfd(0, EFD_NONBLOCK));
  int once_armed = MUST(eventfd(0, EFD_NONBLOCK)), once_used = MUST(eventfd(0, EFD_NONBLOCK));
  int waiting = MUST(eventfd(0, EFD_NONBLOCK)), edge_waiting = MUST(eventfd(0, EFD_NONBLOCK));
  int pipe_fds[2], pair[2];
  MUST(pipe(pipe_fds));
  MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
  int timer = MUST(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK));
  int inner = MUST(epoll_create1(0)), in_inner = MUST(eventfd(0, EFD_NONBLOCK));
  int registered = MUST(eventfd(0, EFD_NONBLOCK));

  // Linux 6.9; before that the request is unknown, and the answer stays as it is.
  BusyPoll busy_poll{50, 8, 1, 0};
  const bool has_busy_poll = ioctl(epoll_fd, kSetBusyPoll, &busy_poll) == 0;

  add(epoll_fd, level, EPOLLIN, 0x1111'2222'3333'4444);
  add(epoll_fd, edge, EPOLLIN | EPOLLET, 2);
  add(epoll_fd, once_armed, EPOLLIN | EPOLLONESHOT, 3);
  add(epoll_fd, once_used, EPOLLIN | EPOLLONESHOT, 4);
  add(epoll_fd, pipe_fds[0], EPOLLIN | EPOLLEXCLUSIVE, 5);
  add(epoll_fd, pair[0], EPOLLIN | EPOLLOUT | EPOLLPRI | EPOLLET, UINT64_MAX);
  add(epoll_fd, timer, EPOLLIN, 7);
  add(inner, in_inner, EPOLLIN, 80);
  add(epoll_fd, inner, EPOLLIN, 8);
  add(epoll_fd, waiting, EPOLLIN, 9);
  add(epoll_fd, edge_waiting, EPOLLIN | EPOLLET, 10);
  add(epoll_fd, registered, EPOLLIN | EPOLLRDHUP, 11);
  int moved = MUST(fcntl(registered, F_DUPFD, 50));
  close(registered);
  add_one(once_used);
  ready(epoll_fd, 0);  // uses up the one-shot and the socket's first edge
  itimerspec soon{{}, act::to_timespec(200'000'000)};
  MUST(timerfd_settime(timer, 0, &soon, nullptr));
  add_one(waiting);
  add_one(edge_waiting);
  auto before = registrations(epoll_fd);

  act::intermission();

  if (has_busy_poll) {
    busy_poll = {};
    MUST(ioctl(epoll_fd, kGetBusyPoll, &busy_poll));
    act::expect_equal("busy polling: microseconds", 50u, busy_poll.microseconds);
    act::expect_equal("busy polling: budget", 8, busy_poll.budget);
    act::expect_equal("busy polling: preferred", 1, busy_poll.prefer);
  }

  auto after = registrations(epoll_fd);
  act::expect_equal("number of registrations", before.size(), after.size());
  for (size_t i = 0; i < std::min(before.size(), after.size()); i++) {
    act::expect_equal("registration", before[i], after[i]);
  }
  auto first = ready(epoll_fd, 0);
  act::expect_equal("level-triggered event not yet fetched", EPOLLIN, first[9]);
  act::expect_equal("edge-triggered event not yet fetched", EPOLLIN, first[10]);
  act::expect_equal("used-up one-shot stays silent", 0u, first.count(4));
  act::expect_equal("level-triggered event again", EPOLLIN, ready(epoll_fd, 0)[9]);

  for (int fd : {level, edge, once_armed, in_inner, moved}) add_one(fd);
  MUST(write(pipe_fds[1], "x", 1));
  MUST(write(pair[1], "x", 1));
  auto second = ready(epoll_fd, 0);
  act::expect_equal("level-triggered", EPOLLIN, second[0x1111'2222'3333'4444]);
  act::expect_equal("edge-triggered", EPOLLIN, second[2]);
  act::expect_equal("one-shot", EPOLLIN, second[3]);
  act::expect_equal("pipe", EPOLLIN, second[5]);
  act::expect_equal("socket, edge-triggered", EPOLLIN | EPOLLOUT, second[UINT64_MAX]);
  act::expect_equal("epoll in epoll", EPOLLIN, second[8]);
  act::expect_equal("event in the inner one", EPOLLIN, ready(inner, 0)[80]);
  act::expect_equal("registration under a closed number", EPOLLIN, second[11]);
  auto third = ready(epoll_fd, 0);
  act::expect_equal("level-triggered goes on", EPOLLIN, third[0x1111'2222'3333'4444]);
  act::expect_equal("edge-triggered is over", 0u, third.count(2));
  act::expect_equal("one-shot is over", 0u, third.count(3));

  epoll_event rearm{};
  rearm.events = EPOLLIN | EPOLLONESHOT;
  rearm.data.u64 = 4;
  act::expect_equal("the used-up one-shot can be armed again", 0,
                    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, once_used, &rearm));
  act::expect_equal("and fires", EPOLLIN, ready(epoll_fd, 0)[4]);
  act::eventually("the timer fires", [] { return ready(epoll_fd, 10).count(7) == 1; });
  act::expect_equal("a registration can be removed", 0, epoll_ctl(epoll_fd, EPOLL_CTL_DEL, level, nullptr));
  return act::finish();
}
