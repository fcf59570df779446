#include "supervisor/restart_sequence.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>

#include <poll.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/proc.h"
#include "image/one_process.h"
#include "image/reader.h"
#include "memory/maps.h"
#include "modules/module.h"
#include "modules/threads.h"
#include "restart/new_process.h"
#include "restart/preflight.h"
#include "restart/rebuild.h"
#include "supervisor/failed_step.h"
#include "supervisor/fault_point.h"
#include "supervisor/patience.h"
#include "supervisor/phase_clock.h"
#include "supervisor/terminal_control.h"
#include "tracer/tape_draft.h"
#include "tracer/thread_state.h"
#include "tracer/tracee.h"

namespace vmckpt {
namespace {

// Ends the new process unless the restart comes to its end.
class ProcessGuard {
 public:
  explicit ProcessGuard(const NewProcess& process)
      : init_(process.namespace_init, Tracee::AtEnd::kDiesWithThreads), leader_(process.pid, Tracee::AtEnd::kDiesWithThreads) {
    if (process.namespace_init == 0) init_.forget();
  }
  ProcessGuard(const ProcessGuard&) = delete;
  ProcessGuard& operator=(const ProcessGuard&) = delete;

  Tracee& leader() { return leader_; }
  void release() {
    leader_.forget();
    init_.forget();
  }

