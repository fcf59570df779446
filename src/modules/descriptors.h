// All open descriptors of one process. Each kind of kernel object has a file of its own in this folder with save beside
// restore; descriptors.cc walks /proc/PID/fd, finds which numbers share one open file description, and calls them.
#pragma once

#include <array>
#include <set>
#include <string>
#include <vector>

#include <fcntl.h>

#include "core/fd.h"
#include "core/result.h"
#include "image/image.pb.h"
#include "memory/captured_files.h"
#include "memory/file_access.h"
#include "recorder/ledger.h"
#include "tracer/vcpu_gate.h"
#include "tracer/stopped_world.h"

namespace vmckpt {

using Notes = std::vector<std::string>;  // what the user should know, one sentence each

struct DescriptorSave {
  const StoppedWorld& world;
  const Ledger& ledger;
  CapturedFiles& captured;
  Notes& notes;
  const KvmNotes* kvm = nullptr;  // null: the target does not use KVM
};

// Checkpoint, world stopped. An object without a module is an error that names the descriptor and the object.
Result<void> save_descriptors(DescriptorSave& save, pb::Image& image);

struct DescriptorRestore {
  const RebuiltFiles& captured;
  const FileAccess& access;
  // What stands for the target's outside world: dups (close-on-exec, at service numbers) of restart's stdin, stdout,
  // stderr.
  std::array<int, 3> stdio;
  // Numbers from here on belong to restart itself until it has finished. Descriptors of the target are all lower, or so much
  // higher that restart does not get there.
  int first_service_fd;
  Notes& notes;
  // Set when the target had a terminal and restart has none: the master of the fresh pseudo terminal that takes its
  // place (close-on-exec, at a service number). Whoever keeps it open should drain it; when it is closed the terminal
  // hangs up.
  Fd terminal_master{};
};

// Preflight, in the supervisor, before anything is started: every problem goes to `problems`, surprises to `notes`.
// `put_back` are paths of files that restart makes again or fills itself.
void check_descriptors(const pb::Image& image, const FileAccess& access, const std::set<std::string>& put_back,
                       std::vector<Error>& problems, Notes& notes);

// Restart, in the new process (single-threaded, hosted C++, its PID is already the target's): afterwards exactly the
// descriptor table's numbers are open beside restart's own.
Result<void> restore_descriptors(const pb::Image& image, DescriptorRestore& restore);

// POSIX record locks, which restore_descriptors() has taken. A process loses them on a file when it closes any
// descriptor of that file (fcntl(2)), so a restart that closes such descriptors afterwards takes them again:
// fcntl(number, F_SETLK, &lock).
struct LateLock {
  int number;
  struct flock lock;
};
std::vector<LateLock> late_locks(const pb::Image& image);

}  // namespace vmckpt
