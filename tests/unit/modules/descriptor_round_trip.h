// A process that opens things, a checkpoint of its descriptors, and another process in which they are restored and
// looked at. All three are real: kernel objects, freeze, image file.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include <sys/types.h>

#include "core/fd.h"
#include "modules/descriptors.h"

namespace vmckpt::test {

// For use in forked processes, where the test framework's own checks would get lost. Throws; the parent reports the
// text.
#define EXPECT(condition)                                                                                    \
  do {                                                                                                       \
    if (!(condition))                                                                                        \
      throw std::runtime_error(fmt::format("line {}: {} is false (errno {})", __LINE__, #condition, errno)); \
  } while (0)

class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

class RoundTrip {
 public:
  // Runs `build` in a new process that has /dev/null at 0 to 2 and nothing else, and keeps it running.
  explicit RoundTrip(const std::function<void()>& build);
  ~RoundTrip();

  pid_t pid() const { return target_; }
  // Freezes the process, saves its descriptors, lets it run on. The image lies in a temporary folder.
  Result<void> save();
  void kill_target();
  // Problems found by the preflight; its notes are added to `notes`.
  std::vector<Error> check();
  // Restores the descriptors in a new process and runs `verify` there. Returns "" or what went wrong. Afterwards the
  // new process is saved in its turn, and must give the same.
  std::string restore(const std::function<void()>& verify);

  pb::Image saved;  // its open files and descriptors
  Notes notes;
  std::array<int, 3> restart_stdio{-1, -1, -1};  // -1: /dev/null
  Ledger* ledger;                                // what the recorder would have noted
  bool compare_generations = true;
  Fd terminal_master;  // of the restored process, if it got a terminal of its own

 private:
  Result<void> save_process(pid_t pid, pb::Image* into, Notes* notes, const std::string& image_stem);

  std::string compare_with(pid_t restored);

  TemporaryFolder folder_;
  std::string image_;
  pid_t target_ = -1;
};

// Text of the error, or "" for success.
template <class T>
std::string message_of(const Result<T>& result) {
  return result.ok() ? std::string() : result.error().message();
}

// What can be read at once; "error NAME" when nothing can.
std::string read_now(int fd, size_t bytes = 65536);
void write_all(int fd, const std::string& text);
// Moves a descriptor to a number of the test's choice.
void put_at(int fd, int number);
short poll_now(int fd, short events);
bool mentions(const Notes& notes, const std::string& text);

// A copy without what may differ between two processes with equal descriptors (inodes, times).
std::string comparable(const pb::Image& image);

}  // namespace vmckpt::test
