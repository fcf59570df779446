// Threads that block in system calls during the checkpoint see nothing of it: no EINTR, no early return, no lost
// wake-up, no timeout that starts over again and again. Three kinds:
//
//   woken   blocks with a long timeout or none until act three wakes it
//   once    one timeout that begins in act one and ends after the checkpoint or during it
//   short   short timeouts in a loop, so that some are always in progress

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <semaphore.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/timerfd.h>

#include <atomic>
#include <functional>
#include <memory>
#include <thread>

#include "act.h"

static std::atomic<bool> over{false};

// Returns 0 or the errno of a call that returned -1.
static int outcome(long result) { return result < 0 ? errno : 0; }

static int make_eventfd() { return MUST(eventfd(0, EFD_CLOEXEC)); }
static void add_one(int fd) {
  uint64_t one = 1;
  MUST(write(fd, &one, sizeof one));
}

static int make_epoll(int watched) {
  int fd = MUST(epoll_create1(EPOLL_CLOEXEC));
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = 0xe9011;
  MUST(epoll_ctl(fd, EPOLL_CTL_ADD, watched, &event));
  return fd;
}

static sigset_t set_of(int signal_number) {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, signal_number);
  return set;
}

struct Waiter {
  std::string name;
  std::function<int()> block;  // 0 when woken rightly, else an errno
  std::function<void()> wake;
  std::thread thread;
  std::atomic<int> result{-1};
};
static std::vector<std::unique_ptr<Waiter>> waiters;

static void add_woken(const char* name, std::function<int()> block, std::function<void()> wake) {
  auto waiter = std::make_unique<Waiter>();
  waiter->name = name;
  waiter->block = std::move(block);
  waiter->wake = std::move(wake);
  waiters.push_back(std::move(waiter));
}

