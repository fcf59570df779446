#include "restart/page_reads.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstring>

#include <linux/sched.h>
#include <sched.h>
#include <signal.h>

#include "core/proc.h"
#include "player/tape.h"

namespace vmckpt {
namespace {

constexpr uint64_t kGroupBytes = 2u << 20;    // one huge page: two readers must not fault in the same one
constexpr uint64_t kHelperBytes = 16u << 20;  // less than this is not worth a thread
constexpr size_t kMostHelpers = 31;
constexpr uint64_t kHelperStackBytes = 2 * kPlayerStackBytes;

// Groups are the items whose addresses lie in the same huge page.
std::vector<uint32_t> group_starts(const std::vector<ReadItem>& items) {
  std::vector<uint32_t> starts;
  for (size_t i = 0; i < items.size(); ++i) {
    if (i == 0 || items[i].address / kGroupBytes != items[i - 1].address / kGroupBytes)
      starts.push_back(static_cast<uint32_t>(i));
  }
  starts.push_back(static_cast<uint32_t>(items.size()));
  return starts;
}

// Makes one helper and returns the word that the kernel clears when it has gone, and its tape, for the join.
std::pair<TapeWord, TapeWord> draft_helper(pid_t number, const std::vector<TapeWord>& args, TapeDraft& tape) {
  Tape head{};
  head.magic = kTapeMagic;
  head.calls = 1;
  TapeCall call{};
  call.number = kOpReadList;
  call.flags = kTapeMustSucceed;
  std::array<uint8_t, sizeof head + sizeof call> bytes;
  std::memcpy(bytes.data(), &head, sizeof head);
  std::memcpy(bytes.data() + sizeof head, &call, sizeof call);
  const TapeWord helper_tape = tape.data_of(bytes);
  for (size_t i = 0; i < args.size(); ++i) {
    tape.point(helper_tape, sizeof head + offsetof(TapeCall, args) + i * sizeof(uint64_t), args[i]);
  }
  const TapeWord word = tape.room(sizeof(int32_t));
  const int32_t wanted = number;
  clone_args made{};
  // Not traced: the supervisor need not see helpers come and go.
  made.flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | CLONE_UNTRACED |
               CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID;
  made.stack_size = kHelperStackBytes;
  made.set_tid_size = 1;
  const TapeWord argument = tape.data_of(made);
  tape.point(argument, offsetof(clone_args, stack), tape.room(kHelperStackBytes));
  tape.point(argument, offsetof(clone_args, set_tid), tape.data_of(wanted));
  tape.point(argument, offsetof(clone_args, parent_tid), word);
  tape.point(argument, offsetof(clone_args, child_tid), word);
  // May fail: then there is one reader less.
  tape.call(kOpThread, {argument, sizeof made, helper_tape});
  return {word, helper_tape};
}

}  // namespace

void PageReads::add(const PageRun& run) {
  bytes_ += run.bytes;
  for (uint64_t at = 0; at < run.bytes;) {
    const uint64_t address = run.address + at;
    const uint64_t bytes = std::min(run.bytes - at, kGroupBytes - address % kGroupBytes);
    items_.push_back({address, bytes, run.file_offset + at});
    at += bytes;
  }
}

void PageReads::draft(int image_fd, const std::vector<pid_t>& helper_numbers, TapeDraft& tape) const {
  if (items_.empty()) return;
  const std::vector<uint32_t> starts = group_starts(items_);
  std::vector<TapeWord> args(kReadListArguments);
  args[kReadListFd] = static_cast<uint64_t>(image_fd);
  args[kReadListItems] = tape.data(items_.data(), items_.size() * sizeof(ReadItem));
  args[kReadListStarts] = tape.data(starts.data(), starts.size() * sizeof(uint32_t));
  args[kReadListGroups] = starts.size() - 1;
  args[kReadListNext] = tape.room(sizeof(uint32_t));
  const size_t helpers = std::min({helper_numbers.size(), kMostHelpers, static_cast<size_t>(bytes_ / kHelperBytes)});
  std::vector<std::pair<TapeWord, TapeWord>> joins;
  for (size_t i = 0; i < helpers; ++i) joins.push_back(draft_helper(helper_numbers[i], args, tape));
  tape.call(kOpReadList, args, true, "read memory from the image");
  for (const auto& [word, helper_tape] : joins) tape.call(kOpJoin, {word, helper_tape}, true, "read memory from the image");
}

std::vector<pid_t> choose_helper_numbers(const std::vector<pid_t>& taken) {
  cpu_set_t processors;
  CPU_ZERO(&processors);
  const int count = ::sched_getaffinity(0, sizeof processors, &processors) == 0 ? CPU_COUNT(&processors) : 1;
  int64_t most = 32768;
  if (auto text = read_whole_file("/proc/sys/kernel/pid_max"); text.ok()) most = std::max<int64_t>(parse_number(*text), 301);
  std::vector<pid_t> numbers;
  constexpr pid_t kFirstOrdinary = 300;  // RESERVED_PIDS: the kernel itself gives lower ones only once
  // Numbers that the kernel will give some time from now are those that have been out of use for longest: nobody is about to send
  // a signal to what had them. Those behind the target's own are its short-lived neighbours'.
  constexpr pid_t kAhead = 100;
  pid_t number = kFirstOrdinary;
  if (auto last = read_whole_file("/proc/sys/kernel/ns_last_pid"); last.ok())
    number = static_cast<pid_t>(parse_number(*last)) + kAhead;
  for (int tries = 0; tries < 1000 && numbers.size() + 1 < static_cast<size_t>(count); ++tries) {
    if (++number >= most) number = kFirstOrdinary;
    if (std::find(taken.begin(), taken.end(), number) != taken.end()) continue;
    if (::kill(number, 0) != 0 && errno == ESRCH) numbers.push_back(number);
  }
  return numbers;
}

}  // namespace vmckpt
