// Sixty-four threads keep their thread ids, names, thread-local data and stacks; they can be joined afterwards (the
// kernel clears the TID word that pthread_join waits on), signalled, and new ones can be made.

#include <pthread.h>
#include <sys/prctl.h>

#include <atomic>

#include "act.h"

constexpr int kThreads = 64;

static thread_local uint64_t tls_secret = 0;
static thread_local char tls_block[1024];  // zero-initialised TLS, written below
static std::atomic<int> started{0};
static std::atomic<int> proceed{0};

struct Member {
  pthread_t handle{};
  uint64_t secret = 0;
  pid_t tid = 0;
  int exit_value = 0;
};
static Member members[kThreads];

static void* play(void* argument) {
  auto* self = static_cast<Member*>(argument);
  long index = self - members;
  std::string name = "act-thread-" + std::to_string(index);
  volatile uint64_t stack_block[512];
  self->tid = gettid();
  self->secret = act::random_u64();
  tls_secret = self->secret;
  memset(tls_block, static_cast<int>(index) + 1, sizeof tls_block);
  for (auto& word : stack_block) word = self->secret;
  MUST_ZERO(pthread_setname_np(pthread_self(), name.c_str()));

  started++;
  while (proceed == 0) proceed.wait(0);

  char got_name[16] = "";
  prctl(PR_GET_NAME, got_name);
  act::expect_equal(name + ": gettid", self->tid, gettid());
  act::expect_equal(name + ": name", name, std::string(got_name));
  act::expect_equal(name + ": name in /proc", name + "\n",
                    act::file_text("/proc/self/task/" + std::to_string(self->tid) + "/comm"));
  act::expect_equal(name + ": thread-local secret", self->secret, tls_secret);
  act::expect_equal(name + ": thread-local block", static_cast<char>(index + 1), tls_block[sizeof tls_block - 1]);
  for (auto word : stack_block) {
    if (!act::expect_equal(name + ": stack word", self->secret, static_cast<uint64_t>(word))) break;
  }
  act::expect(name + ": pthread_self", pthread_equal(pthread_self(), self->handle));
  self->exit_value = static_cast<int>(index) + 1000;
  return &self->exit_value;
}

static void* late_thread(void*) {
  tls_secret = 1;
  return reinterpret_cast<void*>(static_cast<intptr_t>(gettid()));
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  tls_secret = act::random_u64();
  uint64_t main_secret = tls_secret;
  pid_t pid = getpid();
  for (Member& member : members) MUST_ZERO(pthread_create(&member.handle, nullptr, play, &member));
  while (started < kThreads) act::sleep_ms(1);

  act::intermission();

  act::expect_equal("getpid", pid, getpid());
  act::expect_equal("main thread's tid", pid, gettid());
  act::expect_equal("number of threads", std::to_string(kThreads + 1),
                    act::status_field("/proc/self/status", "Threads"));
  for (Member& member : members) {
    act::expect_equal("tgkill with signal 0", 0, syscall(SYS_tgkill, pid, member.tid, 0));
  }
  proceed = 1;
  proceed.notify_all();
  for (Member& member : members) {
    void* value = nullptr;
    MUST_ZERO(pthread_join(member.handle, &value));
    act::expect_equal("value joined", &member.exit_value, static_cast<int*>(value));
  }
  act::expect_equal("main thread's thread-local secret", main_secret, tls_secret);

  for (int i = 0; i < 8; i++) {
    pthread_t late;
    void* late_tid = nullptr;
    MUST_ZERO(pthread_create(&late, nullptr, late_thread, nullptr));
    MUST_ZERO(pthread_join(late, &late_tid));
    act::expect("a new thread has a new tid", reinterpret_cast<intptr_t>(late_tid) != pid && late_tid != nullptr);
  }
  return act::finish();
}
