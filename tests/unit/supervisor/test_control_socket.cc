#include "supervisor/control_socket.h"

#include <filesystem>

#include "catch.h"
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

using namespace vmckpt;

namespace {

struct RuntimeFolder {
  RuntimeFolder() {
    char path[] = "/tmp/vmckpt-runtime-XXXXXX";
    directory = ::mkdtemp(path);
    ::setenv("VMCKPT_RUNTIME_DIR", (directory + "/run").c_str(), 1);
  }
  ~RuntimeFolder() {
    ::unsetenv("VMCKPT_RUNTIME_DIR");
    std::filesystem::remove_all(directory);
  }
  std::string directory;
};

}  // namespace

TEST_CASE("a target's name can be a file name and nothing else") {
  for (const char* good : {"a", "qemu-system-x86_64", "vm.1", "A_b"}) CHECK(check_name(good).ok());
  for (const char* bad : {"", ".", "..", ".hidden", "a/b", "a b", "a\nb"}) CHECK_FALSE(check_name(bad).ok());
  CHECK_FALSE(check_name(std::string(101, 'a')).ok());
}

TEST_CASE("the folder for sockets is made for its owner alone") {
  RuntimeFolder folder;
  auto path = runtime_directory();
  REQUIRE(path.ok());
  struct stat info {};
  REQUIRE(::stat(path->c_str(), &info) == 0);
  CHECK((info.st_mode & 0777) == 0700);
}

TEST_CASE("a folder that others may enter is refused") {
  RuntimeFolder folder;
  REQUIRE(::mkdir((folder.directory + "/run").c_str(), 0755) == 0);
  REQUIRE(::chmod((folder.directory + "/run").c_str(), 0755) == 0);
  CHECK_FALSE(runtime_directory().ok());
}

TEST_CASE("a taken name is refused, and the socket of a supervisor that was killed is not in the way") {
  RuntimeFolder folder;
  auto first = ControlListener::create("vm");
  REQUIRE(first.ok());
  CHECK_FALSE(ControlListener::create("vm").ok());
  CHECK(free_name(*runtime_directory(), "/usr/bin/vm") == "vm-2");
  // The listening socket goes, its file stays: what SIGKILL leaves.
  const std::string path = *runtime_directory() + "/vm.sock";
  std::filesystem::rename(path, path + ".kept");
  { ControlListener gone = std::move(first).value(); }
  std::filesystem::rename(path + ".kept", path);
  CHECK(ControlListener::create("vm").ok());
}
