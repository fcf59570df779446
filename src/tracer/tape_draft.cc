#include "tracer/tape_draft.h"

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>

#include <seccomp.h>

namespace vmckpt {

size_t TapeDraft::call(int64_t number, const std::vector<TapeWord>& args, bool must_succeed, std::string description) {
  // What a seccomp filter sees when the draft is tried on it: an address like any other.
  constexpr uint64_t kSomeAddress = 0x7f00'0000'0000;
  TapeCall entry{};
  entry.number = number;
  for (size_t i = 0; i < args.size(); ++i) {
    const TapeWord& word = args[i];
    if (word.kind_ == TapeWord::Kind::kNumber) {
      entry.args[i] = word.value_;
      continue;
    }
    entry.args[i] = word.kind_ == TapeWord::Kind::kRoom ? kSomeAddress + word.value_ : 0;
    arguments_.push_back({calls_.size(), i, word});
  }
  entry.flags = must_succeed ? kTapeMustSucceed : 0u;
  calls_.push_back(entry);
  descriptions_.push_back(std::move(description));
  return calls_.size() - 1;
}

TapeWord TapeDraft::room(size_t bytes) {
  // 64-byte steps: the strictest alignment that any argument needs (rseq, xsave).
  uint64_t offset = room_.size();
  room_.resize(offset + (bytes + 63) / 64 * 64);
  return TapeWord(TapeWord::Kind::kRoom, 0, offset);
}

TapeWord TapeDraft::data(const void* bytes_to_place, size_t bytes) {
  TapeWord argument = room(bytes);
  std::copy_n(static_cast<const uint8_t*>(bytes_to_place), bytes, room_.begin() + static_cast<ptrdiff_t>(argument.value_));
  return argument;
}

uint64_t known_number(const TapeWord& word, const LateNumbers& late) {
  if (word.kind_ == TapeWord::Kind::kNumber) return word.value_;
  VMCKPT_CHECK(word.kind_ == TapeWord::Kind::kLate && word.index_ < late.size());
  return late[word.index_] + word.value_;
}

std::vector<uint8_t> TapeDraft::lay_out(uint64_t address, Tape head, const LateNumbers& late) const {
  auto known = [&](const TapeWord& word) {
    return word.kind_ == TapeWord::Kind::kRoom ? address + room_offset() + word.value_ : known_number(word, late);
  };
  std::vector<uint8_t> result(bytes());
  head.magic = kTapeMagic;
  head.calls = static_cast<uint32_t>(calls_.size());
  head.failed = head.done = 0;
  std::memcpy(result.data(), &head, sizeof head);
  std::vector<TapeCall> calls = calls_;
  for (const Argument& argument : arguments_) calls[argument.call].args[argument.index] = known(argument.word);
  std::copy_n(reinterpret_cast<const uint8_t*>(calls.data()), calls.size() * sizeof(TapeCall), result.begin() + sizeof(Tape));
  std::copy(room_.begin(), room_.end(), result.begin() + static_cast<ptrdiff_t>(room_offset()));
  for (const Pointer& pointer : pointers_) {
    const uint64_t to = known(pointer.to);
    std::memcpy(result.data() + room_offset() + pointer.room_offset, &to, sizeof to);
  }
  return result;
}

size_t TapeDraft::bytes_with_texts() const {
  size_t total = bytes();
  for (const std::string& text : descriptions_) total += text.empty() ? 0 : std::min<size_t>(text.size(), kTapeTextBytes - 1) + 1;
  return total;
}

std::vector<uint8_t> TapeDraft::lay_out_with_texts(uint64_t address, Tape head, const LateNumbers& late) const {
  std::vector<uint8_t> result = lay_out(address, head, late);
  result.reserve(bytes_with_texts());
  for (size_t i = 0; i < calls_.size(); ++i) {
    const std::string& text = descriptions_[i];
    if (text.empty()) continue;
    const auto at = static_cast<uint32_t>(result.size());
    std::memcpy(result.data() + sizeof(Tape) + i * sizeof(TapeCall) + offsetof(TapeCall, text), &at, sizeof at);
    result.insert(result.end(), text.begin(),
                  text.begin() + static_cast<ptrdiff_t>(std::min<size_t>(text.size(), kTapeTextBytes - 1)));
    result.push_back(0);
  }
  return result;
}

std::vector<TapeCall> TapeDraft::plain_calls() const {
  std::vector<TapeCall> plain;
  for (const TapeCall& call : calls_) {
    if (call.number < kOpFirst) plain.push_back(call);
  }
  return plain;
}

std::string tape_call_name(int64_t number) {
  char* name = ::seccomp_syscall_resolve_num_arch(SCMP_ARCH_X86_64, static_cast<int>(number));
  std::string result = name != nullptr ? name : fmt::format("number {}", number);
  ::free(name);
  return result;
}

Result<void> TapeDraft::read_back(const std::vector<uint8_t>& bytes) {
  Tape head{};
  std::memcpy(&head, bytes.data(), sizeof head);
  std::memcpy(calls_.data(), bytes.data() + sizeof(Tape), calls_.size() * sizeof(TapeCall));
  std::copy_n(bytes.begin() + static_cast<ptrdiff_t>(room_offset()), room_.size(), room_.begin());
  if (head.failed == 0 && head.done != 1) return error("a thread came back before it had answered", "try again");
  if (head.failed == 0 || head.failed > calls_.size()) return {};
  const TapeCall& call = calls_[head.failed - 1];
  const std::string& description = descriptions_[head.failed - 1];
  errno = static_cast<int>(-call.result);
  if (!description.empty()) return errno_error(description);
  return errno_error(fmt::format("{} (arguments {:#x} {:#x} {:#x})", tape_call_name(call.number), call.args[0],
                                 call.args[1], call.args[2]));
}

}  // namespace vmckpt
