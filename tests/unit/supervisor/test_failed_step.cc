#include <cerrno>
#include <cstring>

#include "catch.h"
#include <sys/syscall.h>
#include <unistd.h>

#include "supervisor/failed_step.h"
#include "tracer/tape_draft.h"

namespace vmckpt {
namespace {

// The message about a tape of which `call` failed with `err`, as the player would have left it in our own memory.
std::string message_of(const TapeDraft& tape, size_t call, int err) {
  std::vector<uint8_t> memory(tape.bytes_with_texts());
  const std::vector<uint8_t> bytes = tape.lay_out_with_texts(reinterpret_cast<uint64_t>(memory.data()), Tape{});
  REQUIRE(bytes.size() == memory.size());
  std::memcpy(memory.data(), bytes.data(), bytes.size());
  auto* laid_out = reinterpret_cast<Tape*>(memory.data());
  laid_out->failed = static_cast<uint32_t>(call) + 1;
  laid_out->done = 1;
  laid_out->call[call].result = -err;
  auto checked = check_tape(::getpid(), 8, RemoteAddr(reinterpret_cast<uint64_t>(memory.data())));
  REQUIRE_FALSE(checked.ok());
  return checked.error().message();
}

}  // namespace

TEST_CASE("a step of a restart that fails is told in words, with what to do") {
  TapeDraft tape;
  tape.call(SYS_getpid);
  const size_t groups = tape.call(SYS_setgroups, {0, 0}, true, "set the supplementary groups 4, 24 of thread 8");
  const size_t mapping = tape.call(SYS_mmap, {0x7f0000000000, 4096, 3, 0x22}, true, "map memory");

  CHECK(message_of(tape, groups, EPERM) ==
        "set the supplementary groups 4, 24 of thread 8 (setgroups, step 2 of 3 of thread 8): Operation not permitted (EPERM); "
        "restart as root of the host, or leave the user namespace that denies setgroups");
  CHECK_THAT(message_of(tape, mapping, ENOMEM), Contains("map memory") && Contains("vm.max_map_count"));
}

TEST_CASE("a step without a description names its call and arguments") {
  TapeDraft tape;
  const size_t call = tape.call(SYS_close, {0x77}, true);
  CHECK_THAT(message_of(tape, call, EBADF), Contains("close(0x77, 0x0"));
}

TEST_CASE("a tape that was played to its end is no error") {
  TapeDraft tape;
  tape.call(SYS_getpid, {}, true, "nothing");
  std::vector<uint8_t> bytes = tape.lay_out_with_texts(0, Tape{});
  reinterpret_cast<Tape*>(bytes.data())->done = 1;
  CHECK(check_tape(::getpid(), 8, RemoteAddr(reinterpret_cast<uint64_t>(bytes.data()))).ok());
}

}  // namespace vmckpt
