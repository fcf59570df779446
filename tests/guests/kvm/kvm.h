// SPDX-License-Identifier: Apache-2.0
//
// Calls to the kernel that must succeed, and what owns a descriptor or a mapping.

#pragma once

#include <linux/stddef.h>
// Linux before 6.6 declares flexible arrays so that C++ puts them at another offset, and then even the numbers of the
// ioctls that carry one come out wrong, for they contain the size. (Newer headers put some into unions, where C++ takes
// arrays of no length only.)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpedantic"
#undef __DECLARE_FLEX_ARRAY
#define __DECLARE_FLEX_ARRAY(TYPE, NAME) TYPE NAME[0]
#include <linux/kvm.h>
#pragma GCC diagnostic pop
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace tiny {

static_assert(sizeof(kvm_cpuid2) == 8 && sizeof(kvm_msrs) == 8 && sizeof(kvm_signal_mask) == 4);

[[noreturn]] inline void give_up(const char* what) {
  std::fprintf(stderr, "tiny_vmm: %s: %s\n", what, std::strerror(errno));
  std::exit(1);
}

inline long must(const char* what, long result) {
  if (result < 0) give_up(what);
  return result;
}

// MUST_IOCTL(fd, KVM_X, argument) names the call when it fails.
#define MUST_IOCTL(fd, request, argument) ::tiny::must(#request, ::ioctl(fd, request, argument))

class Fd {
 public:
  Fd() = default;
  explicit Fd(long fd) : fd_(static_cast<int>(fd)) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Fd() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }

  // The same open file under another number; this number is closed.
  Fd moved_to_duplicate() && {
    Fd duplicate(must("dup", dup(fd_)));
    Fd original(std::move(*this));
    return duplicate;
  }

 private:
  int fd_ = -1;
};

class Mapping {
 public:
  Mapping() = default;
  Mapping(size_t bytes, int flags, int fd, void* place = nullptr)
      : bytes_(bytes), data_(mmap(place, bytes, PROT_READ | PROT_WRITE, flags, fd, 0)) {
    if (data_ == MAP_FAILED) give_up("mmap");
  }
  Mapping(Mapping&& other) noexcept
      : bytes_(std::exchange(other.bytes_, 0)), data_(std::exchange(other.data_, nullptr)) {}
  Mapping& operator=(Mapping&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Mapping() {
    if (bytes_) munmap(data_, bytes_);
  }
  size_t bytes() const { return bytes_; }
  uint8_t* data() const { return static_cast<uint8_t*>(data_); }

 private:
  size_t bytes_ = 0;
  void* data_ = nullptr;
};

}  // namespace tiny
