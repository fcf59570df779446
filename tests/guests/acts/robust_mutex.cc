// A thread dies after restart while it owns a robust mutex: the kernel walks the robust list it was told of before the
// checkpoint, and the next owner gets EOWNERDEAD. A priority-inheritance mutex that a thread waits for is handed over.

#include <linux/futex.h>
#include <pthread.h>

#include <atomic>
#include <thread>

#include "act.h"

static pthread_mutex_t robust, inheriting;
static std::atomic<int> holding{0};
static std::atomic<int> proceed{0};

static void make_mutexes() {
  pthread_mutexattr_t kind;
  MUST_ZERO(pthread_mutexattr_init(&kind));
  MUST_ZERO(pthread_mutexattr_setrobust(&kind, PTHREAD_MUTEX_ROBUST));
  MUST_ZERO(pthread_mutex_init(&robust, &kind));
  MUST_ZERO(pthread_mutexattr_init(&kind));
  MUST_ZERO(pthread_mutexattr_setprotocol(&kind, PTHREAD_PRIO_INHERIT));
  MUST_ZERO(pthread_mutex_init(&inheriting, &kind));
}

static std::pair<void*, size_t> robust_list() {
  void* head = nullptr;
  size_t bytes = 0;
  MUST(syscall(SYS_get_robust_list, 0, &head, &bytes));
  return {head, bytes};
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  make_mutexes();
  auto main_list = robust_list();

  std::thread owner([] {
    MUST_ZERO(pthread_mutex_lock(&robust));
    MUST_ZERO(pthread_mutex_lock(&inheriting));
    auto list = robust_list();
    holding = 1;
    holding.notify_all();
    proceed.wait(0);
    act::expect("robust list of the owner is kept", list == robust_list());
    MUST_ZERO(pthread_mutex_unlock(&inheriting));
  });  // ends with `robust` locked
  holding.wait(0);
  std::atomic<int> handed_over{-1};
  std::thread waiter([&] {
    handed_over = pthread_mutex_lock(&inheriting);
    pthread_mutex_unlock(&inheriting);
  });
  act::sleep_ms(20);

  act::intermission();

  act::expect("robust list of the main thread is kept", main_list == robust_list());
  act::expect_equal("the waiter still waits", -1, handed_over.load());
  proceed = 1;
  proceed.notify_all();
  owner.join();
  waiter.join();
  act::expect_equal("priority-inheritance mutex handed over", 0, handed_over.load());
  act::expect_equal("robust mutex of a dead owner", EOWNERDEAD, pthread_mutex_lock(&robust));
  MUST_ZERO(pthread_mutex_consistent(&robust));
  MUST_ZERO(pthread_mutex_unlock(&robust));
  return act::finish();
}
