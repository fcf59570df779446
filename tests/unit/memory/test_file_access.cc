// How restart opens files: over no link, with the target's rights, and only as what they were.
#include <fcntl.h>
#include <seccomp.h>
#include <sys/fsuid.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>

#include "catch.h"
#include "memory/file_access.h"

namespace vmckpt {
namespace {

constexpr uid_t kSomebody = 65534;

class Folder {
 public:
  Folder() : path_(::mkdtemp(name_)) { ::chmod(name_, 0755); }
  ~Folder() { std::filesystem::remove_all(path_); }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  char name_[40] = "/tmp/vmckpt-test-access-XXXXXX";
  std::string path_;
};

void make_file(const std::string& path, mode_t mode = 0644) {
  std::ofstream(path) << "text";
  ::chmod(path.c_str(), mode);
}

pb::Inode inode_at(const std::string& path) { return inode_of(Fd(::open(path.c_str(), O_PATH | O_CLOEXEC)).get()); }

FileAccess somebodys_access(bool accept_changed = false) {
  return FileAccess(FileRights{kSomebody, kSomebody}, {accept_changed, false});
}

int open_error(const FileAccess& access, const std::string& path, int flags, const pb::Inode& then = {}) {
  auto fd = access.open(path, flags, then);
  return fd.ok() ? 0 : fd.error().err != 0 ? fd.error().err : -1;
}

// In a process of its own, where openat2 may be missing as in a container whose filter does not know it.
bool holds_without_openat2(const std::function<bool()>& condition) {
  const pid_t child = ::fork();
  if (child == 0) {
    scmp_filter_ctx filter = ::seccomp_init(SCMP_ACT_ALLOW);
    ::seccomp_rule_add(filter, SCMP_ACT_ERRNO(ENOSYS), SCMP_SYS(openat2), 0);
    const bool denied = ::seccomp_load(filter) == 0 && ::syscall(__NR_openat2, AT_FDCWD, "/", nullptr, 0) < 0 && errno == ENOSYS;
    ::_exit(denied && condition() ? 0 : 1);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return status == 0;
}

}  // namespace

TEST_CASE("a symbolic link on the way to a file is refused, with openat2 and without") {
  Folder folder;
  std::filesystem::create_directories(folder / "a/b");
  make_file(folder / "a/b/file");
  std::filesystem::create_symlink("a", folder / "to-a");
  std::filesystem::create_symlink("file", folder / "a/b/to-file");
  const FileAccess own;
  auto all = [&] {
    return open_error(own, folder / "a/b/file", O_RDWR) == 0 && open_error(own, folder / "a/b", O_RDONLY | O_DIRECTORY) == 0 &&
           open_error(own, folder / "a/b/file", O_PATH) == 0 && open_error(own, "/", O_PATH) == 0 &&
           open_error(own, folder / "to-a/b/file", O_RDONLY) == ELOOP &&
           open_error(own, folder / "a/b/to-file", O_RDONLY) == ELOOP &&
           open_error(own, folder / "a/b/to-file", O_PATH) == ELOOP &&
           open_error(own, folder / "a/b/to-file", O_PATH | O_NOFOLLOW) == 0 &&
           open_error(own, folder / "a/none/file", O_RDONLY) == ENOENT &&
           open_error(own, folder / "a/b/file/below", O_RDONLY) == ENOTDIR;
  };
  CHECK(all());
  CHECK(holds_without_openat2(all));
}

TEST_CASE("an inode is the same by its number and its time of birth, or else by device and owner") {
  pb::Inode then;
  then.set_device(1);
  then.set_number(2);
  then.set_birth_ns(3);
  pb::Inode now = then;
  CHECK(is_same_inode(then, now));
  now.set_device(9);  // numbered anew by a reboot
  CHECK(is_same_inode(then, now));
  now.set_birth_ns(4);  // the number was used again
  CHECK_FALSE(is_same_inode(then, now));
  then.clear_birth_ns();
  now.clear_birth_ns();
  CHECK_FALSE(is_same_inode(then, now));
  now.set_device(1);
  CHECK(is_same_inode(then, now));
  now.set_uid(5);
  CHECK_FALSE(is_same_inode(then, now));
  CHECK_FALSE(is_same_inode({}, {}));
}

TEST_CASE("root opens for a program of somebody else what that may open, and what it had open") {
  if (::geteuid() != 0) {
    WARN("skipped: needs root");
    return;
  }
  Folder folder;
  make_file(folder / "public");
  make_file(folder / "secret", 0600);
  make_file(folder / "another", 0600);
  const FileAccess access = somebodys_access(), accepting = somebodys_access(true);
  REQUIRE(access.is_foreign());
  CHECK(open_error(access, folder / "public", O_RDONLY, inode_at(folder / "public")) == 0);
  CHECK(open_error(access, folder / "public", O_WRONLY, inode_at(folder / "secret")) != 0);
  CHECK(open_error(access, folder / "public", O_RDONLY) != 0);
  CHECK(open_error(accepting, folder / "public", O_RDONLY) == 0);
  // Its own from before: root's right is lent for that very file.
  CHECK(open_error(access, folder / "secret", O_RDWR, inode_at(folder / "secret")) == 0);
  CHECK(open_error(access, folder / "another", O_RDWR, inode_at(folder / "secret")) != 0);
  CHECK(open_error(accepting, folder / "another", O_RDWR, inode_at(folder / "secret")) == EACCES);
  CHECK_FALSE(access.create(folder / "new", O_RDWR, 0600).ok());
  ::chmod((folder / ".").c_str(), 0777);
  auto made = access.create(folder / "new", O_RDWR, 0640);
  REQUIRE(made.ok());
  CHECK(inode_of(made->get()).uid() == kSomebody);
  // And root is root again.
  CHECK(::setfsuid(uid_t(-1)) == 0);
  CHECK(::setfsgid(gid_t(-1)) == 0);
  CHECK(open_error(FileAccess(), folder / "secret", O_RDWR) == 0);
}

}  // namespace vmckpt
