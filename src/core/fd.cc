#include "core/fd.h"

#include <climits>
#include <cstdio>
#include <cstdlib>

#include <fcntl.h>
#include <unistd.h>

namespace vmckpt {

void check_failed(const char* expression, const char* file, int line) {
  std::fprintf(stderr, "vmckpt: internal check failed: %s (%s:%d)\n", expression, file, line);
  std::abort();
}

Fd& Fd::operator=(Fd&& other) noexcept {
  if (this != &other) {
    reset();
    fd_ = other.release();
  }
  return *this;
}

void Fd::reset() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

Result<Fd> lift_above(Fd fd, int first) {
  if (fd.get() >= first) return fd;
  const int lifted = ::fcntl(fd.get(), F_DUPFD_CLOEXEC, first);
  if (lifted < 0) return errno_error(fmt::format("move a descriptor above {}", first));
  return Fd(lifted);
}

Result<Fd> open_file(const std::string& path, int flags, mode_t mode) {
  int fd;
  do fd = ::open(path.c_str(), flags | O_CLOEXEC, mode);
  while (fd < 0 && errno == EINTR);
  if (fd < 0) return errno_error("open " + path);
  return Fd(fd);
}

Result<std::string> read_whole_fd(int fd, const std::string& name, size_t limit_bytes) {
  std::string text;
  size_t used = 0;
  for (;;) {
    if (text.size() - used < 4096) text.resize(text.size() < 16384 ? 32768 : text.size() * 2);
    ssize_t got = ::read(fd, text.data() + used, text.size() - used);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno_error("read " + name);
    if (got == 0) break;
    used += static_cast<size_t>(got);
    if (used > limit_bytes) return error(fmt::format("{} is larger than {} bytes", name, limit_bytes));
  }
  text.resize(used);
  return text;
}

Result<std::string> read_whole_file(const std::string& path, size_t limit_bytes) {
  Fd fd = VMCKPT_TRY(open_file(path, O_RDONLY));
  return read_whole_fd(fd.get(), path, limit_bytes);
}

Result<void> write_file(const std::string& path, const std::string& text) {
  Fd fd = VMCKPT_TRY(open_file(path, O_WRONLY));
  return write_exactly(fd.get(), text.data(), text.size(), path);
}

Result<void> pread_exactly(int fd, void* to, size_t bytes, uint64_t offset, const std::string& name) {
  char* next = static_cast<char*>(to);
  while (bytes > 0) {
    ssize_t got = ::pread(fd, next, bytes, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno_error(fmt::format("read {} at offset {}", name, offset));
    if (got == 0) return error(fmt::format("{} ends {} bytes too early, at offset {}", name, bytes, offset));
    next += got;
    bytes -= static_cast<size_t>(got);
    offset += static_cast<uint64_t>(got);
  }
  return {};
}

Result<void> pwrite_exactly(int fd, const void* from, size_t bytes, uint64_t offset, const std::string& name) {
  const char* next = static_cast<const char*>(from);
  while (bytes > 0) {
    ssize_t put = ::pwrite(fd, next, bytes, static_cast<off_t>(offset));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) return errno_error(fmt::format("write {} at offset {}", name, offset));
    next += put;
    bytes -= static_cast<size_t>(put);
    offset += static_cast<uint64_t>(put);
  }
  return {};
}

Result<void> write_exactly(int fd, const void* from, size_t bytes, const std::string& name) {
  const char* next = static_cast<const char*>(from);
  while (bytes > 0) {
    ssize_t put = ::write(fd, next, bytes);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) return errno_error("write " + name);
    next += put;
    bytes -= static_cast<size_t>(put);
  }
  return {};
}

Result<std::string> read_link(const std::string& path) {
  char target[PATH_MAX + 16];
  ssize_t length = ::readlink(path.c_str(), target, sizeof target);
  if (length < 0) return errno_error("read link " + path);
  return std::string(target, static_cast<size_t>(length));
}

}  // namespace vmckpt
