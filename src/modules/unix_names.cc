// Names of Unix sockets that cannot simply be bound again.
//
// A socket keeps its name when its file is removed, renamed, or replaced by something else, and when its folder is gone. The
// kernel only takes a name together with a new file of that name (unix_bind), so the file is made where it is in nobody's way:
// in a private folder that stands in for the root directory, or for the working directory where the name is relative. A child
// does that, since only a process of its own may change its root; the socket is shared with it. chroot needs CAP_SYS_CHROOT,
// which an ordinary user has in a user namespace of his own. Sources: unix(7), chroot(2), user_namespaces(7).
#include <filesystem>

#include <sched.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "modules/unix_socket.h"

namespace vmckpt {
namespace {

std::vector<std::string> components_of(const std::string& path) {
  std::vector<std::string> parts;
  for (size_t start = 0; start < path.size();) {
    size_t end = std::min(path.find('/', start), path.size());
    std::string part = path.substr(start, end - start);
    if (!part.empty() && part != ".") parts.push_back(part);
    start = end + 1;
  }
  return parts;
}

int bind_to(int fd, const std::string& address) {
  return ::bind(fd, reinterpret_cast<const sockaddr*>(address.data()), static_cast<socklen_t>(address.size()));
}

// 0, or the errno of what failed.
int bind_with_root(const std::string& root, int fd, const std::string& address) {
  if (::chroot(root.c_str()) != 0 &&
      (errno != EPERM || ::unshare(CLONE_NEWUSER) != 0 || ::chroot(root.c_str()) != 0)) {
    return errno;
  }
  if (::chdir("/") != 0) return errno;
  return bind_to(fd, address) == 0 ? 0 : errno;
}

// In a child, without a termination signal, so that nobody waits for it but us.
int bind_with_root_in_child(const std::string& root, int fd, const std::string& address) {
  long pid = ::syscall(SYS_clone, CLONE_UNTRACED, nullptr, nullptr, nullptr, 0);
  if (pid < 0) return errno;
  if (pid == 0) ::syscall(SYS_exit_group, bind_with_root(root, fd, address));
  int status = 0;
  while (::waitpid(static_cast<pid_t>(pid), &status, __WALL) < 0) {
    if (errno != EINTR) return errno;
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : EINTR;
}

int bind_with_working_directory(const std::string& folder, int fd, const std::string& address) {
  Fd here(::open(".", O_PATH | O_DIRECTORY | O_CLOEXEC));
  if (!here || ::chdir(folder.c_str()) != 0) return errno;
  int failed = bind_to(fd, address) == 0 ? 0 : errno;
  return ::fchdir(here.get()) != 0 ? errno : failed;
}

}  // namespace

Result<PrivateFolder> PrivateFolder::make(const std::string& within) {
  std::vector<std::string> places{within};
  if (within.empty()) places = {"/tmp", "/dev/shm", "/var/tmp"};
  for (const std::string& place : places) {
    std::string name = place + "/.vmckpt-socket-XXXXXX";
    if (::mkdtemp(name.data()) == nullptr) continue;
    PrivateFolder folder;
    folder.path_ = name;
    return folder;
  }
  return errno_error(fmt::format("make a directory in \"{}\"", places.front()));
}

PrivateFolder::~PrivateFolder() {
  std::error_code ignored;
  if (!path_.empty()) std::filesystem::remove_all(path_, ignored);
}

Result<std::string> PrivateFolder::bind(int fd, const std::string& address) const {
  std::string name = path_of(address);
  bool absolute = name[0] == '/';
  std::vector<std::string> parts = components_of(name), folder;
  if (parts.empty() || parts.back() == "..") return error(fmt::format("\"{}\" is no name of a socket", name));
  std::string start = path_;
  // So deep that a relative name does not lead out of it.
  for (size_t i = 0; !absolute && i < parts.size(); ++i) {
    folder.push_back("in");
    start += "/in";
  }
  for (size_t i = 0; i + 1 < parts.size(); ++i) {
    if (parts[i] != "..") folder.push_back(parts[i]);
    else if (!folder.empty()) folder.pop_back();
  }
  std::string where = path_;
  for (const std::string& part : folder) where += "/" + part;
  std::error_code failed;
  std::filesystem::create_directories(where, failed);
  std::filesystem::create_directories(start, failed);
  errno = absolute ? bind_with_root_in_child(path_, fd, address) : bind_with_working_directory(start, fd, address);
  if (errno != 0) return errno_error(fmt::format("bind to \"{}\" in a private directory", name));
  return where + "/" + parts.back();
}

bool is_roots_alone(const std::string& folder, bool or_sticky) {
  constexpr mode_t kOthersWrite = S_IWGRP | S_IWOTH;
  std::vector<std::string> parts = components_of(folder);
  std::string so_far;
  struct stat here;
  int links = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (parts[i] == "..") return false;
    // In a folder with the sticky bit others cannot exchange what is root's.
    if (::lstat((so_far + "/").c_str(), &here) != 0 || here.st_uid != 0) return false;
    if ((here.st_mode & kOthersWrite) != 0 && (here.st_mode & S_ISVTX) == 0) return false;
    std::string next = so_far + "/" + parts[i];
    if (::lstat(next.c_str(), &here) != 0 || here.st_uid != 0) return false;
    if (!S_ISLNK(here.st_mode)) {
      so_far = next;
      continue;
    }
    auto text = read_link(next);
    if (!text.ok() || ++links > 40) return false;
    std::vector<std::string> rest = components_of((*text)[0] == '/' ? *text : so_far + "/" + *text);
    rest.insert(rest.end(), parts.begin() + static_cast<ptrdiff_t>(i) + 1, parts.end());
    parts = rest;
    so_far.clear();
    i = static_cast<size_t>(-1);
  }
  return ::lstat((so_far + "/").c_str(), &here) == 0 && here.st_uid == 0 &&
         ((here.st_mode & kOthersWrite) == 0 || (or_sticky && (here.st_mode & S_ISVTX) != 0));
}

PathAddress::PathAddress(const std::string& path) {
  std::string name = path;
  if (name.size() >= sizeof address_.sun_path) {  // the folder's descriptor makes it short
    size_t slash = path.rfind('/');
    folder_ = Fd(::open(path.substr(0, slash + 1).c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
    name = fmt::format("/proc/self/fd/{}{}", folder_.get(), path.substr(slash));
  }
  if (name.size() >= sizeof address_.sun_path) return;
  address_.sun_family = AF_UNIX;
  std::memcpy(address_.sun_path, name.data(), name.size());
}

std::string PathAddress::bytes() const {
  return std::string(reinterpret_cast<const char*>(&address_), sizeof address_);
}

}  // namespace vmckpt