 private:
  // Not traced, but ours to end: after the process, whose end it waits for.
  Tracee init_;
  Tracee leader_;
};

// Traces the new process from its start: its threads attach themselves as they are made, and all die with the supervisor.
Result<void> trace(const NewProcess& process, Tracee& leader) {
  if (!leader.seize(PTRACE_O_EXITKILL | PTRACE_O_TRACECLONE | PTRACE_O_TRACESYSGOOD)) {
    return errno_error("trace the new process", "see `vmckpt doctor`");
  }
  if (::send(process.channel.get(), "G", 1, MSG_NOSIGNAL) != 1) return errno_error("start the new process");
  return {};
}

// The process's messages up to "ready". Its end without one is an error.
struct Rebuilt {
  RebuildReport report;
  std::vector<RemoteAddr> tapes;  // in the order of the image's threads
  Fd terminal_master;
};

// One message, with the descriptor that may come along.
ssize_t receive(int channel, std::vector<char>& bytes, Fd* descriptor) {
  iovec part{bytes.data(), bytes.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  ssize_t got;
  do got = ::recvmsg(channel, &message, MSG_CMSG_CLOEXEC);
  while (got < 0 && errno == EINTR);
  cmsghdr* header = got > 0 ? CMSG_FIRSTHDR(&message) : nullptr;
  if (header != nullptr && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS) {
    int fd;
    std::memcpy(&fd, CMSG_DATA(header), sizeof fd);
    *descriptor = Fd(fd);
  }
  return got;
}

// While the process rebuilds itself it may be stopped by a signal that is for its terminal's group (a resized window): it is not
// meant to see any before it is the target.
void pass_over_stop(Tracee& leader) {
  int status = 0;
  if (leader.take_stop(&status) == leader.tid && WIFSTOPPED(status)) leader.go_on();
}

Result<Rebuilt> follow_rebuild(const NewProcess& process, Tracee& leader, size_t threads, Meanwhile& meanwhile,
                               std::vector<std::string>& notes) {
  Patience patience(process.pid, meanwhile);
  std::vector<char> message(256 * 1024);
  Rebuilt rebuilt;
  for (;;) {
    pollfd poll{process.channel.get(), POLLIN, 0};
    constexpr int kLookForStopsMs = 20;
    if (::poll(&poll, 1, kLookForStopsMs) == 0) {
      pass_over_stop(leader);
      VMCKPT_TRY(patience.check());
      continue;
    }
    ssize_t got = receive(process.channel.get(), message, &rebuilt.terminal_master);
    if (got <= 0) return error("the new process ended before it was rebuilt");
    std::string text(message.data() + 1, static_cast<size_t>(got) - 1);
    switch (static_cast<ChannelMessage>(message[0])) {
      case ChannelMessage::kNote:
        notes.push_back(text);
        break;
      case ChannelMessage::kError:
        return error(text);
      case ChannelMessage::kReady:
        rebuilt.tapes.resize(threads);
        if (text.size() != sizeof rebuilt.report + threads * sizeof(RemoteAddr))
          return error("the new process reported nonsense");
        std::memcpy(&rebuilt.report, text.data(), sizeof rebuilt.report);
        std::memcpy(rebuilt.tapes.data(), text.data() + sizeof rebuilt.report, threads * sizeof(RemoteAddr));
        return rebuilt;
    }
  }
}

// Lets the player run until every thread has played its tape and stopped itself. Returns the threads by their own numbers.
Result<std::map<pid_t, pid_t>> follow_tapes(const NewProcess& process, const Rebuilt& rebuilt, Meanwhile& meanwhile,
                                            const pb::Image& image) {
  const pid_t leader = process.pid, namespace_init = process.namespace_init;
  std::map<pid_t, RemoteAddr> tapes;
  const auto& threads = one_process(image).process.threads();
  for (int i = 0; i < threads.size(); ++i) tapes[threads[i].tid()] = rebuilt.tapes[static_cast<size_t>(i)];
  std::map<pid_t, pid_t> finished;  // number in the target -> number here
  Patience patience(leader, meanwhile);
  while (finished.size() < tapes.size()) {
    int status = 0;
    pid_t tid = take_any_stop(&status, {leader, namespace_init});
    if (tid < 0 && errno == EINTR) continue;
    if (tid < 0) return errno_error("wait for the new process");
    if (tid == 0) {
      VMCKPT_TRY(patience.wait());
      continue;
    }
    if (WIFEXITED(status) || WIFSIGNALED(status)) {
      if (tid == namespace_init) return error(fmt::format("the first process of the new PID namespace, {}, has ended", tid));
      if (tid != leader) continue;
      return error(fmt::format("the new process ended while it was being rebuilt (wait status {:#x})", status));
    }
    int event = status >> 16;
    if (event == 0 && WSTOPSIG(status) == SIGSTOP) {
      StatusFields fields = VMCKPT_TRY(read_status(leader, tid));
      pid_t tid_in_target = static_cast<pid_t>(status_innermost(fields, "NSpid"));
      auto tape = tapes.find(tid_in_target);
      if (tape == tapes.end()) return error(fmt::format("a thread with the unknown number {} was made", tid_in_target));
      VMCKPT_TRY(check_tape(leader, tid_in_target, tape->second));
      finished[tid_in_target] = tid;
      continue;
    }
    if (event == 0 && (WSTOPSIG(status) == SIGSEGV || WSTOPSIG(status) == SIGBUS || WSTOPSIG(status) == SIGILL)) {
      return error(fmt::format("thread {} of the new process got signal {} while it was being rebuilt", tid, WSTOPSIG(status)));
    }
    let_go_on(tid);
  }
  return finished;
}

// The one call that the player cannot make: unmapping itself. Made at the vdso's system call instruction.
Result<void> unmap_arena(Tracee& leader, const RebuildReport& report) {
  user_regs_struct regs;
  if (!leader.get_registers(&regs)) return errno_error("read the leader's registers");
  regs.orig_rax = ~uint64_t{0};
  regs.rip = report.syscall_instruction.value();
  regs.rax = SYS_munmap;
  regs.rdi = report.arena.value();
  regs.rsi = report.arena_bytes;
  if (!leader.set_registers(regs)) return errno_error("set the leader's registers");
  for (int stops = 0; stops < 2;) {  // system call entry and exit
    if (!leader.go_on_to_system_call()) return errno_error("let the leader run");
    int status = 0;
    if (!leader.wait(&status) || !WIFSTOPPED(status)) return error("the leader ended");
    if (WSTOPSIG(status) == (SIGTRAP | 0x80)) ++stops;
  }
  if (!leader.get_registers(&regs)) return errno_error("read the leader's registers");
  if (static_cast<int64_t>(regs.rax) != 0) {
    errno = static_cast<int>(-static_cast<int64_t>(regs.rax));
    return errno_error("unmap the player");
  }
  return {};
}

Result<void> set_thread_states(const pb::Image& image, const std::map<pid_t, pid_t>& tids) {
  for (const pb::Thread& thread : one_process(image).process.threads()) {
    auto tid = tids.find(thread.tid());
    if (tid == tids.end()) return error(fmt::format("thread {} was not made", thread.tid()));
    VMCKPT_TRY(write_thread_state(restored_state(thread, tid->second)));
    for (int i = 0; i < state_of(thread).debug_registers_size(); ++i) {
      write_debug_register(tid->second, i, state_of(thread).debug_registers(i));
    }
  }
  return {};
}

// How the kernel names the image in the target's maps: what lies on it is anonymous memory to the next checkpoint.
BackingImage find_backing(pid_t pid, const std::string& path) {
  auto maps = read_maps(pid);
  if (!maps.ok()) return {};
  for (const Vma& vma : *maps) {
    if (!vma.shared && (vma.name == path || vma.name == path + " (deleted)")) return {vma.device, vma.inode};
  }
  return {};
}

Target target_of(const RestartRequest& request, const ImageReader& image, const NewProcess& process) {
  const pb::Target& saved = image.metadata().target();
  Target target;
  target.name = request.name.empty() ? saved.name() : request.name;
  target.image_dir = saved.image_dir();
  target.log = saved.log();
  target.images_numbered = saved.images_numbered();
  target.command.assign(saved.command().begin(), saved.command().end());
  std::copy(std::begin(image.header().target_id), std::end(image.header().target_id), target.target_id.begin());
  std::copy(std::begin(image.header().image_id), std::end(image.header().image_id), target.parent_image_id.begin());
  target.generation = saved.generation() + 1;
  target.launch_filter = saved.devices_denied();
  target.pid = process.pid;
  target.namespace_init = process.namespace_init;
  target.namespaces = namespaces_of(process.pid);
  const auto path = read_link(fmt::format("/proc/self/fd/{}", image.fd()));
  target.backing = find_backing(process.pid, path.ok() ? *path : image.path());
  target.ledger_address = RemoteAddr(saved.ledger_address());
  return target;
}

}  // namespace

// What a phase has made is ended by the destructor.
struct Restart::Work {
  NewProcess process;
  std::unique_ptr<ProcessGuard> guard;
  Rebuilt rebuilt;
  std::map<pid_t, pid_t> tids;  // number in the target -> number here; stopped and traced
};

constexpr Restart::Phase Restart::kPhases[] = {
    {"verify", &Restart::verify},   {"preflight", &Restart::preflight}, {"create", &Restart::create},
    {"rebuild", &Restart::rebuild}, {"play", &Restart::play},           {"take over", &Restart::take_over},
    {"run", &Restart::run},
};

Restart::Restart(const RestartRequest& request)
    : request_(request),
      meanwhile_([this] { return request_.look_after_others ? request_.look_after_others() : Result<void>(); }) {}

Restart::~Restart() = default;

bool Restart::is_complete() const { return next_ == std::size(kPhases); }

Result<void> Restart::advance() {
  const Phase& phase = kPhases[next_];
  auto done = (this->*phase.run)();
  if (!done.ok()) {
    // Once more in a namespace, where all numbers are free, if somebody took one of them after we had looked.
    const bool may_begin_again = done.error().err == EEXIST && next_ >= kCreate && surroundings_ == Surroundings::kAny;
    if (!may_begin_again) return done;
    work_.reset();
    surroundings_ = Surroundings::kOwnNamespace;
    result_.notes = early_notes_;
    clock_.phases.resize(kCreate);
    next_ = kCreate;
    return {};
  }
  clock_.mark(phase.name);
  ++next_;
  if (is_complete()) result_.phases = std::move(clock_.phases);
  return {};
}

// Header, structure and checksums of the metadata (page data: `vmckpt verify`).
Result<void> Restart::verify() {
  image_.emplace(VMCKPT_TRY(ImageReader::open(request_.image)));
  return {};
}

// All problems at once, nothing started yet.
Result<void> Restart::preflight() {
  VMCKPT_TRY(vmckpt::preflight(*image_, request_.cpu_check, request_.guest_clock, request_.files, result_.notes));
  if (request_.claim_name) VMCKPT_TRY(request_.claim_name(image_->metadata().target()));
  early_notes_ = result_.notes;
  return {};
}

// The process, with its old number.
Result<void> Restart::create() {
  std::array<int, 3> stdio = {0, 1, 2};
  RebuildInputs inputs{*image_, stdio, request_.files, request_.guest_clock};
  work_ = std::make_unique<Work>();
  work_->process = VMCKPT_TRY(make_process(image_->metadata(), surroundings_, result_.notes,
                                           [&](const Birthplace& birthplace) { rebuild_and_play(inputs, birthplace); }));
  work_->guard = std::make_unique<ProcessGuard>(work_->process);
  fault_point("restart-create");
  return expect_no_end_signal();
}

// Descriptors and all else that hosted code can do.
Result<void> Restart::rebuild() {
  Tracee& leader = work_->guard->leader();
  VMCKPT_TRY(trace(work_->process, leader));
  const auto threads = static_cast<size_t>(one_process(image_->metadata()).process.threads_size());
  work_->rebuilt = VMCKPT_TRY(follow_rebuild(work_->process, leader, threads, meanwhile_, result_.notes));
  fault_point("restart-rebuild");
  return {};
}

// Memory, threads, signals, timers.
Result<void> Restart::play() {
  work_->tids = VMCKPT_TRY(follow_tapes(work_->process, work_->rebuilt, meanwhile_, image_->metadata()));
  fault_point("restart-play");
  return {};
}

// The player goes, registers and masks come.
Result<void> Restart::take_over() {
  const pb::Image& metadata = image_->metadata();
  const pb::Process& process = one_process(metadata).process;
  const pid_t pid = work_->process.pid;
  VMCKPT_TRY(unmap_arena(work_->guard->leader(), work_->rebuilt.report));
  result_.terminal_master = std::move(work_->rebuilt.terminal_master);
  result_.target = target_of(request_, *image_, work_->process);
  VMCKPT_TRY(set_thread_states(metadata, work_->tids));
  StateTakeOver state{metadata, pid, result_.notes};
  for (const StateModule* module : state_modules()) {
    if (module->take_over != nullptr) module->take_over(state);
  }
  VMCKPT_TRY(expect_no_end_signal());
  give_terminal_back(process, pid);
  return {};
}

Result<void> Restart::run() {
  const pb::Process& process = one_process(image_->metadata()).process;
  const pid_t pid = work_->process.pid;
  if (request_.tell_notes) request_.tell_notes(result_.notes);
  result_.group_stopped = process.state() == pb::Process::STOPPED;
  if (result_.group_stopped) ::kill(pid, SIGSTOP);
  for (const auto& [tid_in_target, tid] : work_->tids) Tracee(tid).let_go(0);
  work_->guard->release();
  result_.restart_us = monotonic_us() - request_.started_us;
  ask_to_draw_anew(process, pid);
  return {};
}

Result<RestartResult> restart_target(const RestartRequest& request) {
  Restart restart(request);
  while (!restart.is_complete()) VMCKPT_TRY(restart.advance());
  return restart.take_result();
}

}  // namespace vmckpt
