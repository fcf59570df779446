#include "modules/seccomp.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include <fcntl.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <seccomp.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core/fd.h"
#include "core/proc.h"
#include "image/one_process.h"
#include "modules/credentials.h"
#include "modules/module.h"

namespace vmckpt {
namespace {

// Classic BPF as seccomp uses it: loads are 32-bit words of struct seccomp_data (kernel: Documentation/userspace-api/
// seccomp_filter.rst). The kernel has checked the program when it was installed; a malformed one here counts as "kill".
uint32_t run_filter(const FilterProgram& program, const seccomp_data& data) {
  uint32_t accumulator = 0, index = 0, memory[BPF_MEMWORDS] = {};
  for (size_t pc = 0; pc < program.size(); ++pc) {
    const sock_filter& op = program[pc];
    uint32_t operand = BPF_SRC(op.code) == BPF_X ? index : op.k;
    switch (BPF_CLASS(op.code)) {
      case BPF_LD:
        if (BPF_MODE(op.code) == BPF_IMM) accumulator = op.k;
        else if (BPF_MODE(op.code) == BPF_MEM && op.k < BPF_MEMWORDS) accumulator = memory[op.k];
        else if (BPF_MODE(op.code) == BPF_LEN) accumulator = sizeof(seccomp_data);
        else if (BPF_MODE(op.code) == BPF_ABS && op.k + 4 <= sizeof data) {
          std::memcpy(&accumulator, reinterpret_cast<const char*>(&data) + op.k, 4);
        } else return SECCOMP_RET_KILL_PROCESS;
        break;
      case BPF_LDX:
        if (BPF_MODE(op.code) == BPF_IMM) index = op.k;
        else if (BPF_MODE(op.code) == BPF_MEM && op.k < BPF_MEMWORDS) index = memory[op.k];
        else if (BPF_MODE(op.code) == BPF_LEN) index = sizeof(seccomp_data);
        else return SECCOMP_RET_KILL_PROCESS;
        break;
      case BPF_ST:
        if (op.k >= BPF_MEMWORDS) return SECCOMP_RET_KILL_PROCESS;
        memory[op.k] = accumulator;
        break;
      case BPF_STX:
        if (op.k >= BPF_MEMWORDS) return SECCOMP_RET_KILL_PROCESS;
        memory[op.k] = index;
        break;
      case BPF_ALU:
        switch (BPF_OP(op.code)) {
          case BPF_ADD: accumulator += operand; break;
          case BPF_SUB: accumulator -= operand; break;
          case BPF_MUL: accumulator *= operand; break;
          case BPF_DIV: accumulator = operand == 0 ? 0 : accumulator / operand; break;
          case BPF_MOD: accumulator = operand == 0 ? 0 : accumulator % operand; break;
          case BPF_OR: accumulator |= operand; break;
          case BPF_AND: accumulator &= operand; break;
          case BPF_XOR: accumulator ^= operand; break;
          case BPF_LSH: accumulator <<= operand & 31; break;
          case BPF_RSH: accumulator >>= operand & 31; break;
          case BPF_NEG: accumulator = -accumulator; break;
          default: return SECCOMP_RET_KILL_PROCESS;
        }
        break;
      case BPF_JMP: {
        bool taken = false;
        switch (BPF_OP(op.code)) {
          case BPF_JA: pc += op.k; continue;
          case BPF_JEQ: taken = accumulator == operand; break;
          case BPF_JGT: taken = accumulator > operand; break;
          case BPF_JGE: taken = accumulator >= operand; break;
          case BPF_JSET: taken = (accumulator & operand) != 0; break;
          default: return SECCOMP_RET_KILL_PROCESS;
        }
        pc += taken ? op.jt : op.jf;
        break;
      }
      case BPF_RET:
        return BPF_RVAL(op.code) == BPF_A ? accumulator : op.k;
      case BPF_MISC:
        if (BPF_MISCOP(op.code) == BPF_TAX) index = accumulator;
        else accumulator = index;
        break;
    }
  }
  return SECCOMP_RET_KILL_PROCESS;
}

// Order in which one answer outweighs another: the kernel takes the most restrictive of all filters.
uint32_t severity(uint32_t answer) {
  switch (answer & SECCOMP_RET_ACTION_FULL) {
    case SECCOMP_RET_ALLOW: return 0;
    case SECCOMP_RET_LOG: return 1;
    case SECCOMP_RET_TRACE: return 2;
    case SECCOMP_RET_USER_NOTIF: return 3;
    case SECCOMP_RET_ERRNO: return 4;
    case SECCOMP_RET_TRAP: return 5;
    case SECCOMP_RET_KILL_THREAD: return 6;
    default: return 7;
  }
}

std::vector<FilterProgram> programs_of(const pb::Thread& thread) {
  std::vector<FilterProgram> programs;
  for (const pb::SeccompFilter& filter : filters_of(thread)) {
    FilterProgram& program = programs.emplace_back(filter.program().size() / sizeof(sock_filter));
    std::memcpy(program.data(), filter.program().data(), program.size() * sizeof(sock_filter));
  }
  return programs;
}

// The most restrictive answer of all.
uint32_t answer_of(const std::vector<FilterProgram>& programs, int64_t number, const uint64_t (&args)[6],
                   uint64_t instruction_pointer) {
  seccomp_data data{};
  data.nr = static_cast<int>(number);
  data.arch = AUDIT_ARCH_X86_64;
  data.instruction_pointer = instruction_pointer;
  std::memcpy(data.args, args, sizeof data.args);
  uint32_t answer = SECCOMP_RET_ALLOW;
  for (const FilterProgram& program : programs) {
    const uint32_t one = run_filter(program, data);
    if (severity(one) > severity(answer)) answer = one;
  }
  return answer;
}

void add_filter(pb::Seccomp* saved, uint32_t flags, const sock_filter* program, size_t instructions) {
  pb::SeccompFilter* filter = saved->add_filters();
  filter->set_flags(flags);
  filter->set_program(program, instructions * sizeof(sock_filter));
}

// Exact, but needs CAP_SYS_ADMIN in the initial user namespace. Index 0 is the oldest filter (kernel/seccomp.c,
// get_nth_filter; ptrace(2) has it the other way round). A later one may forbid seccomp(2), so the order matters.
bool read_filters_by_ptrace(pid_t tid, int64_t count, pb::Seccomp* saved) {
  std::vector<FilterProgram> programs;
  for (int64_t i = 0; i < count; ++i) {
    long instructions = ::ptrace(PTRACE_SECCOMP_GET_FILTER, tid, i, nullptr);
    if (instructions <= 0) return false;
    FilterProgram program(static_cast<size_t>(instructions));
    if (::ptrace(PTRACE_SECCOMP_GET_FILTER, tid, i, program.data()) != instructions) return false;
    programs.push_back(std::move(program));
  }
  for (const FilterProgram& program : programs) add_filter(saved, 0, program.data(), program.size());
  return true;
}

// What the recorder noted: filters this thread installed, or that a thread installed for all (TSYNC).
int64_t add_noted_filters(const StoppedThread& thread, const Ledger& ledger, bool of_every_thread, pb::Seccomp* saved) {
  int64_t added = 0;
  uint32_t used = std::min(ledger.filters_used, kLedgerFilters);
  for (uint32_t i = 0; i < used; ++i) {
    const LedgerFilter& filter = ledger.filters[i];
    bool applies = of_every_thread || filter.tid == thread.tid_in_target || (filter.flags & SECCOMP_FILTER_FLAG_TSYNC);
    if (!applies || filter.first_instruction + filter.instructions > kLedgerFilterInstructions) continue;
    add_filter(saved, filter.flags, reinterpret_cast<const sock_filter*>(&ledger.filter_instructions[filter.first_instruction]),
               filter.instructions);
    ++added;
  }
  return added;
}

}  // namespace

Result<FilterProgram> make_launch_filter() {
  scmp_filter_ctx context = ::seccomp_init(SCMP_ACT_ALLOW);
  if (context == nullptr) return error("make launch's system call filter: libseccomp failed");
  // The kernel's other ways in (int $0x80, x32) are as open as without a filter, libseccomp would end the thread.
  int failed = ::seccomp_attr_set(context, SCMP_FLTATR_ACT_BADARCH, SCMP_ACT_ALLOW);
  for (uint32_t other : {SCMP_ARCH_X86, SCMP_ARCH_X32}) failed |= ::seccomp_arch_add(context, other);
  // ENOSYS, as a kernel without the feature answers: QEMU, libuv, MariaDB and others fall back to threads.
  for (int number : {SCMP_SYS(io_uring_setup), SCMP_SYS(io_uring_enter), SCMP_SYS(io_uring_register)}) {
    failed |= ::seccomp_rule_add(context, SCMP_ACT_ERRNO(ENOSYS), number, 0);
  }
  // Linux AIO only where the recorder counts (recorder/aio_recorder.cc).
  for (int number : {SCMP_SYS(io_setup), SCMP_SYS(io_submit)}) {
    failed |= ::seccomp_rule_add(context, SCMP_ACT_ERRNO(ENOSYS), number, 1, SCMP_A5(SCMP_CMP_NE, kAioMark));
  }
  int pipe_ends[2];
  if (failed != 0 || ::pipe2(pipe_ends, O_CLOEXEC) != 0) {
    ::seccomp_release(context);
    return error("make launch's system call filter: libseccomp refused a rule");
  }
  Fd read_end(pipe_ends[0]);
  {
    Fd write_end(pipe_ends[1]);
    failed = ::seccomp_export_bpf(context, write_end.get());
  }
  ::seccomp_release(context);
  if (failed != 0) return error("make launch's system call filter: libseccomp cannot export it");
  std::string bytes = VMCKPT_TRY(read_whole_fd(read_end.get(), "launch's system call filter"));
  FilterProgram program(bytes.size() / sizeof(sock_filter));
  std::memcpy(program.data(), bytes.data(), program.size() * sizeof(sock_filter));
  return program;
}

Result<void> install_filter(const FilterProgram& program) {
  sock_fprog argument{static_cast<unsigned short>(program.size()), const_cast<sock_filter*>(program.data())};
  // SPEC_ALLOW: the filter is no sandbox, it needs no speculation barriers, which would slow the target down.
  auto install = [&] {
    return ::syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, &argument) == 0;
  };
  if (install()) return {};
  // Without CAP_SYS_ADMIN the kernel accepts a filter only when set-uid programs can no longer gain privileges (seccomp(2)).
  if (errno != EACCES && errno != EPERM) return errno_error("install launch's system call filter");
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return errno_error("set no_new_privs");
  if (!install()) return errno_error("install launch's system call filter", "launch with --allow-io-uring to do without it");
  return {};
}

