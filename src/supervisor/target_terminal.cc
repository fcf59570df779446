#include "supervisor/target_terminal.h"

#include <algorithm>
#include <cerrno>

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "supervisor/detached_stdio.h"

namespace vmckpt {
namespace {

constexpr size_t kRecentBytes = 16 << 10;      // a screen and more
constexpr off_t kMaxLogBytes = 16 << 20;       // then it becomes NAME.log.1
constexpr size_t kMaxTypedBytes = 1 << 20;     // more is lost, as a terminal loses it

}  // namespace

TargetTerminal::TargetTerminal(Fd master, std::string log) : master_(std::move(master)), log_path_(std::move(log)) {
  if (!master_) return;
  (void)::fcntl(master_.get(), F_SETFL, ::fcntl(master_.get(), F_GETFL) | O_NONBLOCK);
  if (log_path_.empty()) return;
  if (auto log_file = open_log(log_path_); log_file.ok()) log_ = std::move(*log_file);
}

std::string TargetTerminal::take_shown() {
  std::string text(4096, '\0');
  const ssize_t got = ::read(master_.get(), text.data(), text.size());
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return {};
  if (got <= 0) {
    master_.reset();  // EIO: nobody has the other side open any more
    return {};
  }
  text.resize(static_cast<size_t>(got));
  write_log(text);
  recent_ += text;
  if (recent_.size() > kRecentBytes) recent_.erase(0, recent_.size() - kRecentBytes);
  return text;
}

void TargetTerminal::write_log(const std::string& text) {
  struct stat info {};
  if (log_ && ::fstat(log_.get(), &info) == 0 && info.st_size > kMaxLogBytes) {
    (void)::rename(log_path_.c_str(), (log_path_ + ".1").c_str());
    auto next = open_log(log_path_);
    if (next.ok()) log_ = std::move(*next);
  }
  // A full disk costs the log, not the target.
  if (log_) (void)!::write(log_.get(), text.data(), text.size());
}

void TargetTerminal::type(std::string_view text) {
  typed_ += text.substr(0, kMaxTypedBytes - std::min(kMaxTypedBytes, typed_.size()));
  pass_on_typed();
}

void TargetTerminal::pass_on_typed() {
  if (typed_.empty() || !master_) return;
  const ssize_t taken = ::write(master_.get(), typed_.data(), typed_.size());
  if (taken > 0) typed_.erase(0, static_cast<size_t>(taken));
  if (taken < 0 && errno != EAGAIN && errno != EINTR) typed_.clear();
}

void TargetTerminal::resize(uint32_t rows, uint32_t columns) {
  if (!master_ || rows == 0 || columns == 0) return;
  winsize now{};
  (void)::ioctl(master_.get(), TIOCGWINSZ, &now);
  winsize size{static_cast<unsigned short>(rows), static_cast<unsigned short>(columns), 0, 0};
  if (now.ws_row == size.ws_row && now.ws_col == size.ws_col) {
    winsize detour = size;
    detour.ws_row = static_cast<unsigned short>(size.ws_row > 1 ? size.ws_row - 1 : 2);
    (void)::ioctl(master_.get(), TIOCSWINSZ, &detour);
  }
  (void)::ioctl(master_.get(), TIOCSWINSZ, &size);
}

}  // namespace vmckpt
