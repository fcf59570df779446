#include "modules/threads.h"

#include <algorithm>
#include <cstring>

#include <asm/prctl.h>
#include <linux/prctl.h>
#include <linux/rseq.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core/fd.h"
#include "core/proc.h"
#include "image/one_process.h"
#include "modules/credentials.h"
#include "modules/module.h"
#include "modules/played/operations.h"
#include "modules/seccomp.h"
#include "modules/signals.h"
#include "tracer/remote_memory.h"
#include "tracer/thread_state.h"

#ifndef PTRACE_GET_RSEQ_CONFIGURATION
#define PTRACE_GET_RSEQ_CONFIGURATION 0x420f
#endif

namespace vmckpt {
namespace {

constexpr uint32_t kRseqSignature = 0x53053053;  // glibc's RSEQ_SIG on x86

// struct ptrace_rseq_configuration (Linux 5.13).
struct RseqConfiguration {
  uint64_t pointer;
  uint32_t bytes;
  uint32_t signature;
  uint32_t flags;
  uint32_t padding;
};

// struct sched_attr, the part that every kernel has (sched_setattr(2)).
struct SchedulingAttributes {
  uint32_t size;
  uint32_t policy;
  uint64_t flags;
  int32_t nice;
  uint32_t priority;
  uint64_t runtime;
  uint64_t deadline;
  uint64_t period;
};
static_assert(sizeof(SchedulingAttributes) == 48);

RseqConfiguration rseq_of(const StoppedThread& thread, const Ledger& ledger) {
  RseqConfiguration rseq{};
  if (::ptrace(static_cast<__ptrace_request>(PTRACE_GET_RSEQ_CONFIGURATION), thread.tid, sizeof rseq, &rseq) > 0) return rseq;
  // Before 5.13 the kernel does not tell; glibc does, through the ledger.
  if (ledger.rseq_bytes == 0) return {};
  rseq.pointer = thread.regs.fs_base + static_cast<uint64_t>(static_cast<int64_t>(ledger.rseq_offset));
  rseq.bytes = 32;  // what glibc registers, whatever __rseq_size says is in use (sysdeps/unix/sysv/linux/rseq-internal.h)
  rseq.signature = kRseqSignature;
  return rseq;
}

Result<void> save_scheduling(pid_t tid, pb::ThreadState* saved) {
  SchedulingAttributes attributes{};
  if (::syscall(SYS_sched_getattr, tid, &attributes, sizeof attributes, 0) != 0) {
    return errno_error(fmt::format("read scheduling of thread {}", tid));
  }
  saved->set_policy(attributes.policy);
  saved->set_nice(attributes.nice);
  saved->set_priority(attributes.priority);
  saved->set_scheduling_flags(attributes.flags);
  // The kernel shows the host's own slice too; one that is set stays when the host's changes.
  SchedulingAttributes mine{};
  const bool is_fair = attributes.policy == SCHED_OTHER || attributes.policy == SCHED_BATCH;
  if (is_fair && ::syscall(SYS_sched_getattr, 0, &mine, sizeof mine, 0) == 0 && attributes.runtime != mine.runtime) {
    saved->set_slice_ns(attributes.runtime);
  }
  unsigned char cpus[1024];
  long bytes = ::syscall(SYS_sched_getaffinity, tid, sizeof cpus, cpus);
  if (bytes > 0) saved->set_affinity(cpus, static_cast<size_t>(bytes));
  long io_priority = ::syscall(SYS_ioprio_get, 1 /* IOPRIO_WHO_PROCESS */, tid);
  if (io_priority > 0) saved->set_io_priority(static_cast<uint32_t>(io_priority));
  return {};
}

// By trying: neither user 0 nor a capability in a user namespace says anything.
bool may_schedule(uint32_t policy, uint32_t priority) {
  SchedulingAttributes mine{};
  if (::syscall(SYS_sched_getattr, 0, &mine, sizeof mine, 0) != 0) return false;
  SchedulingAttributes wanted{sizeof wanted, policy, 0, 0, priority, 0, 0, 0};
  if (::syscall(SYS_sched_setattr, 0, &wanted, 0) != 0) return false;
  (void)::syscall(SYS_sched_setattr, 0, &mine, 0);
  return true;
}

bool has_debug_registers(pid_t tid, pb::ThreadState* saved) {
  constexpr size_t kOffset = offsetof(struct user, u_debugreg);
  errno = 0;
  uint64_t control = static_cast<uint64_t>(::ptrace(PTRACE_PEEKUSER, tid, kOffset + 7 * sizeof(long), 0));
  if (errno != 0 || control == 0) return false;
  for (size_t i = 0; i < 8; ++i) {
    saved->add_debug_registers(static_cast<uint64_t>(::ptrace(PTRACE_PEEKUSER, tid, kOffset + i * sizeof(long), 0)));
  }
  return true;
}

// Tile registers come through ptrace like all others, once the thread has room for them: each thread must use them itself.
void plan_tiles(const pb::Thread& thread, TapeDraft& tape) {
  if (!uses_tiles({state_of(thread).xstate().begin(), state_of(thread).xstate().end()})) return;
  struct {  // Intel SDM volume 1, 18.2: one tile with one row
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64};
    uint8_t rows[16] = {1};
  } configuration;
  static_assert(sizeof configuration == 64);
  tape.call(kOpUseTiles, {tape.data_of(configuration)});
}

struct ThreadAnswers {
  TapeWord alternate_stack;
  TapeWord clear_child_tid;
  size_t clear_child_tid_call;
  TapeWord parent_death_signal;
  size_t timer_slack_call, securebits_call, mce_kill_call;
  std::optional<size_t> cpuid_call;  // unless a seccomp filter forbids to ask
};

// A thread stopped inside an rseq critical section goes on at its abort handler, as the kernel does after any preemption: the
// section does not survive what we do in the thread. Right after the freeze.
void abort_rseq_section(StoppedThread& thread, pid_t pid, const Ledger& ledger) {
  RseqConfiguration rseq = rseq_of(thread, ledger);
  if (rseq.pointer == 0) return;
  struct {
    uint32_t cpu_id_start, cpu_id;
    uint64_t rseq_cs;
  } area{};
  if (!read_memory(pid, RemoteAddr(rseq.pointer), &area, sizeof area).ok() || area.rseq_cs == 0) return;
  struct {
    uint32_t version, flags;
    uint64_t start_ip, post_commit_offset, abort_ip;
  } section{};
  if (!read_memory(pid, RemoteAddr(area.rseq_cs), &section, sizeof section).ok()) return;
  if (thread.regs.rip - section.start_ip >= section.post_commit_offset) return;
  thread.regs.rip = section.abort_ip;
  thread.disturbed = true;
}

ThreadAnswers ask_thread(const pb::Thread& thread, TapeDraft& tape) {
  ThreadAnswers questions{};
  questions.alternate_stack = tape.room(sizeof(stack_t));
  tape.call(SYS_sigaltstack, {0, questions.alternate_stack}, true, "read the alternate signal stack");
  questions.clear_child_tid = tape.room(sizeof(uint64_t));
  // EINVAL on kernels without CONFIG_CHECKPOINT_RESTORE.
  questions.clear_child_tid_call = tape.call(SYS_prctl, {PR_GET_TID_ADDRESS, questions.clear_child_tid, 0, 0, 0}, true,
                                             "read clear_child_tid (needs CONFIG_CHECKPOINT_RESTORE)");
  questions.parent_death_signal = tape.room(sizeof(int));
  tape.call(SYS_prctl, {PR_GET_PDEATHSIG, questions.parent_death_signal, 0, 0, 0});
  questions.securebits_call = tape.call(SYS_prctl, {PR_GET_SECUREBITS, 0, 0, 0, 0});
  questions.mce_kill_call = tape.call(SYS_prctl, {PR_MCE_KILL_GET, 0, 0, 0, 0});
  questions.timer_slack_call = tape.call(SYS_prctl, {PR_GET_TIMERSLACK, 0, 0, 0, 0});
  const uint64_t cpuid[6] = {ARCH_GET_CPUID};
  if (evaluate_filters(thread, SYS_arch_prctl, cpuid, 0) == SECCOMP_RET_ALLOW) {
    questions.cpuid_call = tape.call(SYS_arch_prctl, {ARCH_GET_CPUID, 0});
  }
  return questions;
}

void save_thread_answers(const ThreadAnswers& questions, const TapeDraft& tape, pb::Thread* thread) {
  pb::ThreadState* saved = thread->MutableExtension(pb::thread_state);
  const auto& stack = tape.as<stack_t>(questions.alternate_stack);
  saved->set_alternate_stack(reinterpret_cast<uint64_t>(stack.ss_sp));
  saved->set_alternate_stack_bytes(stack.ss_size);
  saved->set_alternate_stack_flags(static_cast<uint32_t>(stack.ss_flags));
  saved->set_clear_child_tid(tape.as<uint64_t>(questions.clear_child_tid));
  saved->set_parent_death_signal(tape.as<int>(questions.parent_death_signal));
  if (tape.succeeded(questions.securebits_call)) {
    thread->MutableExtension(pb::credentials)->set_securebits(static_cast<uint32_t>(tape.result(questions.securebits_call)));
  }
  saved->set_mce_kill_policy(tape.succeeded(questions.mce_kill_call) ? static_cast<uint32_t>(tape.result(questions.mce_kill_call))
                                                                     : PR_MCE_KILL_DEFAULT);
  if (tape.succeeded(questions.timer_slack_call)) {
    saved->set_timer_slack_ns(static_cast<uint64_t>(tape.result(questions.timer_slack_call)));
  }
  saved->set_cpuid_faults(questions.cpuid_call && tape.result(*questions.cpuid_call) == 0);
}

Result<void> save_thread(const StoppedWorld& world, const StoppedThread& thread, const Ledger& ledger, bool launch_filter,
                         pb::Thread* saved_thread) {
  saved_thread->set_tid(thread.tid_in_target);
  pb::ThreadState* saved = saved_thread->MutableExtension(pb::thread_state);
  StatusFields status = VMCKPT_TRY(read_status(world.pid(), thread.tid));
  if (status_field(status, "x86_Thread_features").find("shstk") != std::string_view::npos) {
    return error(fmt::format("thread {} uses a user-space shadow stack (CET), which cannot be restored yet", thread.tid),
                 "start the program with GLIBC_TUNABLES=glibc.cpu.hwcaps=-SHSTK");
  }
  std::string name = VMCKPT_TRY(read_whole_file(fmt::format("/proc/{}/task/{}/comm", world.pid(), thread.tid)));
  if (!name.empty() && name.back() == '\n') name.pop_back();
  saved->set_name(name);
  // The image's thread starts anew inside the kernel: an interrupted call is made again from its beginning.
  user_regs_struct regs = registers_that_repeat_the_call(thread.regs, thread.repeated_call);
  saved->set_registers(&regs, sizeof regs);
  saved->set_xstate(thread.xstate.data(), thread.xstate.size());
  saved->set_signal_mask(thread.signal_mask);
  if (thread.dispatch.mode != 0) {
    pb::SyscallDispatch* dispatch = saved->mutable_dispatch();
    dispatch->set_mode(thread.dispatch.mode);
    dispatch->set_selector(thread.dispatch.selector);
    dispatch->set_offset(thread.dispatch.offset);
    dispatch->set_bytes(thread.dispatch.bytes);
  }
  VMCKPT_TRY(save_pending_signals(thread.tid, false, saved_thread->MutableRepeatedExtension(pb::own_pending_signals)));
  RseqConfiguration rseq = rseq_of(thread, ledger);
  saved->set_rseq_address(rseq.pointer);
  saved->set_rseq_bytes(rseq.bytes);
  saved->set_rseq_signature(rseq.signature);
  uint64_t robust_head = 0;
  size_t robust_bytes = 0;
  if (::syscall(SYS_get_robust_list, thread.tid, &robust_head, &robust_bytes) != 0) {
    return errno_error(fmt::format("read the robust futex list of thread {}", thread.tid));
  }
  saved->set_robust_list(robust_head);
  saved->set_robust_list_bytes(robust_bytes);
  VMCKPT_TRY(save_scheduling(thread.tid, saved));
  save_credentials(status, saved_thread->MutableExtension(pb::credentials));
  has_debug_registers(thread.tid, saved);
  return save_seccomp(thread, ledger, launch_filter, saved_thread->MutableExtension(pb::seccomp));
}

Result<void> check_thread(const pb::Thread& thread, std::vector<std::string>& notes) {
  if (!thread.HasExtension(pb::thread_state)) return error(fmt::format("the image has no registers of thread {}", thread.tid()));
  VMCKPT_TRY(check_credentials(thread, notes));
  bool wants_realtime = state_of(thread).policy() == SCHED_FIFO || state_of(thread).policy() == SCHED_RR;
  if (wants_realtime && !may_schedule(state_of(thread).policy(), state_of(thread).priority())) {
    return error(fmt::format("thread {} ran with real-time scheduling, which you may not set", thread.tid()),
                 "raise RLIMIT_RTPRIO or restart as root");
  }
  return {};
}

void plan_cpuid(const pb::Thread& thread, TapeDraft& tape) {
  if (!state_of(thread).cpuid_faults()) return;
  tape.call(SYS_arch_prctl, {ARCH_SET_CPUID, 0}, true,
            fmt::format("let CPUID fault in thread {} (needs a processor that can)", thread.tid()));
}

Result<void> plan_thread(const pb::Thread& thread, const pb::Process& process, TapeDraft& tape) {
  const pb::ThreadState& state = state_of(thread);
  auto what = [&](const char* action) { return fmt::format("{} thread {}", action, thread.tid()); };
  plan_tiles(thread, tape);
  if (state.rseq_address() != 0) {
    tape.call(SYS_rseq, {state.rseq_address(), state.rseq_bytes(), 0, state.rseq_signature()}, true,
              what("register the rseq area of"));
  }
  tape.call(SYS_set_tid_address, {state.clear_child_tid()});
  tape.call(SYS_set_robust_list, {state.robust_list(), state.robust_list_bytes()}, true, what("set the robust list of"));
  if (!(state.alternate_stack_flags() & SS_DISABLE)) {
    stack_t stack{};
    stack.ss_sp = reinterpret_cast<void*>(state.alternate_stack());
    stack.ss_size = state.alternate_stack_bytes();
    stack.ss_flags = static_cast<int>(state.alternate_stack_flags()) & ~SS_ONSTACK;
    tape.call(SYS_sigaltstack, {tape.data_of(stack), 0}, true, what("set the alternate stack of"));
  }
  char name[16] = {};
  std::strncpy(name, state.name().c_str(), sizeof name - 1);
  tape.call(SYS_prctl, {PR_SET_NAME, tape.data(name, sizeof name), 0, 0, 0});
  if (state.timer_slack_ns() != 0) tape.call(SYS_prctl, {PR_SET_TIMERSLACK, state.timer_slack_ns(), 0, 0, 0});
  if (!state.affinity().empty()) {
    // Not an error when it fails: this host may have none of those processors.
    tape.call(SYS_sched_setaffinity, {0, state.affinity().size(), tape.data(state.affinity().data(), state.affinity().size())});
  }
  if (state.mce_kill_policy() != PR_MCE_KILL_DEFAULT) {
    tape.call(SYS_prctl, {PR_MCE_KILL, PR_MCE_KILL_SET, state.mce_kill_policy(), 0, 0});
  }
  if (state.io_priority() != 0) tape.call(SYS_ioprio_set, {1, 0, state.io_priority()});
  SchedulingAttributes attributes{sizeof(SchedulingAttributes), state.policy(), state.scheduling_flags(), state.nice(),
                                  state.priority(), state.slice_ns(), 0, 0};
  tape.call(SYS_sched_setattr, {0, tape.data_of(attributes), 0});
  plan_pending_signals(thread, process.pid(), tape);
  VMCKPT_TRY(plan_credentials(thread, tape));
  // Cleared by every change of credentials, so after them.
  if (state.parent_death_signal() != 0) {
    tape.call(SYS_prctl, {PR_SET_PDEATHSIG, static_cast<uint64_t>(state.parent_death_signal()), 0, 0, 0});
  }
  return {};
}

// Everything but what the tapes answer; before tapes are played, since the filters decide whether they may be.
Result<void> save(StateSave& save) {
  // Those of the process, too: tapes leave signals unblocked, and would take one.
  pb::Process& process = one_process(&save.image).process;
  VMCKPT_TRY(save_pending_signals(save.pid, true, process.MutableRepeatedExtension(pb::pending_signals)));
  for (StoppedThread& thread : save.world->threads()) {
    abort_rseq_section(thread, save.pid, *save.ledger);
    VMCKPT_TRY(save_thread(*save.world, thread, *save.ledger, save.launch_filter, process.add_threads()));
  }
  return {};
}

Result<void> ask(Questions& questions) {
  std::vector<ThreadAnswers> answers;
  for (size_t i = 0; i < questions.tapes.size(); ++i) {
    answers.push_back(ask_thread(one_process(questions.image).process.threads(static_cast<int>(i)), questions.tapes[i]));
  }
  questions.when_answered([answers = std::move(answers)](const std::vector<TapeDraft>& tapes, pb::Image& image) {
    pb::Process& process = one_process(&image).process;
    for (size_t i = 0; i < tapes.size(); ++i)
      save_thread_answers(answers[i], tapes[i], process.mutable_threads(static_cast<int>(i)));
  });
  return {};
}

void check(Preflight& preflight) {
  for (const pb::Thread& thread : one_process(preflight.image).process.threads()) {
    auto checked = check_thread(thread, preflight.notes);
    preflight.keep(checked);
    if (!checked.ok()) break;  // the other threads have the same
  }
}

Result<void> restore(StateRestore& state) {
  note_lost_capabilities(one_process(state.image).leader, state.own_user_namespace, state.notes);
  return {};
}

Result<void> plan_own(ThreadPlan& plan) { return plan_thread(plan.thread, one_process(plan.image).process, plan.tape); }

Result<void> plan_own_cpuid(ThreadPlan& plan) {
  plan_cpuid(plan.thread, plan.tape);
  return {};
}

}  // namespace

StoppedThread restored_state(const pb::Thread& thread, pid_t tid) {
  StoppedThread state;
  state.tid = tid;
  state.tid_in_target = thread.tid();
  std::memcpy(&state.regs, state_of(thread).registers().data(), std::min(state_of(thread).registers().size(), sizeof state.regs));
  state.xstate.assign(state_of(thread).xstate().begin(), state_of(thread).xstate().end());
  state.signal_mask = state_of(thread).signal_mask();
  const pb::SyscallDispatch& dispatch = state_of(thread).dispatch();
  state.dispatch = {dispatch.mode(), dispatch.selector(), dispatch.offset(), dispatch.bytes()};
  state.disturbed = true;
  return state;
}

extern const StateModule kThreadsModule{
    .name = "threads", .save = save, .ask = ask, .check = check, .restore = restore, .plan_thread = plan_own};
extern const StateModule kCpuidModule{.name = "faulting CPUID", .plan_thread = plan_own_cpuid};

}  // namespace vmckpt