Result<void> save_seccomp(const StoppedThread& thread, const Ledger& ledger, bool launch_filter, pb::Seccomp* saved) {
  StatusFields status = VMCKPT_TRY(read_status(thread.tid));
  int mode = static_cast<int>(status_number(status, "Seccomp"));
  saved->set_mode(mode);
  if (mode == SECCOMP_MODE_DISABLED) return {};
  if (mode == SECCOMP_MODE_STRICT) {
    return error(fmt::format("thread {} is in seccomp's strict mode, which forbids every checkpoint call", thread.tid));
  }
  int64_t count = status_number(status, "Seccomp_filters");
  if (read_filters_by_ptrace(thread.tid, count, saved)) {
    if (launch_filter) saved->mutable_filters(0)->set_flags(SECCOMP_FILTER_FLAG_SPEC_ALLOW);
    return {};
  }
  saved->clear_filters();
  if (launch_filter) {
    FilterProgram program = VMCKPT_TRY(make_launch_filter());
    add_filter(saved, SECCOMP_FILTER_FLAG_SPEC_ALLOW, program.data(), program.size());
  }
  int64_t base = launch_filter ? 1 : 0;
  int64_t noted = std::min(ledger.filters_used, kLedgerFilters);
  if (count > base) add_noted_filters(thread, ledger, count == base + noted, saved);
  if (saved->filters_size() != count || ledger.filters_lost != 0) {
    return error(fmt::format("thread {} has {} seccomp filters, of which {} are known", thread.tid, count,
                             saved->filters_size()),
                 "run the checkpoint as root (then filters can be read), or start the program without its own filter");
  }
  return {};
}

