#include "tracer/remote_tape.h"

#include <algorithm>
#include <cstring>

#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/proc.h"
#include "player/tape.h"
#include "tracer/thread_state.h"

namespace vmckpt {
namespace {

constexpr uint64_t kFrameAlign = 64;
constexpr int64_t kPlayTimeoutUs = 30'000'000;
constexpr int64_t kBreakOffUs = 2'000'000;  // for the others, when one thread has failed

// What an instruction can bring upon itself.
constexpr int kFaultSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGSYS, SIGTRAP, SIGFPE};
// Compiled code relies on these being clear: single step, direction, nested task, alignment check.
constexpr uint64_t kStrangeFlags = 0x100 | 0x400 | 0x4000 | 0x40000;

uint64_t signal_bit(int signal) { return uint64_t{1} << (signal - 1); }

uint64_t align_up(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }

// The signal that ends a tape must do nothing when it reaches the program: one that is ignored by default and has no
// handler. (A program that handles all four would see one spurious SIGURG, if the supervisor died within these microseconds.)
int choose_end_signal(pid_t pid) {
  auto status = read_status(pid);
  uint64_t caught = status.ok() ? status_hex(*status, "SigCgt") : 0;
  for (int signal : {SIGURG, SIGWINCH, SIGCHLD, SIGCONT}) {
    if (!(caught & (uint64_t{1} << (signal - 1)))) return signal;
  }
  return SIGURG;
}

// Faults that the thread had brought upon itself before it stopped, whose signals it has not got yet: they are not the tape's.
uint64_t pending_faults(pid_t tid) {
  constexpr size_t kAtOnce = 32;
  uint64_t pending = 0;
  siginfo_t queued[kAtOnce];
  for (__ptrace_peeksiginfo_args from{0, 0, kAtOnce};; from.off += kAtOnce) {
    const long got = ::ptrace(PTRACE_PEEKSIGINFO, tid, &from, queued);
    for (long i = 0; i < got; ++i) {
      if (std::find(std::begin(kFaultSignals), std::end(kFaultSignals), queued[i].si_signo) == std::end(kFaultSignals)) continue;
      pending |= signal_bit(queued[i].si_signo);
    }
    if (got < static_cast<long>(kAtOnce)) return pending;
  }
}

}  // namespace

// One thread's part of the arena: [tape | rooms | return frame | stack].
class TapePlay {
 public:
  TapePlay(const ThreadTape& item, uint64_t address) : thread_(item.thread), tape_(item.tape), address_(address) {
    frame_offset_ = align_up(tape_->bytes(), kFrameAlign);
    frame_ = make_return_frame(*thread_, address_ + frame_offset_, &frame_stack_pointer_);
    stack_top_ = address_ + align_up(frame_offset_ + frame_.size(), 16) + kPlayerStackBytes;
  }

  uint64_t end() const { return align_up(stack_top_, kFrameAlign); }

  Result<void> place(pid_t pid, int end_signal, pid_t process_id) {
    Tape head{};
    head.end_signal = end_signal;
    head.process_id = process_id;
    head.thread_id = thread_->tid_in_target;
    head.return_frame = frame_stack_pointer_;
    std::vector<uint8_t> bytes = tape_->lay_out(address_, head);
    bytes.resize(frame_offset_);
    bytes.insert(bytes.end(), frame_.begin(), frame_.end());
    return write_memory(pid, address_, bytes.data(), bytes.size());
  }

  // One ptrace call moves the thread to the player: before it nothing has changed, after it the thread comes back alone.
  Result<void> start(uint64_t player_entry, int end_signal) {
    thread_->disturbed = true;
    user_regs_struct regs = thread_->regs;
    regs.orig_rax = ~uint64_t{0};
    regs.rip = player_entry;
    regs.rdi = address_;
    regs.rsp = stack_top_;
    regs.eflags &= ~kStrangeFlags;
    VMCKPT_TRY(suspend_dispatch(*thread_));
    if (::ptrace(PTRACE_SETREGS, thread_->tid, 0, &regs) != 0) return failed("redirect");
    // Killed before this call, the supervisor leaves a thread whose handlers may run on the player's stack: no harm.
    // A fault whose signal is blocked costs the program its handler (force_sig_info_to_task in the kernel's signal.c).
    uint64_t mask = ~signal_bit(end_signal);
    for (int signal : kFaultSignals) mask &= ~signal_bit(signal) | thread_->signal_mask;
    mask |= pending_faults(thread_->tid);
    if (::ptrace(PTRACE_SETSIGMASK, thread_->tid, sizeof mask, &mask) != 0) return failed("block signals of");
    if (::ptrace(PTRACE_CONT, thread_->tid, 0, 0) != 0) return failed("continue");
    started_ = true;
    return {};
  }

