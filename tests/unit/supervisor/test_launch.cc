#include "supervisor/launch.h"

#include <filesystem>

#include "catch.h"
#include <stdlib.h>
#include <sys/stat.h>

#include "core/fd.h"

using namespace vmckpt;

TEST_CASE("a dynamically linked program and a script can be launched") {
  CHECK(check_program("/bin/sh").ok());
  CHECK(check_program("sh").ok());
}

TEST_CASE("a missing program is named") {
  auto result = check_program("no-such-program-anywhere");
  REQUIRE_FALSE(result.ok());
  CHECK(result.error().message().find("no-such-program-anywhere") != std::string::npos);
}

TEST_CASE("a static program is refused in one sentence") {
  if (!std::filesystem::exists("/bin/busybox")) return;  // busybox-static's
  auto result = check_program("/bin/busybox");
  REQUIRE_FALSE(result.ok());
  CHECK(result.error().message().find("statically linked") != std::string::npos);
}
