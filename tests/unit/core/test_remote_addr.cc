#include <cstdint>
#include <type_traits>

#include "catch.h"
#include "core/remote_addr.h"

using namespace vmckpt;

TEST_CASE("an address in another process is taken for no pointer, number or offset, nor they for it") {
  CHECK_FALSE(std::is_convertible_v<uint64_t, RemoteAddr>);
  CHECK_FALSE(std::is_convertible_v<RemoteAddr, uint64_t>);
  CHECK_FALSE(std::is_constructible_v<RemoteAddr, void*>);
  CHECK_FALSE(std::is_convertible_v<RemoteAddr, bool>);
}

TEST_CASE("addresses in another process have a distance, an order and a hexadecimal form") {
  const RemoteAddr start(0x7f00'0000'1000), end = start + 0x20;
  CHECK(end - start == 0x20);
  CHECK(end - 0x20 == start);
  CHECK(start < end);
  CHECK_FALSE(RemoteAddr());
  CHECK(fmt::format("{}", end) == "0x7f0000001020");
}