  // Returns true when the thread has come to the end of its tape.
  Result<bool> handle_stop(int status, int end_signal, pid_t* snapshot_child) {
    if (!WIFSTOPPED(status)) return error(fmt::format("thread {} ended during the checkpoint", thread_->tid));
    int event = status >> 16;
    if (event == 0 && WSTOPSIG(status) == end_signal && VMCKPT_TRY(sent_by_itself())) return true;
    if (event == PTRACE_EVENT_FORK) {
      VMCKPT_TRY(learn_snapshot(snapshot_child));
    }
    if (event == 0) VMCKPT_TRY(refuse_fault(WSTOPSIG(status)));
    // A signal from somebody else reached the thread: it comes back when the thread runs on.
    if (event == 0 && WSTOPSIG(status) != end_signal) thread_->stop_signal = WSTOPSIG(status);
    if (::ptrace(PTRACE_CONT, thread_->tid, 0, 0) != 0) return failed("continue");
    return false;
  }

  Result<void> read_back(pid_t pid) {
    std::vector<uint8_t> bytes(tape_->bytes());
    VMCKPT_TRY(read_memory(pid, address_, bytes.data(), bytes.size()));
    return tape_->read_back(bytes);
  }

  pid_t tid() const { return thread_->tid; }
  bool started() const { return started_; }

 private:
  // Tried again: a copy that nobody knows of would stay for ever.
  Result<void> learn_snapshot(pid_t* snapshot_child) {
    unsigned long pid = 0;
    for (int tries = 0; tries < 3; ++tries) {
      if (::ptrace(PTRACE_GETEVENTMSG, thread_->tid, 0, &pid) != 0) continue;
      if (snapshot_child != nullptr) *snapshot_child = static_cast<pid_t>(pid);
      return {};
    }
    return failed("learn the snapshot's number from");
  }

  // The end signal may also be pending for other reasons; nobody but the player sends it with tgkill from this very process.
  // A thread that went on from its end by mistake would go back into the program, which must stand still.
  Result<bool> sent_by_itself() {
    siginfo_t info{};
    if (::ptrace(PTRACE_GETSIGINFO, thread_->tid, 0, &info) != 0) return failed("ask for the signal of");
    if (info.si_code == SI_TKILL) return true;
    // Where the user's queue of signals is full (RLIMIT_SIGPENDING), the kernel delivers the signal without its siginfo and makes
    // this one up (collect_signal in the kernel's signal.c).
    const bool is_made_up = info.si_code == SI_USER && info.si_pid == 0 && info.si_uid == 0;
    Tape head{};
    return is_made_up && read_memory(thread_->tid, address_, &head, sizeof head).ok() && head.done == 1;
  }

  // The thread has not come to its end, and never will: its registers are put back while it stands in this stop, and the signal
  // stays here.
  Result<void> refuse_fault(int signal) {
    if (std::find(std::begin(kFaultSignals), std::end(kFaultSignals), signal) == std::end(kFaultSignals)) return {};
    siginfo_t info{};
    if (::ptrace(PTRACE_GETSIGINFO, thread_->tid, 0, &info) != 0) return failed("ask for the signal of");
    if (info.si_code <= 0) return {};  // sent by a process
    constexpr int kUserDispatch = 2;  // SYS_USER_DISPATCH
    if (signal == SIGSYS && info.si_code == kUserDispatch) {
      return error(fmt::format("thread {} has its system calls dispatched to itself (PR_SET_SYSCALL_USER_DISPATCH), which this "
                               "kernel lets nobody suspend", thread_->tid),
                   "use Linux 6.4 or newer, or checkpoint when the program has switched it off");
    }
    user_regs_struct regs{};
    ::ptrace(PTRACE_GETREGS, thread_->tid, 0, &regs);
    return error(fmt::format("thread {} met SIG{} at {:#x} (instruction at {:#x}) while it answered the checkpoint's questions",
                             thread_->tid, ::sigabbrev_np(signal), reinterpret_cast<uint64_t>(info.si_addr), regs.rip),
                 "the target runs on as before; please report this, with the target's /proc/PID/maps");
  }

