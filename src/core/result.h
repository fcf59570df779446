// Expected failures are values. A Result<T> holds a T or an Error; an Error says what was attempted, on which object,
// why it failed and what to do. Bugs are checks (VMCKPT_CHECK) that stay on in release builds.
#pragma once

#include <cerrno>
#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include <fmt/format.h>

namespace vmckpt {

struct Error {
  std::string what;  // what was attempted and on which object: `tap "tap0" is not on this host`
  int err = 0;       // errno, or 0 when the kernel was not asked
  std::string cure;  // what to do, or empty

  std::string message() const {
    std::string text = what;
    if (err != 0) text += fmt::format(": {} ({})", std::strerror(err), strerrorname_np(err) ? strerrorname_np(err) : "?");
    if (!cure.empty()) text += "; " + cure;
    return text;
  }
};

inline Error error(std::string what, std::string cure = {}) { return Error{std::move(what), 0, std::move(cure)}; }
inline Error errno_error(std::string what, std::string cure = {}) {
  return Error{std::move(what), errno, std::move(cure)};
}

template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}
  Result(Error error) : error_(std::move(error)) {}
  bool ok() const { return value_.has_value(); }
  explicit operator bool() const { return ok(); }
  T& value() & { return *value_; }
  const T& value() const& { return *value_; }
  T&& value() && { return std::move(*value_); }
  T& operator*() & { return *value_; }
  const T& operator*() const& { return *value_; }
  T&& operator*() && { return std::move(*value_); }
  T* operator->() { return &*value_; }
  const T* operator->() const { return &*value_; }
  const Error& error() const { return error_; }

 private:
  std::optional<T> value_;
  Error error_;
};

template <>
class [[nodiscard]] Result<void> {
 public:
  Result() = default;
  Result(Error error) : error_(std::move(error)), failed_(true) {}
  bool ok() const { return !failed_; }
  explicit operator bool() const { return ok(); }
  void value() const {}
  const Error& error() const { return error_; }

 private:
  Error error_;
  bool failed_ = false;
};

[[noreturn]] void check_failed(const char* expression, const char* file, int line);

}  // namespace vmckpt

// Evaluates a Result; yields its value, or returns its error from the enclosing function.
#define VMCKPT_TRY(...)                                      \
  __extension__({                                            \
    auto&& vmckpt_result_ = (__VA_ARGS__);                   \
    if (!vmckpt_result_.ok()) return vmckpt_result_.error(); \
    std::move(vmckpt_result_).value();                       \
  })

#define VMCKPT_CHECK(expression) \
  ((expression) ? void(0) : ::vmckpt::check_failed(#expression, __FILE__, __LINE__))
