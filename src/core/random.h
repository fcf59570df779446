// Random identities.
#pragma once

#include <array>
#include <cstdint>

#include <sys/random.h>

namespace vmckpt {

inline std::array<uint8_t, 16> random_id() {
  std::array<uint8_t, 16> id{};
  // Cannot fail for so few bytes once the system has booted (getrandom(2)).
  (void)!::getrandom(id.data(), id.size(), 0);
  return id;
}

}  // namespace vmckpt