  Error failed(const char* what) { return errno_error(fmt::format("{} thread {}", what, thread_->tid)); }

  StoppedThread* thread_;
  TapeDraft* tape_;
  bool started_ = false;
  uint64_t address_;
  uint64_t frame_offset_ = 0;
  uint64_t frame_stack_pointer_ = 0;
  uint64_t stack_top_ = 0;
  std::vector<uint8_t> frame_;
};

namespace {

Result<void> wait_for_end(TapePlay& play, int end_signal, pid_t* snapshot_child, int64_t deadline_us) {
  for (int round = 0;; ++round) {
    int status = 0;
    pid_t got = take_stop(play.tid(), &status);
    if (got < 0 && errno != EINTR) return errno_error(fmt::format("wait for thread {}", play.tid()));
    if (got == play.tid()) {
      if (VMCKPT_TRY(play.handle_stop(status, end_signal, snapshot_child))) return {};
      round = 0;
    } else if (monotonic_us() > deadline_us) {
      return error(fmt::format("thread {} does not come back{}", play.tid(), describe_wait(play.tid())));
    } else {
      wait_for_child_signal(round);
    }
  }
}

Result<void> play_batch(StoppedWorld& world, const Ledger& ledger, std::vector<TapePlay>& batch, int end_signal,
                        pid_t* snapshot_child) {
  if (batch.empty()) return {};
  // Only now, so that nothing the target forked by itself before it stood still is attached.
  if (snapshot_child != nullptr &&
      ::ptrace(PTRACE_SETOPTIONS, world.pid(), 0, PTRACE_O_TRACEFORK | PTRACE_O_TRACESYSGOOD) != 0) {
    return errno_error("ask to see the snapshot");
  }
  for (TapePlay& play : batch) VMCKPT_TRY(play.place(world.pid(), end_signal, world.pid_in_target()));
  // The leader, which comes first, starts last: its tape forks, and should not wait for a processor with the short ones.
  Result<void> outcome;
  for (auto play = batch.rbegin(); play != batch.rend() && outcome.ok(); ++play) {
    outcome = play->start(ledger.player_entry, end_signal);
  }
  // Whatever happens to one of them, the others come to their ends: the leader may just have made the snapshot, which must not
  // be left alone, and it has advice to put back.
  int64_t deadline_us = monotonic_us() + (outcome.ok() ? kPlayTimeoutUs : kBreakOffUs);
  for (TapePlay& play : batch) {
    if (!play.started()) continue;
    auto ended = wait_for_end(play, end_signal, snapshot_child, deadline_us);
    if (ended.ok() || !outcome.ok()) continue;
    outcome = ended;
    deadline_us = std::min(deadline_us, monotonic_us() + kBreakOffUs);
  }
  VMCKPT_TRY(std::move(outcome));
  for (TapePlay& play : batch) VMCKPT_TRY(play.read_back(world.pid()));
  return {};
}

}  // namespace

Result<void> play_tapes(StoppedWorld& world, const Ledger& ledger, const std::vector<ThreadTape>& tapes,
                        pid_t* snapshot_child) {
  const int end_signal = choose_end_signal(world.pid());
  const uint64_t arena_end = ledger.arena + uint64_t{ledger.arena_slots} * ledger.arena_slot_bytes;
  std::vector<TapePlay> batch;
  uint64_t next = ledger.arena;
  for (const ThreadTape& item : tapes) {
    TapePlay play(item, next);
    if (play.end() > arena_end) {
      if (batch.empty()) return error(fmt::format("the tape for thread {} is too long", item.thread->tid));
      VMCKPT_TRY(play_batch(world, ledger, batch, end_signal, snapshot_child));
      batch.clear();
      next = ledger.arena;
      play = TapePlay(item, next);
    }
    next = play.end();
    batch.push_back(play);
  }
  return play_batch(world, ledger, batch, end_signal, snapshot_child);
}

}  // namespace vmckpt
