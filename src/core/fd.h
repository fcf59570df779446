// Fd owns a file descriptor; a bare `int fd` is borrowed. The helpers below retry EINTR and short transfers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <sys/types.h>

#include "core/result.h"

namespace vmckpt {

class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(other.release()) {}
  Fd& operator=(Fd&& other) noexcept;
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  ~Fd() { reset(); }

  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  explicit operator bool() const { return valid(); }
  int release() {
    int fd = fd_;
    fd_ = -1;
    return fd;
  }
  void reset();

 private:
  int fd_ = -1;
};

// The same open file at a number from `first` on (close-on-exec), or as it is if its number is one.
Result<Fd> lift_above(Fd fd, int first);

Result<Fd> open_file(const std::string& path, int flags, mode_t mode = 0);

// Whole contents of a file, /proc files included. `limit_bytes` bounds hostile input.
Result<std::string> read_whole_file(const std::string& path, size_t limit_bytes = size_t{1} << 30);
Result<std::string> read_whole_fd(int fd, const std::string& name, size_t limit_bytes = size_t{1} << 30);
Result<void> write_file(const std::string& path, const std::string& text);

// Transfers exactly `bytes` or fails; end of file is an error that says how much was missing.
Result<void> pread_exactly(int fd, void* to, size_t bytes, uint64_t offset, const std::string& name);
Result<void> pwrite_exactly(int fd, const void* from, size_t bytes, uint64_t offset, const std::string& name);
Result<void> write_exactly(int fd, const void* from, size_t bytes, const std::string& name);

Result<std::string> read_link(const std::string& path);

}  // namespace vmckpt
