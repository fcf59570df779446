// Calls that a freeze has cut short go on when their threads do (recorder/partial_calls.h).
#pragma once

#include <cstdint>

#include <sys/types.h>

#include "core/remote_addr.h"
#include "tracer/stopped_thread.h"

namespace vmckpt {

class PartialCalls {
 public:
  PartialCalls() = default;
  // `table`: the target's PartialCallTable, if it has one.
  PartialCalls(pid_t pid, RemoteAddr table) : pid_(pid), table_(table) {}

  // A thread that has just stopped. If that has cut a call short, its registers become those of the call for the rest; true then.
  // What cannot be gone on with (other calls, no room) keeps the count that the kernel gave.
  bool go_on_with(StoppedThread& thread) const;

 private:
  pid_t pid_ = 0;
  RemoteAddr table_;
};

}  // namespace vmckpt
