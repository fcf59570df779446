// What every kind of state that belongs to a process or its threads has in common. One module for each, listed in their order in
// registry.cc; the sequences of checkpoint and restart are loops over that list. (Open files: descriptor_module.h.)
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "core/fd.h"
#include "core/result.h"
#include "core/waiting.h"
#include "image/image.pb.h"
#include "image/reader.h"
#include "memory/address_space.h"
#include "memory/captured_files.h"
#include "memory/file_access.h"
#include "modules/host.h"
#include "recorder/ledger.h"
#include "tracer/stopped_world.h"
#include "tracer/tape_draft.h"
#include "tracer/vcpu_gate.h"

namespace vmckpt {

struct KvmHost;

// One checkpoint of one process, as the hooks see it: what they are told, and what they find for each other.
struct StateSave {
  pid_t pid;
  bool launch_filter;  // launch's own seccomp filter is in force
  const BackingImage& backing;
  AddressSpaceOptions memory_options;
  std::shared_ptr<KvmHost>& kvm_host;  // asked once for each target
  InterruptedCalls& interrupted;
  pb::Image& image;
  CapturedFiles& captured;
  std::vector<std::string>& notes;

  // The recorder's: while the target runs as it was a moment ago, then as it is.
  std::unique_ptr<Ledger> ledger{};
  // From freeze to resume; otherwise null.
  StoppedWorld* world = nullptr;

  AddressSpacePreview preview{};       // prepare
  bool has_split_irqchip = false;
  std::optional<VcpuGate> gate{};      // quiesce; opened when the world stands still
  std::unique_ptr<KvmNotes> kvm_notes{};  // save; null: the target does not use KVM
  AddressSpaceSave space{};            // which memory the snapshot must have, and what of it is written
};

// Checkpoint, world stopped: what only the target's own threads can tell. Drafted onto their tapes, which are played at once.
struct Questions {
  // After the tapes have been played, when the target runs again. `tapes` as below.
  using TakeAnswers = std::function<void(const std::vector<TapeDraft>& tapes, pb::Image& image)>;

  const StoppedWorld& world;
  const pb::Image& image;  // what has been saved so far
  std::vector<TapeDraft> tapes;  // one for each thread, the leader's first
  std::vector<TakeAnswers> takers{};

  TapeDraft& leader() { return tapes.front(); }
  void when_answered(TakeAnswers take) { takers.push_back(std::move(take)); }
  void take_answers(pb::Image& saved) const {
    for (const TakeAnswers& take : takers) take(tapes, saved);
  }
};

// Restart, before anything is started: whether this host can do it. Every problem is told at once.
struct Preflight {
  const pb::Image& image;
  const FileAccess& access;
  const std::set<std::string>& put_back;  // paths that need not be there yet
  CpuCheck cpu_check;
  GuestClock guest_clock;
  std::vector<Error>& problems;
  std::vector<std::string>& notes;

  void keep(Result<void> checked) {
    if (!checked.ok()) problems.push_back(checked.error());
  }
};

// Restart, in the new process, while it still has a memory of its own and is hosted code with one thread; its number is already
// the target's. What it opens is close-on-exec, at numbers from `first_service_fd` on: lower ones are the target's.
struct StateRestore {
  const pb::Image& image;
  const ImageReader& reader;
  const FileAccess& access;
  std::array<int, 3> stdio;  // restart's own, for what stands for the target's outside world; -1: closed
  int first_service_fd;
  bool own_user_namespace;
  std::vector<std::string>& notes;

  // Made for the tapes, and to be kept open until they have been played.
  RebuiltFiles captured{};
  Fd executable{};       // empty: no path leads to it
  Fd kvm_device{};       // empty: the target has no virtual machine
  Fd terminal_master{};  // of the terminal that takes the place of one that restart has not; drained by the supervisor

  // Moves a descriptor out of the way of the target's.
  Result<Fd> lift(Fd fd) const { return lift_above(std::move(fd), first_service_fd); }
};

// Restart, from the supervisor: the new process stands still, all else is done.
struct StateTakeOver {
  const pb::Image& image;
  pid_t pid;
  std::vector<std::string>& notes;
};

// Restart: calls of the leader's tape. The target's memory is there.
struct ProcessPlan {
  const pb::Image& image;
  int image_fd;          // any regular file, open for reading
  int kvm_device;        // /dev/kvm; -1: the target has no virtual machine
  int first_service_fd;  // numbers from here on are free, and closed later
  GuestClock guest_clock;
  TapeDraft& tape;
};

// Restart: calls of one thread's own tape.
struct ThreadPlan {
  const pb::Image& image;
  const pb::Thread& thread;
  bool leads;  // it is the process's first thread, and all others are there
  TapeDraft& tape;
};

// Each of them may be missing.
struct StateModule {
  const char* name;
  // ---- checkpoint, in the order of its phases
  Result<void> (*prepare)(StateSave&) = nullptr;      // the target runs: what can be found out early
  Result<void> (*quiesce)(StateSave&) = nullptr;      // it still runs, and is to come to rest; undone when StateSave goes
  Result<void> (*drain)(StateSave&, const Waiting&) = nullptr;  // it stands still: what is in flight comes to its end
  Result<void> (*save)(StateSave&) = nullptr;         // what the kernel tells from outside
  Result<void> (*ask)(Questions&) = nullptr;          // what only the target's threads can be asked
  Result<void> (*save_beside)(StateSave&) = nullptr;  // in another thread, while those answer: no request of ptrace
  Result<void> (*connect)(StateSave&) = nullptr;      // when all is saved: what lies between what different modules saved
  // ---- restart
  void (*check)(Preflight&) = nullptr;
  Result<void> (*restore)(StateRestore&) = nullptr;     // what hosted code can do
  Result<void> (*plan)(ProcessPlan&) = nullptr;         // no other thread is there
  Result<void> (*plan_thread)(ThreadPlan&) = nullptr;
  Result<void> (*plan_late)(ProcessPlan&) = nullptr;    // every thread is there, and all signals are blocked
  void (*take_over)(StateTakeOver&) = nullptr;          // what only the supervisor can do, or does better
};

// registry.cc
std::span<const StateModule* const> state_modules();

}  // namespace vmckpt
