// The busy program of the checkpoint storm. Its threads compute, pass tokens around and wait in every blocking call
// that can be interrupted, and count what a checkpoint must not cause: EINTR, early or wrong returns, lost tokens, lost
// ticks, money made or destroyed. In act three it prints one JSON object with all counts; the test judges them.

#include <linux/futex.h>
#include <poll.h>
#include <semaphore.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>

#include <array>
#include <atomic>
#include <mutex>
#include <thread>

#include "act.h"

static std::atomic<bool> over{false};
static std::atomic<long> interrupted{0};  // EINTR seen by anybody
static std::atomic<long> wrong{0};        // any other outcome than the expected one

static void judge(long result, int expected_errno = 0) {
  int got = result < 0 ? errno : 0;
  if (got == EINTR) {
    interrupted++;
  } else if (got != expected_errno) {
    wrong++;
  }
}

// ---- work whose invariant any lost or doubled write breaks ---------------------------------------------------------

constexpr long kAccounts = 512, kMoneyEach = 1000;
static std::array<long, kAccounts> accounts;
static std::mutex accounts_mutex;
static std::atomic<long> transfers{0};

static void pause_us(long us) {
  timespec request{0, us * 1000}, left{};
  judge(nanosleep(&request, &left));
}

static void transfer_money(uint64_t seed, bool without_rest) {
  while (!over) {
    if (!without_rest) pause_us(50);
    uint64_t word = act::next_word(seed);
    std::lock_guard hold(accounts_mutex);
    long amount = static_cast<long>(word % 100);
    accounts[word >> 32 & (kAccounts - 1)] -= amount;
    accounts[word >> 48 & (kAccounts - 1)] += amount;
    transfers++;
  }
}

// ---- tokens sent through every kind of channel ---------------------------------------------------------------------

struct Channel {
  const char* name;
  std::atomic<long> sent{0}, received{0};
  std::atomic<bool> sender_done{false};
};

static Channel by_pipe{"pipe"}, by_socket{"socket"}, by_epoll{"epoll"}, by_futex{"futex"}, by_semaphore{"semaphore"},
    by_signal{"signal"};
static Channel* const kChannels[] = {&by_pipe, &by_socket, &by_epoll, &by_futex, &by_semaphore, &by_signal};

// Each channel has a thread that sends a token about every half millisecond and one that blocks for it. After the last
// token comes a farewell that wakes the receiver once more, so that sent and received must be equal in the end.
struct TokenRing {
  int pipe_fds[2], pair[2], event, epoll;
  sem_t semaphore;
  std::atomic<uint32_t> futex_tokens{0};
  pid_t signal_tid = 0;

  TokenRing() {
    MUST(pipe2(pipe_fds, O_CLOEXEC));
    MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
    timeval minute{60, 0};
    MUST(setsockopt(pair[1], SOL_SOCKET, SO_RCVTIMEO, &minute, sizeof minute));
    event = MUST(eventfd(0, EFD_SEMAPHORE | EFD_CLOEXEC));
    epoll = MUST(epoll_create1(EPOLL_CLOEXEC));
    epoll_event registration{};
    registration.events = EPOLLIN;
    MUST(epoll_ctl(epoll, EPOLL_CTL_ADD, event, &registration));
    MUST(sem_init(&semaphore, 0, 0));
  }

  template <typename Send>
  static void send_until_over(Channel& channel, Send send) {
    while (!over) {
      channel.sent++;
      judge(send(true));
      pause_us(500);
    }
    channel.sender_done = true;
    send(false);  // the farewell
  }
};
static TokenRing* ring = nullptr;

static void send_pipe() {
  TokenRing::send_until_over(by_pipe, [](bool more) { return write(ring->pipe_fds[1], more ? "t" : "q", 1); });
}
static void receive_pipe() {
  for (char token = 0; token != 'q';) {
    ssize_t got = read(ring->pipe_fds[0], &token, 1);
    judge(got);
    if (got == 1 && token == 't') by_pipe.received++;
  }
}

static void send_socket() {
  TokenRing::send_until_over(by_socket, [](bool more) { return send(ring->pair[0], more ? "t" : "q", 1, 0); });
}
static void receive_socket() {
  for (char token = 0; token != 'q';) {
    ssize_t got = recv(ring->pair[1], &token, 1, 0);
    judge(got);
    if (got == 1 && token == 't') by_socket.received++;
  }
}

