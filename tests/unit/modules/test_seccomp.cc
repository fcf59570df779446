#include "modules/seccomp.h"

#include "catch.h"
#include <linux/seccomp.h>
#include <sys/syscall.h>

using namespace vmckpt;

namespace {

pb::Thread thread_with(const FilterProgram& program) {
  pb::Thread thread;
  thread.MutableExtension(pb::seccomp)->add_filters()->set_program(program.data(), program.size() * sizeof(sock_filter));
  return thread;
}

constexpr uint64_t kNoArgs[6] = {};

}  // namespace

TEST_CASE("launch's filter denies io_uring and Linux AIO that nobody counts, and nothing else") {
  auto program = make_launch_filter();
  REQUIRE(program.ok());
  pb::Thread thread = thread_with(*program);
  auto answer = [&](int64_t number) { return evaluate_filters(thread, number, kNoArgs, 0); };
  CHECK((answer(SYS_io_uring_setup) & SECCOMP_RET_ACTION_FULL) == SECCOMP_RET_ERRNO);
  // Linux AIO is for calls that the recorder counts.
  constexpr uint64_t kCounted[6] = {1, 2, 3, 4, 5, kAioMark};
  for (int64_t number : {SYS_io_setup, SYS_io_submit}) {
    CHECK((answer(number) & SECCOMP_RET_ACTION_FULL) == SECCOMP_RET_ERRNO);
    CHECK(evaluate_filters(thread, number, kCounted, 0) == SECCOMP_RET_ALLOW);
  }
  for (int64_t number : {SYS_read, SYS_clone, SYS_ioctl, SYS_mmap, SYS_futex}) CHECK(answer(number) == SECCOMP_RET_ALLOW);
}

TEST_CASE("of several filters the most restrictive answer holds") {
  pb::Thread thread;
  for (uint32_t answer : {SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO | 13u, SECCOMP_RET_LOG}) {
    sock_filter program[] = {{BPF_RET | BPF_K, 0, 0, answer}};
    thread.MutableExtension(pb::seccomp)->add_filters()->set_program(program, sizeof program);
  }
  CHECK(evaluate_filters(thread, SYS_read, kNoArgs, 0) == (SECCOMP_RET_ERRNO | 13u));
}

TEST_CASE("a filter that looks at arguments is followed") {
  sock_filter program[] = {
      {BPF_LD | BPF_W | BPF_ABS, 0, 0, offsetof(seccomp_data, args[0])},
      {BPF_JMP | BPF_JEQ | BPF_K, 0, 1, 42},
      {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_KILL_PROCESS},
      {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW},
  };
  pb::Thread thread;
  thread.MutableExtension(pb::seccomp)->add_filters()->set_program(program, sizeof program);
  const uint64_t forbidden[6] = {42};
  CHECK(evaluate_filters(thread, SYS_prctl, forbidden, 0) == SECCOMP_RET_KILL_PROCESS);
  CHECK(evaluate_filters(thread, SYS_prctl, kNoArgs, 0) == SECCOMP_RET_ALLOW);
}

TEST_CASE("a filter that forbids a question makes the checkpoint refuse, not the target die") {
  sock_filter program[] = {
      {BPF_LD | BPF_W | BPF_ABS, 0, 0, offsetof(seccomp_data, nr)},
      {BPF_JMP | BPF_JEQ | BPF_K, 0, 1, SYS_clone},
      {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_KILL_PROCESS},
      {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW},
  };
  pb::Thread thread;
  thread.MutableExtension(pb::seccomp)->add_filters()->set_program(program, sizeof program);
  TapeDraft tape;
  tape.call(SYS_getpid);
  CHECK(check_tape_against_filters(thread, tape, TapeNeeds::kEveryCall).ok());
  auto forking = check_tape_against_filters(thread, tape, TapeNeeds::kEveryCallAndFork);
  REQUIRE_FALSE(forking.ok());
  CHECK(forking.error().message().find("clone") != std::string::npos);
}
