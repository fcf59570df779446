#include "tracer/tape_draft.h"

#include <cstring>

#include "catch.h"

using namespace vmckpt;

namespace {

constexpr uint64_t kPlace = 0x7000'0000;

template <class T>
T at(const std::vector<uint8_t>& bytes, uint64_t address) {
  T value;
  std::memcpy(&value, bytes.data() + (address - kPlace), sizeof value);
  return value;
}

TapeCall call_of(const std::vector<uint8_t>& bytes, size_t index) {
  return at<TapeCall>(bytes, kPlace + sizeof(Tape) + index * sizeof(TapeCall));
}

}  // namespace

TEST_CASE("a tape is drafted before the numbers that it needs are known, and gets them when it is laid out") {
  TapeDraft tape;
  const uint64_t pointers[2] = {};
  const TapeWord room = tape.data_of(pointers);
  tape.point(room, sizeof(uint64_t), late_number(1) + 0x30);
  tape.call(1, {late_number(0), late_number(2) + 0x123456, 7, room});
  const std::vector<uint8_t> bytes = tape.lay_out(kPlace, Tape{}, {0x10000000, 0x20000000, ~uint64_t{0xffffff}});
  const TapeCall call = call_of(bytes, 0);
  CHECK(call.args[0] == 0x10000000);
  CHECK(call.args[1] == ~uint64_t{0xffffff} + 0x123456);
  CHECK(call.args[2] == 7);
  CHECK(at<uint64_t>(bytes, call.args[3]) == 0);
  CHECK(at<uint64_t>(bytes, call.args[3] + sizeof(uint64_t)) == 0x20000030);
}

// Formerly room was a number of the form 0x7ad0... and a late number one of 0x7ad1..., until the tape was laid out.
TEST_CASE("numbers that somebody else has chosen arrive as they are, as arguments and in data") {
  constexpr uint64_t kNumbers[] = {0x7ad0'0000'0000'0000, 0x7ad1'0000'0000'0000, 0x7ad1'0000'0100'0010, 0x7f00'0000'0000,
                                   0, ~uint64_t{0}};
  for (uint64_t number : kNumbers) {
    TapeDraft tape;
    const TapeWord room = tape.data_of(number);
    const TapeWord pointed = tape.room(sizeof number);
    tape.point(pointed, 0, number);
    tape.call(1, {number, late_number(0), number, room, number, pointed});
    tape.call(2, {number});
    const std::vector<uint8_t> bytes = tape.lay_out(kPlace, Tape{}, {0x10000000, 0x20000000});
    const TapeCall call = call_of(bytes, 0);
    for (size_t i : {0, 2, 4}) CHECK(call.args[i] == number);
    CHECK(call.args[1] == 0x10000000);
    CHECK(at<uint64_t>(bytes, call.args[3]) == number);
    CHECK(at<uint64_t>(bytes, call.args[5]) == number);
    CHECK(call_of(bytes, 1).args[0] == number);
  }
}