static void send_epoll() {
  TokenRing::send_until_over(by_epoll, [](bool more) {
    uint64_t one = 1;
    return more ? write(ring->event, &one, sizeof one) : 0;
  });
}
static void receive_epoll() {
  while (!by_epoll.sender_done || by_epoll.received < by_epoll.sent) {
    epoll_event ready{};
    int count = epoll_wait(ring->epoll, &ready, 1, 50);
    judge(count);
    uint64_t one = 0;
    if (count == 1 && read(ring->event, &one, sizeof one) == sizeof one) by_epoll.received += static_cast<long>(one);
  }
}

static long futex(int operation, uint32_t value) {
  return syscall(SYS_futex, &ring->futex_tokens, operation | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}
static void send_futex() {
  TokenRing::send_until_over(by_futex, [](bool) {
    ring->futex_tokens++;
    return futex(FUTEX_WAKE, 1);
  });
}
static void receive_futex() {
  for (uint32_t seen = 0; !by_futex.sender_done || by_futex.received < by_futex.sent;) {
    long result = futex(FUTEX_WAIT, seen);  // without a timeout: a lost wake-up would hang here
    if (result < 0 && errno != EAGAIN) judge(result);
    uint32_t now = ring->futex_tokens;
    by_futex.received += static_cast<long>(now - seen);
    seen = now;
  }
  if (by_futex.received > by_futex.sent) by_futex.received--;  // the farewell, which no other channel counts
}

static void send_semaphore() {
  TokenRing::send_until_over(by_semaphore, [](bool) { return sem_post(&ring->semaphore); });
}
static void receive_semaphore() {
  for (;;) {
    int result = sem_wait(&ring->semaphore);
    judge(result);
    if (by_semaphore.sender_done && by_semaphore.received >= by_semaphore.sent) return;
    if (result == 0) by_semaphore.received++;
  }
}

static void send_signal() {
  while (ring->signal_tid == 0) act::sleep_ms(1);
  TokenRing::send_until_over(by_signal, [](bool more) {
    siginfo_t info{};
    info.si_signo = SIGRTMIN + 1;
    info.si_code = SI_QUEUE;
    info.si_pid = getpid();
    info.si_uid = getuid();
    info.si_value.sival_int = more;
    return syscall(SYS_rt_tgsigqueueinfo, getpid(), ring->signal_tid, SIGRTMIN + 1, &info);
  });
}
static void receive_signal() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGRTMIN + 1);
  ring->signal_tid = gettid();
  for (siginfo_t info{};;) {
    timespec minute{60, 0};
    int number = sigtimedwait(&set, &info, &minute);
    judge(number);
    if (number < 0) continue;
    if (info.si_value.sival_int == 0) return;
    by_signal.received++;
  }
}

// ---- timeouts: never early, and not pushed back by every checkpoint ------------------------------------------------

struct Timeout {
  const char* name;
  int ms;
  int expected_errno;
  long (*wait)(int ms);
  std::atomic<long> ended{0}, early{0}, early_us_worst{0}, late_us_worst{0};
};

static timespec from_ms(int ms) { return {ms / 1000, ms % 1000 * 1'000'000L}; }

// Longer than the 50 ms between two checkpoints, so that each is interrupted at least once.
static Timeout timeouts[] = {
    {"nanosleep", 130, 0, [](int ms) -> long {
       timespec request = from_ms(ms), left{};
       return nanosleep(&request, &left);
     }},
    {"poll", 130, 0, [](int ms) -> long { return poll(nullptr, 0, ms); }},
    {"epoll_wait", 130, 0, [](int ms) -> long {
       static int empty = epoll_create1(EPOLL_CLOEXEC);
       epoll_event event;
       return epoll_wait(empty, &event, 1, ms);
     }},
    {"futex", 130, ETIMEDOUT, [](int ms) -> long {
       static std::atomic<uint32_t> word{0};
       timespec timeout = from_ms(ms);
       return syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &timeout, nullptr, 0);
     }},
    {"sem_timedwait", 130, ETIMEDOUT, [](int ms) -> long {
       static sem_t never;
       timespec until = act::to_timespec(act::now_ns() + ms * 1'000'000LL);
       return sem_clockwait(&never, CLOCK_MONOTONIC, &until);
     }},
    {"sigtimedwait", 130, EAGAIN, [](int ms) -> long {
       sigset_t set;
       sigemptyset(&set);
       sigaddset(&set, SIGRTMIN + 2);
       timespec timeout = from_ms(ms);
       return sigtimedwait(&set, nullptr, &timeout);
     }},
    {"recv with SO_RCVTIMEO", 130, EAGAIN, [](int ms) -> long {
       static int pair[2] = {-1, -1};
       timeval timeout{0, ms * 1000L};
       if (pair[0] < 0) {
         MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
         MUST(setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout));
       }
       char byte;
       return recv(pair[0], &byte, 1, 0);
     }},
};

