// Tapes played for real: in a child process that we stop, question, and let go on.
#include "tracer/remote_tape.h"

#include <catch2/catch.hpp>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "player/player.h"
#include "tracer/interrupted_calls.h"
#include "tracer/thread_state.h"

using namespace vmckpt;

namespace {

// A child with an arena, as the recorder would give it, that counts in shared memory.
struct Counter {
  Counter() {
    shared = static_cast<volatile uint64_t*>(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    constexpr size_t kArenaBytes = 1u << 20;
    void* arena = ::mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ledger.player_entry = reinterpret_cast<uint64_t>(&vmckpt_player_entry);
    ledger.arena = reinterpret_cast<uint64_t>(arena);
    ledger.arena_slots = 16;
    ledger.arena_slot_bytes = kArenaBytes / 16;
    pid = ::fork();
    if (pid == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      for (;;) shared[0] = shared[0] + 1;
    }
  }
  ~Counter() {
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
  }
  bool counts() const {
    uint64_t before = shared[0];
    for (int i = 0; i < 200 && shared[0] == before; ++i) ::usleep(10'000);
    return shared[0] != before;
  }

  volatile uint64_t* shared;
  Ledger ledger{};
  pid_t pid;
};

// A child that waits for events that do not come, again and again, and counts how often it was told of an interruption.
struct Waiter {
  Waiter() {
    shared = static_cast<volatile uint64_t*>(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    pid = ::fork();
    if (pid != 0) return;
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    const int epoll = ::epoll_create1(EPOLL_CLOEXEC);
    for (epoll_event event{};;) {
      if (::epoll_wait(epoll, &event, 1, 20) < 0) shared[1] = shared[1] + 1;
      shared[0] = shared[0] + 1;
    }
  }
  ~Waiter() {
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
  }
  bool goes_on() const {
    const uint64_t before = shared[0];
    for (int i = 0; i < 500 && shared[0] < before + 2; ++i) ::usleep(10'000);
    return shared[0] >= before + 2;
  }

  volatile uint64_t* shared;
  pid_t pid;
};

}  // namespace

TEST_CASE("a freeze shows no interruption to the program, whether it is resumed or its supervisor is killed") {
  Waiter waiter;
  for (int i = 0; i < 20; ++i) {
    pid_t supervisor = ::fork();
    if (supervisor == 0) {
      InterruptedCalls interrupted;
      auto world = freeze(waiter.pid, 5'000'000, interrupted);
      if (i % 2 == 0) ::kill(::getpid(), SIGKILL);
      world->resume();
      ::_exit(0);
    }
    ::waitpid(supervisor, nullptr, 0);
    CHECK(waiter.goes_on());
  }
  CHECK(waiter.shared[1] == 0);
}

TEST_CASE("the end of a stopped process is left to whoever waits for his children") {
  Waiter waiter;
  {
    InterruptedCalls interrupted;
    auto world = freeze(waiter.pid, 5'000'000, interrupted);
    REQUIRE(world.ok());
    world->threads()[0].disturbed = true;
    ::kill(waiter.pid, SIGKILL);
  }
  int status = 0;
  REQUIRE(::waitpid(waiter.pid, &status, 0) == waiter.pid);
  CHECK(WIFSIGNALED(status));
}

TEST_CASE("a stopped thread answers a tape's questions and goes on where it was") {
  Counter counter;
  {
    InterruptedCalls interrupted;
    auto world = freeze(counter.pid, 5'000'000, interrupted);
    REQUIRE(world.ok());
    TapeDraft tape;
    size_t call = tape.call(SYS_getpid);
    uint64_t room = tape.room(64);
    size_t name = tape.call(SYS_prctl, {16 /* PR_GET_NAME */, room, 0, 0, 0});
    REQUIRE(play_tapes(*world, counter.ledger, {{&world->threads()[0], &tape}}).ok());
    CHECK(tape.result(call) == counter.pid);
    CHECK(tape.succeeded(name));
    CHECK(tape.as<char>(room) != '\0');
    uint64_t stopped_at = counter.shared[0];
    ::usleep(20'000);
    CHECK(counter.shared[0] == stopped_at);
  }
  CHECK(counter.counts());
}

TEST_CASE("a call that must succeed ends the tape and is named") {
  Counter counter;
  InterruptedCalls interrupted;
  auto world = freeze(counter.pid, 5'000'000, interrupted);
  REQUIRE(world.ok());
  TapeDraft tape;
  tape.call(SYS_close, {~uint64_t{0}}, true, "close a descriptor that is not open");
  size_t after = tape.call(SYS_getpid);
  auto played = play_tapes(*world, counter.ledger, {{&world->threads()[0], &tape}});
  REQUIRE_FALSE(played.ok());
  CHECK(played.error().message().find("close a descriptor that is not open") != std::string::npos);
  CHECK(tape.result(after) == 0);
}

TEST_CASE("a supervisor killed in the middle of a tape leaves a thread that goes on where it was") {
  Counter counter;
  pid_t supervisor = ::fork();
  if (supervisor == 0) {
    InterruptedCalls interrupted;
    auto world = freeze(counter.pid, 5'000'000, interrupted);
    if (!world.ok()) ::_exit(1);
    TapeDraft tape;
    timespec long_time{1, 0};
    tape.call(SYS_nanosleep, {tape.data_of(long_time), 0});
    (void)play_tapes(*world, counter.ledger, {{&world->threads()[0], &tape}});
    ::_exit(2);
  }
  ::usleep(300'000);  // it is inside the tape's nanosleep now
  ::kill(supervisor, SIGKILL);
  ::waitpid(supervisor, nullptr, 0);
  CHECK(counter.counts());
}

TEST_CASE("an interrupted call is set to be made again, a finished one is left alone") {
  user_regs_struct regs{};
  regs.orig_rax = SYS_nanosleep;
  regs.rip = 0x1002;
  regs.rax = static_cast<uint64_t>(-516);  // -ERESTART_RESTARTBLOCK
  auto again = registers_that_repeat_the_call(regs);
  CHECK(again.rip == 0x1000);
  CHECK(again.rax == SYS_nanosleep);
  regs.rax = 7;
  CHECK(registers_that_repeat_the_call(regs).rip == 0x1002);
  regs.orig_rax = ~uint64_t{0};  // not in a call at all
  regs.rax = static_cast<uint64_t>(-512);
  CHECK(registers_that_repeat_the_call(regs).rip == 0x1002);
}