uint32_t evaluate_filters(const pb::Thread& thread, int64_t number, const uint64_t (&args)[6], uint64_t instruction_pointer) {
  return answer_of(programs_of(thread), number, args, instruction_pointer);
}

Result<void> check_tape_against_filters(const pb::Thread& thread, const TapeDraft& tape, TapeNeeds needs) {
  if (filters_of(thread).empty()) return {};
  std::vector<TapeCall> calls = tape.plain_calls();
  auto add = [&](int64_t number, uint64_t first_argument = 0) {
    TapeCall call{};
    call.number = number;
    call.args[0] = first_argument;
    calls.push_back(call);
  };
  for (int64_t number : {SYS_tgkill, SYS_rt_sigreturn}) add(number);
  if (needs == TapeNeeds::kEveryCallAndFork) {
    add(SYS_clone, CLONE_PARENT | SIGCHLD);
    for (int64_t number : {SYS_prctl, SYS_getppid, SYS_close_range, SYS_pause}) add(number);
  }
  const std::vector<FilterProgram> programs = programs_of(thread);  // once: the target stands still meanwhile
  for (const TapeCall& call : calls) {
    uint32_t answer = answer_of(programs, call.number, call.args, 0);
    if (severity(answer) <= severity(SECCOMP_RET_LOG)) continue;
    if (needs == TapeNeeds::kNoHarm && (answer & SECCOMP_RET_ACTION_FULL) == SECCOMP_RET_ERRNO) continue;
    return error(fmt::format("the seccomp filter of thread {} forbids system call {} ({})", thread.tid(), call.number,
                             tape_call_name(call.number)));
  }
  return {};
}

