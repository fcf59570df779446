// A tape being written by hosted code: for a stopped target at checkpoint (remote_tape.h), for the new process at restart
// (restart/rebuild.h). Arguments may point to room that lies behind the calls, wherever the tape will be placed, and to places
// that are chosen when all tapes have been drafted and their size is known.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/result.h"
#include "player/tape.h"

namespace vmckpt {

// Numbers that are known when a tape is laid out.
using LateNumbers = std::vector<uint64_t>;

// What a call on a tape is given: a number; a place in the room behind the calls; or a late number. Which of them is no part of
// the number itself: an image, or a program that is asked about, may choose any.
class TapeWord {
 public:
  constexpr TapeWord(uint64_t number = 0) : value_(number) {}
  constexpr TapeWord operator+(uint64_t more) const { return TapeWord(kind_, index_, value_ + more); }
  constexpr bool operator==(const TapeWord&) const = default;

 private:
  friend class TapeDraft;
  friend constexpr TapeWord late_number(uint32_t index);
  friend uint64_t known_number(const TapeWord& word, const LateNumbers& late);
  enum class Kind : uint32_t { kNumber, kRoom, kLate };
  constexpr TapeWord(Kind kind, uint32_t index, uint64_t value) : value_(value), index_(index), kind_(kind) {}

  uint64_t value_;  // the number; the offset in the room; what is added to the late number
  uint32_t index_ = 0;
  Kind kind_ = Kind::kNumber;
};

// The `index`th of LateNumbers. What is added to it is added to that number.
constexpr TapeWord late_number(uint32_t index) { return TapeWord(TapeWord::Kind::kLate, index, 0); }

class TapeDraft {
 public:
  // Returns the call's index for result(). `description` is for the message when a must_succeed call fails.
  size_t call(int64_t number, const std::vector<TapeWord>& args = {}, bool must_succeed = false, std::string description = {});

  // An argument that points to `bytes` of room, or of `data`, behind the calls; pass it in `args`.
  TapeWord room(size_t bytes);
  TapeWord data(const void* bytes_to_place, size_t bytes);
  template <class T>
  TapeWord data_of(const T& value) { return data(&value, sizeof value); }

  // Makes the 8 bytes at `offset` of one room the address of another, or a late number, for structures that hold pointers.
  void point(const TapeWord& argument, size_t offset, const TapeWord& to) {
    pointers_.push_back({room_offset_of(argument) + offset, to});
  }

  int64_t result(size_t call_index) const { return calls_[call_index].result; }
  bool succeeded(size_t call_index) const { return calls_[call_index].result >= 0 || calls_[call_index].result < -4095; }
  // What lies at a room() or data() argument: after read_back() what the calls wrote there.
  const void* contents(const TapeWord& argument) const { return room_.data() + room_offset_of(argument); }
  template <class T>
  const T& as(const TapeWord& argument) const { return *static_cast<const T*>(contents(argument)); }

  size_t calls() const { return calls_.size(); }
  // As drafted: some address stands for room, 0 for a late number.
  const std::vector<TapeCall>& all_calls() const { return calls_; }
  // Those that are system calls.
  std::vector<TapeCall> plain_calls() const;
  size_t bytes() const { return room_offset() + room_.size(); }
  // The tape as it must lie at `address`; `head` gives the fields that are not counted here.
  std::vector<uint8_t> lay_out(uint64_t address, Tape head, const LateNumbers& late = {}) const;
  // The same with the descriptions behind it, for a tape that somebody else than the draft's owner looks at when it fails.
  size_t bytes_with_texts() const;
  std::vector<uint8_t> lay_out_with_texts(uint64_t address, Tape head, const LateNumbers& late = {}) const;
  // Takes results and room from a played tape's bytes; an Error when a must_succeed call failed.
  Result<void> read_back(const std::vector<uint8_t>& bytes);

 private:
  static uint64_t room_offset_of(const TapeWord& argument) {
    VMCKPT_CHECK(argument.kind_ == TapeWord::Kind::kRoom);
    return argument.value_;
  }
  size_t room_offset() const { return sizeof(Tape) + calls_.size() * sizeof(TapeCall); }

  struct Argument {  // that is no number yet
    size_t call;
    size_t index;
    TapeWord word;
  };
  struct Pointer {
    uint64_t room_offset;
    TapeWord to;
  };

  std::vector<TapeCall> calls_;
  std::vector<Argument> arguments_;
  std::vector<Pointer> pointers_;
  std::vector<std::string> descriptions_;
  std::vector<uint8_t> room_;
};

// A number, or what a late number is.
uint64_t known_number(const TapeWord& word, const LateNumbers& late);

// For messages: a system call's name, or its number.
std::string tape_call_name(int64_t number);

}  // namespace vmckpt
