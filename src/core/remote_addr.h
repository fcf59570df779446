// An address in another process. A type of its own, so that it cannot be taken for a pointer here, for a file's offset or for a
// count of bytes. Registers, arguments of tapes, the recorder's tables and images hold plain numbers: whoever takes an address
// out of them, or puts one in, says so.
#pragma once

#include <compare>
#include <cstdint>

#include <fmt/format.h>

namespace vmckpt {

class RemoteAddr {
 public:
  constexpr RemoteAddr() = default;  // none
  explicit constexpr RemoteAddr(uint64_t value) : value_(value) {}

  constexpr uint64_t value() const { return value_; }
  explicit constexpr operator bool() const { return value_ != 0; }
  constexpr auto operator<=>(const RemoteAddr&) const = default;

  constexpr RemoteAddr operator+(uint64_t bytes) const { return RemoteAddr(value_ + bytes); }
  constexpr RemoteAddr operator-(uint64_t bytes) const { return RemoteAddr(value_ - bytes); }
  constexpr uint64_t operator-(RemoteAddr other) const { return value_ - other.value_; }  // bytes
  constexpr RemoteAddr& operator+=(uint64_t bytes) {
    value_ += bytes;
    return *this;
  }

 private:
  uint64_t value_ = 0;
};

static_assert(sizeof(RemoteAddr) == sizeof(uint64_t));  // structures that are read from another process may hold it

}  // namespace vmckpt

// Always hexadecimal, with 0x.
template <>
struct fmt::formatter<vmckpt::RemoteAddr> {
  constexpr auto parse(format_parse_context& context) { return context.begin(); }
  auto format(vmckpt::RemoteAddr address, format_context& context) const {
    return fmt::format_to(context.out(), "{:#x}", address.value());
  }
};
