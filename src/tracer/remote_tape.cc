#include "tracer/remote_tape.h"

#include <algorithm>
#include <cstring>

#include <sys/ptrace.h>
#include <sys/wait.h>

#include "core/clock.h"
#include "core/proc.h"
#include "player/tape.h"
#include "tracer/remote_memory.h"
#include "tracer/thread_state.h"

namespace vmckpt {
namespace {

constexpr uint64_t kFrameAlign = 64;
constexpr int64_t kPlayTimeoutUs = 30'000'000;
constexpr int64_t kBreakOffUs = 2'000'000;  // for the others, when one thread has failed

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

}  // namespace

// One thread's part of the arena: [tape | rooms | return frame | stack].
class TapePlay {
 public:
  TapePlay(const ThreadTape& item, RemoteAddr address) : thread_(item.thread), tape_(item.tape), address_(address) {
    frame_offset_ = align_up(tape_->bytes(), kFrameAlign);
    frame_ = make_return_frame(*thread_, address_ + frame_offset_, &frame_stack_pointer_);
    stack_top_ = address_ + align_up(frame_offset_ + frame_.size(), 16) + kPlayerStackBytes;
  }

  RemoteAddr end() const { return RemoteAddr(align_up(stack_top_.value(), kFrameAlign)); }

  Result<void> place(pid_t pid, int end_signal, pid_t process_id) {
    Tape head{};
    head.end_signal = end_signal;
    head.process_id = process_id;
    head.thread_id = thread_->tid_in_target;
    head.return_frame = frame_stack_pointer_.value();
    std::vector<uint8_t> bytes = tape_->lay_out(address_.value(), head);
    bytes.resize(frame_offset_);
    bytes.insert(bytes.end(), frame_.begin(), frame_.end());
    return write_memory(pid, address_, bytes.data(), bytes.size());
  }

  // One ptrace call moves the thread to the player: before it nothing has changed, after it the thread comes back alone.
  Result<void> start(RemoteAddr player_entry, int end_signal) {
    thread_->disturbed = true;
    user_regs_struct regs = thread_->regs;
    regs.orig_rax = ~uint64_t{0};
    regs.rip = player_entry.value();
    regs.rdi = address_.value();
    regs.rsp = stack_top_.value();
    regs.eflags &= ~kStrangeFlags;
    VMCKPT_TRY(suspend_dispatch(*thread_));
    if (!thread_->set_registers(regs)) return failed("redirect");
    // Killed before this call, the supervisor leaves a thread whose handlers may run on the player's stack: no harm.
    // A fault whose signal is blocked costs the program its handler (force_sig_info_to_task in the kernel's signal.c).
    uint64_t mask = ~signal_bit(end_signal);
    for (int signal : kFaultSignals) mask &= ~signal_bit(signal) | thread_->signal_mask;
    // Faults that it had brought upon itself before it stopped, whose signals it has not got yet, are not the tape's.
    mask |= thread_->queued_faults(Tracee::Sender::kAnyone);
    if (!thread_->set_signal_mask(mask)) return failed("block signals of");
    if (!thread_->go_on()) return failed("continue");
    started_ = true;
    return {};
  }

  // Returns true when the thread has come to the end of its tape.
  Result<bool> handle_stop(int status, int end_signal, const TakeCopy& take_copy) {
    if (!WIFSTOPPED(status)) return error(fmt::format("thread {} ended during the checkpoint", thread_->tid));
    int event = status >> 16;
    if (event == 0 && WSTOPSIG(status) == end_signal && VMCKPT_TRY(sent_by_itself())) return true;
    if (event == PTRACE_EVENT_FORK) VMCKPT_TRY(hand_over_copy(take_copy));
    if (event == 0) VMCKPT_TRY(refuse_fault(WSTOPSIG(status)));
    // A signal from somebody else reached the thread: it comes back when the thread runs on.
    if (event == 0 && WSTOPSIG(status) != end_signal) thread_->stop_signal = WSTOPSIG(status);
    if (!thread_->go_on()) return failed("continue");
    return false;
  }

  Result<void> read_back(pid_t pid) {
    std::vector<uint8_t> bytes(tape_->bytes());
    VMCKPT_TRY(read_memory(pid, address_, bytes.data(), bytes.size()));
    return tape_->read_back(bytes);
  }

  Tracee& thread() { return *thread_; }
  bool started() const { return started_; }

 private:
  // Tried again: a copy that nobody knows of would stay for ever.
  Result<void> hand_over_copy(const TakeCopy& take_copy) {
    unsigned long pid = 0;
    for (int tries = 0; tries < 3; ++tries) {
      if (!thread_->get_event_message(&pid)) continue;
      if (take_copy) take_copy(Tracee(static_cast<pid_t>(pid), Tracee::AtEnd::kDies));
      return {};
    }
    return failed("learn the snapshot's number from");
  }

