// --detach: the supervisor goes into the background once the target runs; the command that started it returns then. Whoever ends
// that command before (Ctrl-C, TERM) means the supervisor, which is in another session already: the signal is passed on to it.
#pragma once

#include <string>

#include "core/fd.h"
#include "core/result.h"

namespace vmckpt {

class Detacher {
 public:
  // With `wanted`, forks: the original process stays inside this call until the background one reports, prints what it says and
  // exits. Returns in the background process (or, not `wanted`, at once in the only one).
  static Result<Detacher> detach(bool wanted);

  // The target runs: lets the command return 0, `text` on its standard output.
  void report_running(const std::string& text);
  // It does not: lets it return 1, `message` on its standard error. In the foreground prints and returns.
  void report_failure(const std::string& message);

 private:
  Fd report_;
};

}  // namespace vmckpt