namespace {

void plan_seccomp(const pb::Thread& thread, TapeDraft& tape) {
  if (!filters_of(thread).empty() && !credentials_of(thread).no_new_privileges() && !has_capability(CAP_SYS_ADMIN)) {
    tape.call(SYS_prctl, {PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0}, true, "set no_new_privs");
  }
  for (const pb::SeccompFilter& filter : filters_of(thread)) {
    // sock_fprog holds a pointer: place program and struct together and let the tape fill it in.
    const TapeWord program = tape.data(filter.program().data(), filter.program().size());
    uint64_t head[2] = {filter.program().size() / sizeof(sock_filter), 0};
    const TapeWord argument = tape.data_of(head);
    tape.point(argument, 8, program);
    uint64_t flags = filter.flags() & (SECCOMP_FILTER_FLAG_SPEC_ALLOW | SECCOMP_FILTER_FLAG_LOG);
    tape.call(SYS_seccomp, {SECCOMP_SET_MODE_FILTER, flags, argument}, true,
              fmt::format("install a seccomp filter in thread {}", thread.tid()));
  }
}

// A filter needs no_new_privs or CAP_SYS_ADMIN. With the first it comes last of all; without it, it was installed with
// privileges that the credentials may not have any more, and comes before them.
Result<void> plan_before_credentials(ThreadPlan& plan) {
  if (!credentials_of(plan.thread).no_new_privileges()) plan_seccomp(plan.thread, plan.tape);
  return {};
}

Result<void> plan_after_credentials(ThreadPlan& plan) {
  if (credentials_of(plan.thread).no_new_privileges()) plan_seccomp(plan.thread, plan.tape);
  return {};
}

// A thread that had been confined must not come back without its filters.
void check(Preflight& preflight) {
  for (const pb::Thread& thread : one_process(preflight.image).process.threads()) {
    const bool is_filtered = thread.GetExtension(pb::seccomp).mode() == SECCOMP_MODE_FILTER;
    if (is_filtered == !filters_of(thread).empty()) continue;
    preflight.problems.push_back(
        error(fmt::format("thread {} has the seccomp mode {} and {} filters, which does not go together", thread.tid(),
                          thread.GetExtension(pb::seccomp).mode(), filters_of(thread).size()),
              "make another checkpoint"));
  }
}

}  // namespace

extern const StateModule kPrivilegedFiltersModule{.name = "filters of the privileged", .plan_thread = plan_before_credentials};
extern const StateModule kFiltersModule{.name = "filters", .check = check, .plan_thread = plan_after_credentials};

}  // namespace vmckpt