  // The end signal may also be pending for other reasons; nobody but the player sends it with tgkill from this very process.
  // A thread that went on from its end by mistake would go back into the program, which must stand still.
  Result<bool> sent_by_itself() {
    siginfo_t info{};
    if (!thread_->get_signal(&info)) return failed("ask for the signal of");
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
    if (!is_fault(signal)) return {};
    siginfo_t info{};
    if (!thread_->get_signal(&info)) return failed("ask for the signal of");
    if (info.si_code <= 0) return {};  // sent by a process
    constexpr int kUserDispatch = 2;  // SYS_USER_DISPATCH
    if (signal == SIGSYS && info.si_code == kUserDispatch) {
      return error(fmt::format("thread {} has its system calls dispatched to itself (PR_SET_SYSCALL_USER_DISPATCH), which this "
                               "kernel does not allow anyone to suspend", thread_->tid),
                   "use Linux 6.4 or newer, or checkpoint when the program has switched it off");
    }
    user_regs_struct regs{};
    thread_->get_registers(&regs);
    return error(fmt::format("thread {} met SIG{} at {:#x} (instruction at {:#x}) while it answered the checkpoint's questions",
                             thread_->tid, ::sigabbrev_np(signal), reinterpret_cast<uint64_t>(info.si_addr), regs.rip),
                 "the target runs on as before; please report this, with the target's /proc/PID/maps");
  }

  Error failed(const char* what) { return errno_error(fmt::format("{} thread {}", what, thread_->tid)); }

  Tracee* thread_;
  TapeDraft* tape_;
  bool started_ = false;
  RemoteAddr address_;
  uint64_t frame_offset_ = 0;
  RemoteAddr frame_stack_pointer_;
  RemoteAddr stack_top_;
  std::vector<uint8_t> frame_;
};

namespace {

Result<void> wait_for_end(TapePlay& play, int end_signal, const TakeCopy& take_copy, const Waiting& waiting) {
  Tracee& thread = play.thread();
  for (int round = 0;; ++round) {
    int status = 0;
    pid_t got = thread.take_stop(&status);
    if (got < 0 && errno != EINTR) return errno_error(fmt::format("wait for thread {}", thread.tid));
    if (got == thread.tid) {
      if (VMCKPT_TRY(play.handle_stop(status, end_signal, take_copy))) return {};
      round = 0;
    } else if (waiting.is_over()) {
      return error(fmt::format("thread {} does not come back{}", thread.tid, describe_wait(thread.tid)));
    } else {
      constexpr int kUsualRounds = 8;  // some milliseconds
      if (round > kUsualRounds) (void)waiting.check();
      wait_for_child_signal(round);
    }
  }
}

Result<void> play_batch(StoppedWorld& world, const Ledger& ledger, std::vector<TapePlay>& batch, int end_signal,
                        const TakeCopy& take_copy, Meanwhile* meanwhile) {
  if (batch.empty()) return {};
  // Only now, so that nothing the target forked by itself before it stood still is attached.
  if (take_copy && !world.threads().front().set_options(PTRACE_O_TRACEFORK | PTRACE_O_TRACESYSGOOD)) {
    return errno_error("ask to see the snapshot");
  }
  for (TapePlay& play : batch) VMCKPT_TRY(play.place(world.pid(), end_signal, world.pid_in_target()));
  // The leader, which comes first, starts last: its tape forks, and should not wait for a processor with the short ones.
  Result<void> outcome;
  for (auto play = batch.rbegin(); play != batch.rend() && outcome.ok(); ++play) {
    outcome = play->start(RemoteAddr(ledger.player_entry), end_signal);
  }
  // Whatever happens to one of them, the others come to their ends: the leader may just have made the snapshot, which must not
  // be left alone, and it has advice to put back.
  Waiting waiting(monotonic_us() + (outcome.ok() ? kPlayTimeoutUs : kBreakOffUs), meanwhile);
  for (TapePlay& play : batch) {
    if (!play.started()) continue;
    auto ended = wait_for_end(play, end_signal, take_copy, waiting);
    if (ended.ok() || !outcome.ok()) continue;
    outcome = ended;
    waiting = waiting.no_longer_than(kBreakOffUs);
  }
  VMCKPT_TRY(std::move(outcome));
  for (TapePlay& play : batch) VMCKPT_TRY(play.read_back(world.pid()));
  return {};
}

}  // namespace

Result<void> play_tapes(StoppedWorld& world, const Ledger& ledger, const std::vector<ThreadTape>& tapes,
                        const TakeCopy& take_copy, Meanwhile* meanwhile) {
  const int end_signal = choose_end_signal(world.pid());
  const RemoteAddr arena(ledger.arena);
  const RemoteAddr arena_end = arena + uint64_t{ledger.arena_slots} * ledger.arena_slot_bytes;
  std::vector<TapePlay> batch;
  RemoteAddr next = arena;
  for (const ThreadTape& item : tapes) {
    TapePlay play(item, next);
    if (play.end() > arena_end) {
      if (batch.empty()) return error(fmt::format("the tape for thread {} is too long", item.thread->tid));
      VMCKPT_TRY(play_batch(world, ledger, batch, end_signal, take_copy, meanwhile));
      batch.clear();
      next = arena;
      play = TapePlay(item, next);
    }
    next = play.end();
    batch.push_back(play);
  }
  return play_batch(world, ledger, batch, end_signal, take_copy, meanwhile);
}

}  // namespace vmckpt
