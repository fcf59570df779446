// The master side of a detached target's terminal, which nobody sits at: what the target shows goes to the log and to
// whoever is attached, what an attached client types goes to the target.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "core/fd.h"

namespace vmckpt {

class TargetTerminal {
 public:
  // `log`: path of the log, empty for none.
  TargetTerminal(Fd master, std::string log);

  int fd() const { return master_.get(); }  // -1: the target has no such terminal, or has closed it
  bool exists() const { return master_.valid(); }
  bool has_input_left() const { return !typed_.empty(); }  // then the caller polls for POLLOUT too

  // What is there to be read, also written to the log. Empty when there is nothing.
  std::string take_shown();
  void type(std::string_view text);
  void pass_on_typed();
  // Tells the target of another size (SIGWINCH). The same size as before is told by a detour, so that programs draw anew.
  void resize(uint32_t rows, uint32_t columns);

  // The end of what it has shown, for those who attach later.
  const std::string& recently_shown() const { return recent_; }

 private:
  void write_log(const std::string& text);

  Fd master_;
  Fd log_;
  std::string log_path_;
  std::string recent_;
  std::string typed_;  // and not yet taken by the terminal
};

}  // namespace vmckpt
