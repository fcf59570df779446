// One checkpoint, from the request to the committed image. begin_checkpoint() does what needs the target stopped and lets it
// run on; write() copies the snapshot into the image and may run in another thread; the destructor lets go of the snapshot (or,
// with `stop`, of the stopped target, which runs on unless kill_target() was called).
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/result.h"
#include "image/image.pb.h"
#include "image/writer.h"
#include "memory/address_space.h"
#include "memory/page_dump.h"
#include "memory/snapshot.h"
#include "supervisor/target.h"

namespace vmckpt {

struct CheckpointRequest {
  std::string output;  // absolute path, or empty: IMAGE_DIR/NAME-N.ckpt
  bool stop = false;   // the target stays stopped until the image is committed and is then ended
  bool self_contained = false;
  SharedFileContent shared_files = SharedFileContent::kMemory;
  uint64_t shared_limit_bytes = uint64_t{1} << 30;
  int64_t freeze_timeout_us = 10'000'000;
};

using Phases = std::vector<std::pair<std::string, int64_t>>;  // name, microseconds, in order

struct CheckpointResult {
  std::string image;
  uint64_t image_number = 0;  // N of NAME-N.ckpt; 0: of another name
  int64_t pause_us = 0;  // first thread stopped to last one resumed; with `stop` to the commit
  int64_t total_us = 0;
  uint64_t image_bytes = 0;         // on disk
  uint64_t memory_bytes_saved = 0;  // page data in the image
  Phases phases;
  std::vector<std::string> notes;
};

class CheckpointInProgress {
 public:
  ~CheckpointInProgress();
  // Writes, syncs and names the image. Once, from any thread.
  Result<CheckpointResult> write();
  const DumpProgress& progress() const { return progress_; }
  // write() ends soon, without an image. From any thread.
  void cancel() { progress_.cancelled = true; }
  uint64_t bytes_to_look_at() const { return bytes_to_look_at_; }
  pid_t snapshot_pid() const { return snapshot_.pid(); }
  // With `stop`: ends the stopped target instead of letting it run on. In the thread that began the checkpoint.
  void kill_target();

 private:
  friend Result<std::unique_ptr<CheckpointInProgress>> try_checkpoint(Target&, const CheckpointRequest&, bool&);
  explicit CheckpointInProgress(ImageWriter writer) : writer_(std::move(writer)) {}

  ImageWriter writer_;
  pb::Image metadata_;
  std::vector<DumpRange> ranges_;
  std::vector<GuardRegion> guards_;  // known already; others are found in the snapshot
  std::optional<StoppedWorld> world_;  // with `stop`, or where the target may not fork
  Snapshot snapshot_;
  pid_t source_ = 0;
  uint64_t bytes_to_look_at_ = 0;
  int64_t started_us_ = 0;
  int64_t frozen_us_ = 0;
  DumpProgress progress_;
  CheckpointResult result_;
};

// Tries again for some seconds while the target has other processes that it has only just started.
Result<std::unique_ptr<CheckpointInProgress>> begin_checkpoint(Target& target, const CheckpointRequest& request);
// Once. `others`: it failed because the target has other processes.
Result<std::unique_ptr<CheckpointInProgress>> try_checkpoint(Target& target, const CheckpointRequest& request, bool& others);

}  // namespace vmckpt
