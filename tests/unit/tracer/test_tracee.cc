// Who owns a traced task, and what becomes of it when its owner ends.
#include "tracer/tracee.h"

#include <utility>

#include "catch.h"
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/proc.h"
#include "tracer/thread_state.h"

using namespace vmckpt;

namespace {

// A child that counts in shared memory.
struct Counter {
  Counter() {
    shared = static_cast<volatile uint64_t*>(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    pid = ::fork();
    if (pid != 0) return;
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (;;) shared[0] = shared[0] + 1;
  }
  ~Counter() {
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
    ::munmap(const_cast<uint64_t*>(shared), 4096);
  }
  bool counts() const {
    const uint64_t before = shared[0];
    for (int i = 0; i < 500 && shared[0] == before; ++i) ::usleep(10'000);
    return shared[0] != before;
  }
  bool is_traced() const { return tracer_of(pid) != 0; }

  volatile uint64_t* shared;
  pid_t pid;
};

void stop(Tracee& tracee) {
  REQUIRE(tracee.seize(PTRACE_O_TRACESYSGOOD));
  REQUIRE(tracee.interrupt());
  REQUIRE(tracee.wait_for_stop(Waiting::up_to(20'000'000)).ok());
}

// To where there is no memory: it meets a SIGSEGV when it goes on.
void stop_and_send_elsewhere(Tracee& tracee) {
  stop(tracee);
  REQUIRE(read_thread_state(tracee).ok());
  tracee.disturbed = true;
  user_regs_struct elsewhere = tracee.regs;
  elsewhere.rip = 0;
  REQUIRE(tracee.set_registers(elsewhere));
}

}  // namespace

TEST_CASE("a task goes on untraced when its owner ends, whether it stood or ran") {
  Counter counter;
  for (bool stands : {true, false}) {
    INFO(stands);
    {
      Tracee tracee(counter.pid);
      if (stands) stop(tracee);
      else REQUIRE(tracee.seize(0));
      CHECK(counter.is_traced());
    }
    CHECK_FALSE(counter.is_traced());
    CHECK(counter.counts());
  }
}

TEST_CASE("a task whose registers were disturbed has its own again when its owner ends, even if it ran on with the others") {
  Counter counter;
  for (bool runs_on : {false, true}) {
    INFO(runs_on);
    {
      Tracee tracee(counter.pid);
      stop_and_send_elsewhere(tracee);
      if (runs_on) REQUIRE(tracee.go_on());  // into a SIGSEGV, which ptrace sees first
    }
    CHECK_FALSE(counter.is_traced());
    CHECK(counter.counts());
  }
}

TEST_CASE("a fault of a disturbed task does not reach the program, even if the interrupt comes first") {
  Counter counter;
  for (int round = 0; round < 200; ++round) {
    {
      Tracee tracee(counter.pid);
      stop_and_send_elsewhere(tracee);
      REQUIRE(tracee.go_on());
      for (volatile int wait = round * 50; wait > 0;) wait = wait - 1;  // from before the fault to after it
    }
    REQUIRE(process_exists(counter.pid));
  }
  CHECK(counter.counts());
}

TEST_CASE("a task has one owner: who has given it away does nothing to it") {
  Counter counter;
  Tracee owner;
  {
    Tracee first(counter.pid);
    stop(first);
    owner = std::move(first);
  }
  CHECK(counter.is_traced());
  owner.release();
  CHECK_FALSE(counter.is_traced());
  CHECK(counter.counts());
}

TEST_CASE("a task that is to die with its owner is killed and reaped") {
  for (auto at_end : {Tracee::AtEnd::kDies, Tracee::AtEnd::kDiesWithThreads}) {
    const pid_t child = ::fork();
    if (child == 0) {
      for (;;) ::pause();
    }
    {
      Tracee tracee(child, at_end);
      REQUIRE(tracee.seize(PTRACE_O_EXITKILL));
    }
    CHECK_FALSE(process_exists(child));
    CHECK(::waitpid(child, nullptr, WNOHANG) == -1);
  }
}

TEST_CASE("a task that cannot be attached is left alone") {
  Counter counter;
  Tracee owner(counter.pid);
  stop(owner);
  {
    Tracee second(counter.pid);
    CHECK_FALSE(second.seize(0));
    CHECK(errno == EPERM);
  }
  CHECK(counter.is_traced());
}
