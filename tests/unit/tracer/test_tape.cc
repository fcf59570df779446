// Tapes played for real: in a child process that we stop, question, and let go on.
#include "tracer/remote_tape.h"

#include <cstddef>

#include "catch.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/proc.h"
#include "player/player.h"
#include "tracer/interrupted_calls.h"
#include "tracer/ledger_reader.h"
#include "tracer/thread_state.h"

using namespace vmckpt;

namespace {

// A child with an arena, as the recorder would give it, that counts in shared memory.
struct Counter {
  explicit Counter(void (*prepare)() = nullptr) {
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
      if (prepare != nullptr) prepare();
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
      auto world = freeze(waiter.pid, Waiting::up_to(5'000'000), interrupted);
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
    auto world = freeze(waiter.pid, Waiting::up_to(5'000'000), interrupted);
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
    auto world = freeze(counter.pid, Waiting::up_to(5'000'000), interrupted);
    REQUIRE(world.ok());
    TapeDraft tape;
    size_t call = tape.call(SYS_getpid);
    const TapeWord room = tape.room(64);
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
  auto world = freeze(counter.pid, Waiting::up_to(5'000'000), interrupted);
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
    auto world = freeze(counter.pid, Waiting::up_to(5'000'000), interrupted);
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

namespace {

void handle_faults() {
  for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGSYS, SIGTRAP, SIGFPE}) ::signal(signal, [](int) { ::_exit(1); });
}

// Faults are handled, and the call getpriority is answered with SIGSYS.
void handle_faults_and_trap_a_call() {
  handle_faults();
  sock_filter code[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getpriority, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  sock_fprog program{4, code};
  ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

std::string caught_signals(pid_t pid) {
  auto status = read_status(pid);
  return status.ok() ? std::string(status_field(*status, "SigCgt")) : std::string();
}

// Plays a tape that meets a fault, and looks whether the target has noticed.
void expect_harmless(Counter& counter, TapeDraft& tape, const char* signal) {
  INFO(signal);
  REQUIRE(counter.counts());
  const std::string caught = caught_signals(counter.pid);
  {
    InterruptedCalls interrupted;
    auto world = freeze(counter.pid, Waiting::up_to(5'000'000), interrupted);
    REQUIRE(world.ok());
    auto played = play_tapes(*world, counter.ledger, {{&world->threads()[0], &tape}});
    REQUIRE_FALSE(played.ok());
    CHECK(played.error().message().find(signal) != std::string::npos);
  }
  CHECK(counter.counts());
  CHECK(caught_signals(counter.pid) == caught);
}

TapeDraft tape_of(int64_t number, const std::vector<TapeWord>& args = {}) {
  TapeDraft tape;
  tape.call(number, args);
  return tape;
}

}  // namespace

TEST_CASE("whatever fault a tape meets, the checkpoint fails and the program goes on with its handlers") {
  SECTION("an address where nothing is") {
    Counter counter(handle_faults);
    TapeDraft tape = tape_of(kOpCopyBytes, {16, 32, 8});
    expect_harmless(counter, tape, "SIGSEGV");
  }
  SECTION("a page behind the end of its file") {
    const int file = ::memfd_create("empty", MFD_CLOEXEC);
    void* page = ::mmap(nullptr, 4096, PROT_READ, MAP_SHARED, file, 0);
    Counter counter(handle_faults);
    TapeDraft tape = tape_of(kOpCopyBytes, {counter.ledger.arena, reinterpret_cast<uint64_t>(page), 8});
    expect_harmless(counter, tape, "SIGBUS");
    ::munmap(page, 4096);
    ::close(file);
  }
  SECTION("a player that may not be executed") {
    Counter counter(handle_faults);
    counter.ledger.player_entry = reinterpret_cast<uint64_t>(counter.shared);
    TapeDraft tape = tape_of(SYS_getpid);
    expect_harmless(counter, tape, "SIGSEGV");
  }
  SECTION("a player that is no code, and a breakpoint") {
    auto* code = static_cast<uint8_t*>(
        ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    code[0] = 0x0f, code[1] = 0x0b;  // ud2
    code[64] = 0xcc;                 // int3
    Counter counter(handle_faults);
    counter.ledger.player_entry = reinterpret_cast<uint64_t>(code);
    TapeDraft tape = tape_of(SYS_getpid);
    expect_harmless(counter, tape, "SIGILL");
    counter.ledger.player_entry += 64;
    expect_harmless(counter, tape, "SIGTRAP");
    ::munmap(code, 4096);
  }
  SECTION("a call that a filter answers with a signal") {
    Counter counter(handle_faults_and_trap_a_call);
    TapeDraft tape = tape_of(SYS_getpriority, {0, 0});
    expect_harmless(counter, tape, "SIGSYS");
  }
}

TEST_CASE("the ledger of a recorder that was loaded once more as data is not taken for the one in use") {
  constexpr size_t kBytes = 8192;
  auto make = [&](uint64_t player_entry) {
    void* memory = ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    auto* ledger = static_cast<Ledger*>(memory);
    ledger->magic0 = kLedgerMagic0;
    ledger->magic1 = kLedgerMagic1;
    ledger->self = reinterpret_cast<uint64_t>(memory);
    ledger->player_entry = player_entry;
    return ledger->self;
  };
  constexpr uint64_t kData = 0x10'0000, kCode = 0x20'0000;
  const uint64_t as_data = make(kData + 0x40), in_use = make(kCode + 0x40);
  auto line = [](uint64_t start, uint64_t bytes, const char* permissions) {
    return fmt::format("{:x}-{:x} {} 00000000 08:01 77 /usr/lib/libvmckpt.so\n", start, start + bytes, permissions);
  };
  const std::string maps = line(kData, 0x1000, "r--p") + line(as_data, kBytes, "rw-p") + line(kCode, 0x1000, "r-xp") +
                           line(in_use, kBytes, "rw-p");
  for (uint64_t hint : {uint64_t{0}, as_data, in_use}) {
    auto found = find_ledger(::getpid(), maps, RemoteAddr(hint));
    REQUIRE(found.ok());
    CHECK(found->value() == in_use);
  }
  ::munmap(reinterpret_cast<void*>(as_data), kBytes);
  ::munmap(reinterpret_cast<void*>(in_use), kBytes);
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
