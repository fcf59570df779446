// glibc registers a restartable-sequences area for every thread; the kernel must know it again after restart: it keeps
// cpu_id up to date there, and says EBUSY to a second registration of the same area (EINVAL or success otherwise).

#include <sched.h>
#include <sys/rseq.h>

#include <atomic>
#include <thread>

#include "act.h"

static volatile struct rseq* area() {
  return reinterpret_cast<volatile struct rseq*>(static_cast<char*>(__builtin_thread_pointer()) + __rseq_offset);
}

static void expect_registered(const std::string& who) {
  int again = static_cast<int>(
      syscall(SYS_rseq, const_cast<struct rseq*>(area()), sizeof(struct rseq), 0, RSEQ_SIG));
  act::expect_errno(who + ": registering the same area again", EBUSY, again);

  cpu_set_t allowed, one;
  MUST(sched_getaffinity(0, sizeof allowed, &allowed));
  for (unsigned cpu = 0; cpu < CPU_SETSIZE; cpu++) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    MUST(sched_setaffinity(0, sizeof one, &one));
    act::expect_equal(who + ": cpu_id follows the thread", cpu, area()->cpu_id);
    act::expect_equal(who + ": cpu_id_start", cpu, area()->cpu_id_start);
  }
  MUST(sched_setaffinity(0, sizeof allowed, &allowed));
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  if (__rseq_size == 0) act::skip("this C library has not registered rseq");
  std::atomic<int> proceed{0};
  auto play = [&](std::string who) {
    proceed.wait(0);
    expect_registered(who);
  };
  std::thread first(play, "first thread"), second(play, "second thread");

  act::intermission();

  proceed = 1;
  proceed.notify_all();
  first.join();
  second.join();
  expect_registered("main thread");
  std::thread([] { expect_registered("thread made after restart"); }).join();
  return act::finish();
}