static void add_woken_waiters() {
  static int event = make_eventfd();
  add_woken("read of an eventfd", [] {
    uint64_t value;
    return outcome(read(event, &value, sizeof value));
  }, [] { add_one(event); });

  static int poll_event = make_eventfd();
  add_woken("poll without timeout", [] {
    pollfd watched{poll_event, POLLIN, 0};
    return outcome(poll(&watched, 1, -1));
  }, [] { add_one(poll_event); });

  static int ppoll_event = make_eventfd();
  add_woken("ppoll with a mask", [] {
    sigset_t mask = set_of(SIGUSR1);
    pollfd watched{ppoll_event, POLLIN, 0};
    timespec timeout{60, 0};
    int result = ppoll(&watched, 1, &timeout, &mask);
    sigset_t now;
    pthread_sigmask(SIG_SETMASK, nullptr, &now);
    act::expect("ppoll put the mask back", sigismember(&now, SIGUSR1) == 0);
    return result == 1 ? 0 : outcome(result);
  }, [] { add_one(ppoll_event); });

  static int select_event = make_eventfd();
  add_woken("select", [] {
    fd_set set;
    FD_ZERO(&set);
    FD_SET(select_event, &set);
    timeval timeout{60, 0};
    int result = select(select_event + 1, &set, nullptr, nullptr, &timeout);
    return result == 1 ? 0 : outcome(result);
  }, [] { add_one(select_event); });

  static int epoll_event_fd = make_eventfd(), epoll_fd = make_epoll(epoll_event_fd);
  add_woken("epoll_wait without timeout", [] {
    epoll_event event{};
    int result = epoll_wait(epoll_fd, &event, 1, -1);
    act::expect_equal("epoll data", 0xe9011u, static_cast<uint64_t>(event.data.u64));
    return outcome(result);
  }, [] { add_one(epoll_event_fd); });

  static int epwait_event = make_eventfd(), epwait_fd = make_epoll(epwait_event);
  add_woken("epoll_pwait with a mask", [] {
    sigset_t mask = set_of(SIGUSR2);
    epoll_event event{};
    int result = epoll_pwait(epwait_fd, &event, 1, 60'000, &mask);
    return result == 1 ? 0 : outcome(result);
  }, [] { add_one(epwait_event); });

  static int pipe_fds[2];
  MUST(pipe2(pipe_fds, O_CLOEXEC));
  add_woken("read of a pipe", [] {
    char byte;
    return outcome(read(pipe_fds[0], &byte, 1));
  }, [] { MUST(write(pipe_fds[1], "x", 1)); });

  static int full_pipe[2];
  MUST(pipe2(full_pipe, O_CLOEXEC));
  MUST(fcntl(full_pipe[1], F_SETPIPE_SZ, 4096));
  MUST(write(full_pipe[1], std::string(4096, 'f').data(), 4096));
  add_woken("write to a full pipe", [] { return outcome(write(full_pipe[1], "x", 1)); },
            [] { act::read_text(full_pipe[0], 4096); });

  static int pair[2];
  MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
  add_woken("recv", [] {
    char byte;
    return outcome(recv(pair[0], &byte, 1, 0));
  }, [] { MUST(send(pair[1], "x", 1, 0)); });

  static int timed_pair[2];
  MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, timed_pair));
  timeval minute{60, 0};
  MUST(setsockopt(timed_pair[0], SOL_SOCKET, SO_RCVTIMEO, &minute, sizeof minute));
  add_woken("recv with SO_RCVTIMEO", [] {
    char byte;
    return outcome(recv(timed_pair[0], &byte, 1, 0));
  }, [] { MUST(send(timed_pair[1], "x", 1, 0)); });

  static std::atomic<uint32_t> word{0};
  add_woken("futex wait", [] {
    return outcome(syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, nullptr, nullptr, 0));
  }, [] {
    word = 1;
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
  });

  static std::atomic<uint32_t> timed_word{0};
  add_woken("futex wait with a timeout", [] {
    timespec timeout{60, 0};
    return outcome(syscall(SYS_futex, &timed_word, FUTEX_WAIT_PRIVATE, 0, &timeout, nullptr, 0));
  }, [] {
    timed_word = 1;
    syscall(SYS_futex, &timed_word, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
  });

  static sem_t semaphore;
  MUST(sem_init(&semaphore, 0, 0));
  add_woken("sem_wait", [] { return outcome(sem_wait(&semaphore)); }, [] { sem_post(&semaphore); });

  static sem_t timed_semaphore;
  MUST(sem_init(&timed_semaphore, 0, 0));
  add_woken("sem_timedwait", [] {
    timespec until = act::to_timespec(act::now_ns(CLOCK_REALTIME) + 60'000'000'000);
    return outcome(sem_timedwait(&timed_semaphore, &until));
  }, [] { sem_post(&timed_semaphore); });

  add_woken("sigwaitinfo", [] {
    sigset_t set = set_of(SIGRTMIN + 1);
    return outcome(sigwaitinfo(&set, nullptr));
  }, [] { kill(getpid(), SIGRTMIN + 1); });

  add_woken("sigtimedwait", [] {
    sigset_t set = set_of(SIGRTMIN + 2);
    timespec timeout{60, 0};
    return outcome(sigtimedwait(&set, nullptr, &timeout));
  }, [] { kill(getpid(), SIGRTMIN + 2); });

  // Two open file descriptions of one file: locks of the same process conflict.
  static int lock_holder = MUST(open("lock", O_RDWR | O_CREAT | O_CLOEXEC, 0644));
  static int lock_waiter = MUST(open("lock", O_RDWR | O_CLOEXEC));
  MUST(flock(lock_holder, LOCK_EX));
  add_woken("flock", [] { return outcome(flock(lock_waiter, LOCK_EX)); }, [] { flock(lock_holder, LOCK_UN); });
}

struct Timed {
  const char* name;
  int expected;                            // what a timeout looks like in this call
  std::function<int(int64_t)> wait;        // waits so many ns; 0 or errno
  bool in_ms;                              // the call rounds to milliseconds
};

static int wait_in_poll(int64_t ns) { return outcome(poll(nullptr, 0, static_cast<int>(ns / 1'000'000))); }

static std::vector<Timed> timed_calls() {
  static int silent = make_eventfd(), epoll_fd = make_epoll(silent);
  static std::atomic<uint32_t> word{0};
  static sem_t semaphore;
  static bool made = (sem_init(&semaphore, 0, 0), true);
  (void)made;
  return {
      {"nanosleep", 0, [](int64_t ns) {
         timespec request = act::to_timespec(ns), left{};
         return outcome(nanosleep(&request, &left));
       }, false},
      {"clock_nanosleep, absolute", 0, [](int64_t ns) {
         timespec until = act::to_timespec(act::now_ns() + ns);
         return clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, nullptr);
       }, false},
      {"clock_nanosleep of CLOCK_BOOTTIME", 0, [](int64_t ns) {
         timespec request = act::to_timespec(ns);
         return clock_nanosleep(CLOCK_BOOTTIME, 0, &request, nullptr);
       }, false},
      {"poll", 0, wait_in_poll, true},
      {"select", 0, [](int64_t ns) {
         timeval timeout{0, ns / 1000};
         return outcome(select(0, nullptr, nullptr, nullptr, &timeout));
       }, true},
      {"epoll_wait", 0, [](int64_t ns) {
         epoll_event event;
         return outcome(epoll_wait(epoll_fd, &event, 1, static_cast<int>(ns / 1'000'000)));
       }, true},
      {"futex wait", ETIMEDOUT, [](int64_t ns) {
         timespec timeout = act::to_timespec(ns);
         return outcome(syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &timeout, nullptr, 0));
       }, false},
      {"futex wait, absolute", ETIMEDOUT, [](int64_t ns) {
         timespec until = act::to_timespec(act::now_ns() + ns);
         return outcome(syscall(SYS_futex, &word, FUTEX_WAIT_BITSET_PRIVATE, 0, &until, nullptr,
                                FUTEX_BITSET_MATCH_ANY));
       }, false},
      {"sem_clockwait", ETIMEDOUT, [](int64_t ns) {
         timespec until = act::to_timespec(act::now_ns() + ns);
         return outcome(sem_clockwait(&semaphore, CLOCK_MONOTONIC, &until));
       }, false},
      {"sigtimedwait", EAGAIN, [](int64_t ns) {
         sigset_t set = set_of(SIGRTMIN + 3);
         timespec timeout = act::to_timespec(ns);
         return outcome(sigtimedwait(&set, nullptr, &timeout));
       }, false},
      {"read of a timerfd", 0, [](int64_t ns) {
         int timer = MUST(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC));
         itimerspec once{{}, act::to_timespec(ns)};
         MUST(timerfd_settime(timer, 0, &once, nullptr));
         uint64_t expirations;
         int result = outcome(read(timer, &expirations, sizeof expirations));
         close(timer);
         return result;
       }, false},
  };
}

