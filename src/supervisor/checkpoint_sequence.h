// One checkpoint, from the request to the image under its name, as an object that goes through named phases:
//
//     prepare   the target runs: what can be found out or opened early
//     quiesce   it still runs: vCPUs are called to the gate; the pause begins
//     freeze    every thread is stopped
//     drain     what the kernel still does for it comes to its end
//     save      what the kernel tells from outside
//     snapshot  what its own threads can be asked, and a copy of its memory; descriptors meanwhile
//     resume    it runs on: the pause ends
//     write     pages go from the copy into the image
//     seal      the image is whole and on disk, without a name
//     publish   it gets its name
//
// Whoever drives it calls advance() for one phase after the other, and may do something else in between. A phase that fails, or
// that is aborted, is the last: the destructor gives back what the phases have taken (threads run on where they were, the copy
// goes, the gate opens, the file without a name goes), and the image that was there before is untouched.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "core/clock.h"
#include "core/result.h"
#include "core/waiting.h"
#include "memory/address_space.h"
#include "memory/page_copy.h"
#include "supervisor/phase_clock.h"
#include "supervisor/target.h"

namespace vmckpt {

// What becomes of the target when its image is there.
enum class Afterwards {
  kRuns,     // it has been running since the snapshot
  kStopped,  // it stands still until then, and is left as SIGSTOP would leave it
  kKilled,   // it stands still until then, and is ended
};

struct CheckpointRequest {
  std::string output;  // absolute path, or empty: IMAGE_DIR/NAME-N.ckpt
  Afterwards afterwards = Afterwards::kRuns;
  bool self_contained = false;
  SharedFileContent shared_files = SharedFileContent::kMemory;
  uint64_t shared_limit_bytes = uint64_t{1} << 30;
  int64_t freeze_timeout_us = 10'000'000;
  int64_t timeout_us = 0;  // since asked_us, for all phases together; 0: as long as they take
  int64_t asked_us = monotonic_us();
};

using Phases = std::vector<std::pair<std::string, int64_t>>;  // name, microseconds, in order

struct CheckpointResult {
  std::string image;
  uint64_t image_number = 0;  // N of NAME-N.ckpt; 0: of another name
  int64_t pause_us = 0;  // first thread stopped to last one resumed; of one that does not run on: to the end
  int64_t total_us = 0;
  uint64_t image_bytes = 0;         // on disk
  uint64_t memory_bytes_saved = 0;  // page data in the image
  Phases phases;
  Phases modules;  // of the phases drain, save and snapshot: what each module took by itself
  std::vector<std::string> notes;
};

class Checkpoint {
 public:
  // `look_after_others` is called while a phase waits, between two looks: it must return soon, and may call abort().
  Checkpoint(Target& target, CheckpointRequest request, std::function<void()> look_after_others = {});
  ~Checkpoint();
  Checkpoint(const Checkpoint&) = delete;
  Checkpoint& operator=(const Checkpoint&) = delete;

  // Goes through the next phase. An Error is the end of the checkpoint.
  Result<void> advance();
  bool is_complete() const;
  const char* next_phase() const;
  // It does not touch the target: it may run in any thread. Others run in the one that traces.
  bool next_runs_beside_the_target() const;

  // It ends soon, with `why` for its error; too late for one that is being published. From any thread.
  void abort(const std::string& why);
  // Aborts it if it has taken longer than it may.
  void check_timeout();

  const DumpProgress& progress() const { return progress_; }
  uint64_t bytes_to_look_at() const { return bytes_to_look_at_; }
  pid_t snapshot_pid() const;
  // Whose memory is copied, or may be: must not be reaped, so that its number stays its own. 0: nobody's.
  pid_t copied_pid() const;
  // When it is complete, in the thread that traces: does to the target what was asked for.
  void end_pause();
  const CheckpointResult& result() const { return result_; }

 private:
  enum class Limit { kPatience, kFreeze, kNone };
  struct Phase {
    const char* name;
    Result<void> (Checkpoint::*run)(const Waiting&);
    Limit limit;
    bool beside_target = false;
  };
  struct Work;
  static const Phase kPhases[];

  Result<void> prepare(const Waiting& waiting);
  Result<void> quiesce(const Waiting& waiting);
  Result<void> freeze(const Waiting& waiting);
  Result<void> drain(const Waiting& waiting);
  Result<void> save(const Waiting& waiting);
  Result<void> snapshot(const Waiting& waiting);
  Result<void> resume(const Waiting& waiting);
  Result<void> write(const Waiting& waiting);
  Result<void> seal(const Waiting& waiting);
  Result<void> publish(const Waiting& waiting);

  Result<pid_t> wait_for_only_process(const Waiting& waiting);
  bool copies_stopped_target() const { return request_.afterwards != Afterwards::kRuns; }
  Result<void> check_wanted();
  int64_t limit_us(Limit limit) const;

  Target& target_;
  const CheckpointRequest request_;
  Meanwhile meanwhile_;
  const int64_t started_us_;
  std::atomic<size_t> next_ = 0;  // read by whoever reports progress
  bool has_others_ = false;  // the last phase failed since the target has other processes
  PhaseClock clock_;
  std::unique_ptr<Work> work_;  // all that is made on the way
  uint64_t bytes_to_look_at_ = 0;
  DumpProgress progress_;
  CheckpointResult result_;
  std::mutex abort_mutex_;
  std::string why_aborted_;
  bool is_being_published_ = false;
};

// All phases, in the caller's thread.
Result<CheckpointResult> checkpoint_target(Target& target, const CheckpointRequest& request);

}  // namespace vmckpt