static void wait_again_and_again(Timeout& timeout) {
  while (!over) {
    int64_t begin_ns = act::now_ns();
    judge(timeout.wait(timeout.ms), timeout.expected_errno);
    int64_t took_us = (act::now_ns() - begin_ns) / 1000;
    int64_t late_us = took_us - timeout.ms * 1000;
    if (late_us < -4000) timeout.early++;  // SO_RCVTIMEO counts in jiffies, of up to 4 ms
    timeout.early_us_worst = std::max<long>(timeout.early_us_worst, -late_us);
    timeout.late_us_worst = std::max<long>(timeout.late_us_worst, late_us);
    timeout.ended++;
  }
}

// ---- ticks ---------------------------------------------------------------------------------------------------------

static std::atomic<long> timerfd_ticks{0};

static void count_ticks(int timer) {
  while (!over) {
    uint64_t expirations = 0;
    judge(read(timer, &expirations, sizeof expirations));
    timerfd_ticks += static_cast<long>(expirations);
  }
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  sigset_t real_time;
  sigemptyset(&real_time);
  for (int i = 1; i <= 2; i++) sigaddset(&real_time, SIGRTMIN + i);
  MUST_ZERO(pthread_sigmask(SIG_BLOCK, &real_time, nullptr));
  accounts.fill(kMoneyEach);
  TokenRing the_ring;
  ring = &the_ring;

  std::vector<std::thread> threads;
  int timer = MUST(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC));
  int64_t begin_ns = act::now_ns();
  itimerspec period{{0, 5'000'000}, {0, 5'000'000}};
  MUST(timerfd_settime(timer, 0, &period, nullptr));
  threads.emplace_back(count_ticks, timer);
  threads.emplace_back(transfer_money, 1, true);
  threads.emplace_back(transfer_money, 2, false);
  for (auto body : {send_pipe, receive_pipe, send_socket, receive_socket, send_epoll, receive_epoll, send_futex,
                    receive_futex, send_semaphore, receive_semaphore, send_signal, receive_signal}) {
    threads.emplace_back(body);
  }
  for (Timeout& timeout : timeouts) threads.emplace_back(wait_again_and_again, std::ref(timeout));

  act::intermission();

  over = true;
  for (std::thread& thread : threads) thread.join();
  int64_t elapsed_ms = (act::now_ns() - begin_ns) / 1'000'000;
  long sum = 0;
  for (long account : accounts) sum += account;
  printf("{\"elapsed_ms\": %ld, \"interrupted\": %ld, \"wrong\": %ld, \"transfers\": %ld,",
         static_cast<long>(elapsed_ms), interrupted.load(), wrong.load(), transfers.load());
  printf(" \"sum\": %ld, \"expected_sum\": %ld, \"timerfd_ticks\": %ld, \"timerfd_period_ms\": 5, \"channels\": {", sum,
         kAccounts * kMoneyEach, timerfd_ticks.load());
  const char* separator = "";
  for (Channel* c : kChannels) {
    printf("%s\"%s\": {\"sent\": %ld, \"received\": %ld}", separator, c->name, c->sent.load(), c->received.load());
    separator = ", ";
  }
  printf("}, \"timeouts\": {");
  separator = "";
  for (Timeout& t : timeouts) {
    printf("%s\"%s\": {\"ms\": %d, \"ended\": %ld, \"early\": %ld, \"early_us_worst\": %ld, \"late_us_worst\": %ld}",
           separator, t.name, t.ms, t.ended.load(), t.early.load(), t.early_us_worst.load(), t.late_us_worst.load());
    separator = ", ";
  }
  printf("}}\n");
  return act::finish();
}