// One timed wait that must end as a timeout, not early, and not absurdly late.
static void wait_once(const Timed& call, int64_t ns, const char* kind) {
  constexpr int64_t kLatestNs = 30'000'000'000;
  int64_t begin_ns = act::now_ns();
  int result = call.wait(ns);
  int64_t took_ns = act::now_ns() - begin_ns;
  std::string name = std::string(kind) + " " + call.name;
  act::expect_equal(name + ": result", std::string(strerror(call.expected)), std::string(strerror(result)));
  if (took_ns < ns - (call.in_ms ? 1'000'000 : 0)) act::expect_equal(name + ": ended early, ns", ns, took_ns);
  if (took_ns > ns + kLatestNs) act::expect_equal(name + ": ended late, ns", ns, took_ns);
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  sigset_t real_time;
  sigemptyset(&real_time);
  for (int i = 1; i <= 3; i++) sigaddset(&real_time, SIGRTMIN + i);
  MUST_ZERO(pthread_sigmask(SIG_BLOCK, &real_time, nullptr));

  add_woken_waiters();
  for (auto& waiter : waiters) {
    Waiter* w = waiter.get();
    w->thread = std::thread([w] { w->result = w->block(); });
  }
  auto calls = timed_calls();
  std::vector<std::thread> timed;
  for (const Timed& call : calls) {
    timed.emplace_back([&call] { wait_once(call, 400'000'000, "once:"); });
    timed.emplace_back([&call] {
      while (!over) wait_once(call, 7'000'000, "short:");
    });
  }
  act::sleep_ms(30);

  act::intermission();

  for (auto& waiter : waiters) {
    act::expect_equal(waiter->name + ": still waiting", -1, waiter->result.load());
    waiter->wake();
    waiter->thread.join();
    act::expect_equal(waiter->name + ": result", std::string(strerror(0)), std::string(strerror(waiter->result)));
  }
  over = true;
  for (std::thread& thread : timed) thread.join();
  return act::finish();
}
