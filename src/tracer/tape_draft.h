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

// A number that is known when the tape is laid out: the `index`th of LateNumbers. Adding less than 16 MiB to it adds to that
// number.
constexpr uint64_t late_number(uint32_t index) { return 0x7ad1'0000'0000'0000 | uint64_t{index} << 24; }
using LateNumbers = std::vector<uint64_t>;

class TapeDraft {
 public:
  // Returns the call's index for result(). `description` is for the message when a must_succeed call fails.
  size_t call(int64_t number, std::vector<uint64_t> args = {}, bool must_succeed = false, std::string description = {});

  // An argument that points to `bytes` of room, or of `data`, behind the calls; pass it in `args`.
  uint64_t room(size_t bytes);
  uint64_t data(const void* bytes_to_place, size_t bytes);
  template <class T>
  uint64_t data_of(const T& value) { return data(&value, sizeof value); }

  // Makes the 8 bytes at `offset` of one room the address of another, or a late number, for structures that hold pointers.
  void point(uint64_t argument, size_t offset, uint64_t to) { pointers_.push_back({(argument & ~kRoomMask) + offset, to}); }

  int64_t result(size_t call_index) const { return calls_[call_index].result; }
  bool succeeded(size_t call_index) const { return calls_[call_index].result >= 0 || calls_[call_index].result < -4095; }
  // What lies at a room() or data() argument: after read_back() what the calls wrote there.
  const void* contents(uint64_t argument) const { return room_.data() + (argument & ~kRoomMask); }
  template <class T>
  const T& as(uint64_t argument) const { return *static_cast<const T*>(contents(argument)); }

  size_t calls() const { return calls_.size(); }
  const std::vector<TapeCall>& all_calls() const { return calls_; }
  // Those that are system calls, as drafted.
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
  // Arguments that name room carry this tag until the tape is laid out (late numbers: 0x7ad1); no user-space address or size
  // looks like it.
  static constexpr uint64_t kRoomTag = 0x7ad0'0000'0000'0000;
  static constexpr uint64_t kRoomMask = 0xffff'0000'0000'0000;
  size_t room_offset() const { return sizeof(Tape) + calls_.size() * sizeof(TapeCall); }

  struct Pointer {
    uint64_t room_offset;
    uint64_t to;
  };

  std::vector<TapeCall> calls_;
  std::vector<Pointer> pointers_;
  std::vector<std::string> descriptions_;
  std::vector<uint8_t> room_;
};

// `value`, or what it stands for if it is a late number.
uint64_t known_number(uint64_t value, const LateNumbers& late);

// For messages: a system call's name, or its number.
std::string tape_call_name(int64_t number);

}  // namespace vmckpt
