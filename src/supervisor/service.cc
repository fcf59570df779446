#include "supervisor/service.h"

#include <algorithm>
#include <atomic>
#include <ctime>
#include <list>
#include <memory>
#include <new>
#include <optional>
#include <system_error>
#include <thread>
#include <typeinfo>
#include <utility>

#include <malloc.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/proc.h"
#include "supervisor/checkpoint_sequence.h"
#include "supervisor/ended_targets.h"
#include "supervisor/target_terminal.h"

namespace vmckpt {
namespace {

constexpr size_t kMaxClients = 64;
constexpr int kProgressIntervalMs = 200;
constexpr int kAcceptAgainMs = 100;  // after accept has failed
constexpr int kServiceSignals[] = {SIGCHLD, SIGINT, SIGQUIT, SIGTERM, SIGHUP, SIGTSTP, SIGTTOU, SIGTTIN, SIGCONT, SIGPIPE,
                                   SIGUSR1, SIGUSR2, SIGXFSZ};

struct Client {
  Fd fd;
  bool attached = false;  // to the target's terminal
};

// The checkpoint under way. Phases that do not touch the target have a thread, while the service goes on.
struct Running {
  std::unique_ptr<Checkpoint> checkpoint;
  pb::Afterwards afterwards = pb::RUNS;
  Client* client = nullptr;  // null when it has gone
  std::thread thread;
  std::optional<Result<void>> phase_result;  // set by that thread
};

struct Order {
  pb::CheckpointOrder order;
  Client* client;
  int64_t since_us;
};

// Whoever has asked for a checkpoint that ends the target may restart it at once, under the same name.
struct LastReply {
  pb::ControlReply reply;
  Client* client;
};

}  // namespace

class Service::Loop {
 public:
  Loop(Target& target, ControlListener& listener, TerminalControl& terminal, bool detached)
      : target_(target), listener_(listener), terminal_(terminal), detached_(detached) {}

  Result<void> look_after_clients() {
    wait_for_events(0, true);
    if (!is_to_end_) return {};
    return error(fmt::format("ended by vmckpt kill before target \"{}\" ran; nothing is left of it", target_.name));
  }

  int run(Fd terminal_master) {
    target_is_there_ = true;
    target_terminal_.emplace(std::move(terminal_master), target_.log);
    sigset_t mask;
    sigemptyset(&mask);
    for (int signal : kServiceSignals) sigaddset(&mask, signal);
    signals_ = Fd(::signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK));
    phase_ended_ = Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    // What a checkpoint needs again and again stays mapped: page faults would be the largest part of its pause.
    ::mallopt(M_MMAP_THRESHOLD, 1 << 30);
    ::mallopt(M_TRIM_THRESHOLD, 64 << 20);
    for (;;) {
      start_next_checkpoint();
      drive_checkpoint();  // may take a SIGCHLD, so reaping comes after it
      if (reap_finds_nobody() && !running_) break;
      wait_for_events(timeout_ms());
    }
    end_namespace();
    terminal_.take_back(WIFSIGNALED(wait_status_));
    while (target_terminal_->exists() && !show_to_attached(target_terminal_->take_shown())) {}
    remember();
    for (const Order& order : orders_) reply_error(order.client, fmt::format("target \"{}\" has ended", target_.name));
    listener_.close();
    if (last_reply_) (void)send_reply(last_reply_->client->fd.get(), last_reply_->reply);
    return wait_status_;
  }

 private:
  bool is_snapshot(pid_t pid) const { return running_ && pid == running_->checkpoint->snapshot_pid(); }

  // Reaps whatever has ended, follows stops. True when the target and its descendants have all gone.
  bool reap_finds_nobody() {
    for (;;) {
      siginfo_t next{};
      const int looked = ::waitid(P_ALL, 0, &next, WEXITED | WSTOPPED | WNOHANG | WNOWAIT | __WALL);
      if (looked != 0 && errno == EINTR) continue;
      if (looked != 0 || next.si_pid == 0) break;
      const pid_t pid = next.si_pid;
      const bool snapshot = is_snapshot(pid);
      const bool copied = running_ && pid == running_->checkpoint->copied_pid();
      // What is copied and was killed keeps its number as a zombie: nobody else's memory can be read in its place.
      if (copied && is_end(next)) break;
      int status = 0;
      if (::waitpid(pid, &status, WNOHANG | WUNTRACED | __WALL) != pid || snapshot) continue;
      // A stop that ptrace reports now belongs to a freeze that failed: whoever it is goes on (a player by itself, tape.h).
      if (release_late(pid, status, target_.interrupted) || status >> 16 != 0) continue;
      if (pid == target_.namespace_init && !WIFSTOPPED(status)) {
        target_.namespace_init = 0;  // the number is free
        namespace_ended_first_ = !target_ended_;
      }
      if (pid != target_.pid) continue;
      if (WIFSTOPPED(status)) {
        int signal = WSTOPSIG(status);
        bool by_terminal = signal == SIGTSTP || signal == SIGTTIN || signal == SIGTTOU;
        if (by_terminal && !detached_) terminal_.stop_with_target(pid);
      } else {
        wait_status_ = status;
        target_ended_ = true;
      }
    }
    if (!target_ended_) return false;
    // A zombie counts, too: its children may have passed to us after we were looked at. It is reaped soon.
    auto left = list_descendants(::getpid());
    if (!left.ok()) return false;
    return std::all_of(left->begin(), left->end(), [&](pid_t pid) { return pid == target_.namespace_init; });
  }

  void end_namespace() {
    if (target_.namespace_init == 0) return;
    ::kill(target_.namespace_init, SIGKILL);
    ::waitpid(target_.namespace_init, nullptr, __WALL);
  }

  int timeout_ms() const {
    if (!orders_.empty() && !running_) return 0;
    // With the target gone its leftover processes may be somebody else's children: look for them now and then.
    const int timeout_ms = running_ ? kProgressIntervalMs : target_ended_ ? 100 : -1;
    if (monotonic_us() >= accept_again_us_) return timeout_ms;
    return timeout_ms < 0 ? kAcceptAgainMs : std::min(timeout_ms, kAcceptAgainMs);
  }

  // `within`: called while a phase of a checkpoint waits, or the target is being made. The terminal is left alone then: its log
  // may lie on the very disk that the target waits for, and its size is part of what is being saved.
  void wait_for_events(int timeout_ms, bool within = false) {
    const bool accepting = monotonic_us() >= accept_again_us_;
    std::vector<pollfd> polls = {{signals_.get(), POLLIN, 0},
                                 {accepting ? listener_.fd() : -1, POLLIN, 0},
                                 {phase_ended_.get(), POLLIN, 0},
                                 {target_terminal_ && !within ? target_terminal_->fd() : -1, POLLIN, 0}};
    if (target_terminal_ && target_terminal_->has_input_left()) polls[3].events |= POLLOUT;
    std::vector<Client*> polled;
    for (Client& client : clients_) {
      if (within && client.attached) continue;
      polls.push_back({client.fd.get(), POLLIN, 0});
      polled.push_back(&client);
    }
    int ready = ::poll(polls.data(), polls.size(), timeout_ms);
    if (running_ && monotonic_us() >= progress_due_us_) send_progress();
    if (ready <= 0) return;
    if (polls[0].revents) take_signals();
    if (polls[2].revents) take_phase_result();
    if (polls[3].revents & POLLOUT) target_terminal_->pass_on_typed();
    for (size_t i = 0; i < polled.size(); ++i) {
      if (polls[4 + i].revents) serve_client(*polled[i], within);
    }
    // Behind the clients that were polled: one that does not read is dropped here.
    if (polls[3].revents & ~POLLOUT) (void)show_to_attached(target_terminal_->take_shown());
    if (accepting && polls[1].revents) accept_client();
  }

  void take_signals() {
    signalfd_siginfo info;
    while (::read(signals_.get(), &info, sizeof info) == static_cast<ssize_t>(sizeof info)) {
      int signal = static_cast<int>(info.ssi_signo);
      // What the terminal sends reaches the target by itself; what somebody sends to us is meant for it.
      bool to_forward = signal == SIGTERM || signal == SIGHUP || signal == SIGINT || signal == SIGQUIT || signal == SIGUSR1 ||
                        signal == SIGUSR2;
      if (to_forward && info.ssi_code == SI_USER && !target_ended_) ::kill(target_.pid, signal);
    }
  }

  // True when there was nothing to show. A client that does not keep up is dropped: it may attach again.
  bool show_to_attached(const std::string& text) {
    if (text.empty()) return true;
    pb::ControlReply reply;
    reply.set_shown(text);
    std::vector<Client*> lost;
    for (Client& client : clients_) {
      if (client.attached && !send_reply(client.fd.get(), reply).ok()) lost.push_back(&client);
    }
    for (Client* client : lost) drop(*client);
    return false;
  }

  void attach(Client& client, const pb::AttachOrder& order) {
    if (!target_is_there_)
      return reply_error(&client, fmt::format("target \"{}\" is still being restarted; try again", target_.name));
    if (!target_terminal_->exists()) {
      return reply_error(&client,
                         fmt::format("target \"{}\" has no terminal of its own; launch or restart it with --detach --terminal{}",
                                     target_.name, target_.log.empty() ? "" : ", or read its log with vmckpt logs"));
    }
    client.attached = true;
    pb::ControlReply reply;
    reply.set_shown(target_terminal_->recently_shown());
    (void)send_reply(client.fd.get(), reply);
    target_terminal_->resize(order.size().rows(), order.size().columns());
  }

  // All processes of the target, when its first has ended what that left behind.
  std::vector<pid_t> processes() const {
    std::vector<pid_t> found;
    auto descendants = list_descendants(::getpid());
    for (pid_t pid : descendants.ok() ? *descendants : std::vector<pid_t>{target_.pid}) {
      if (pid != target_.namespace_init && !is_snapshot(pid) && process_exists(pid)) found.push_back(pid);
    }
    return found;
  }

  // SIGKILL is for all, so that nothing is left over; others are for the program, which knows its children.
  void send_signal(int signal) {
    if (!target_is_there_) {
      is_to_end_ = true;
      return;
    }
    for (pid_t pid : processes()) {
      if (signal != SIGKILL && !target_ended_ && pid != target_.pid) continue;
      ::kill(pid, signal);
      if (signal != SIGKILL) ::kill(pid, SIGCONT);  // a stopped one takes no signal but this
    }
  }

  void remember() const {
    pb::EndedTarget ended;
    ended.set_name(target_.name);
    ended.set_pid(target_.pid);
    ended.set_wait_status(wait_status_);
    ended.set_namespace_ended_first(namespace_ended_first_);
    ended.set_ended_s(std::time(nullptr));
    ended.set_image_dir(target_.image_dir);
    ended.set_last_image(last_image_);
    ended.set_log(target_.log);
    for (const std::string& word : target_.command) ended.add_command(word);
    remember_ended(ended);
  }

  void accept_client() {
    auto client = listener_.accept();
    // No descriptor or no memory left: who wants to connect stays in the queue, and the queue stays readable.
    if (!client.ok() && client.error().err != 0) accept_again_us_ = monotonic_us() + kAcceptAgainMs * 1000;
    if (!client.ok()) return;
    if (clients_.size() < kMaxClients) {
      clients_.push_back({std::move(*client), false});
      return;
    }
    pb::ControlReply reply;
    reply.set_error(fmt::format("target \"{}\" has {} connections already; try again", target_.name, kMaxClients));
    (void)send_reply(client->get(), reply);
  }

  void serve_client(Client& client, bool within) {
    std::string bytes(kMaxControlBytes, '\0');
    ssize_t got = ::recv(client.fd.get(), bytes.data(), bytes.size(), MSG_DONTWAIT | MSG_TRUNC);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    pb::ControlRequest request;
    bool readable = got > 0 && got <= static_cast<ssize_t>(bytes.size()) &&
                    request.ParseFromArray(bytes.data(), static_cast<int>(got));
    if (got > 0 && !readable) reply_error(&client, "the request cannot be read");
    if (!readable) return drop(client);
    if (request.has_status()) {
      pb::ControlReply reply;
      *reply.mutable_status() = status();
      (void)send_reply(client.fd.get(), reply);
    } else if (request.has_checkpoint()) {
      if (request.checkpoint().stop_of_old())
        return reply_error(&client, "this vmckpt command is older than the target's supervisor; use the newer one");
      orders_.push_back({request.checkpoint(), &client, monotonic_us()});
    } else if (request.has_signal()) {
      send_signal(request.signal().signal());
    } else if (request.has_attach()) {
      if (within && target_is_there_) return reply_error(&client, "a checkpoint is under way; try again");
      attach(client, request.attach());
    } else if (request.has_resize()) {
      if (client.attached) target_terminal_->resize(request.resize().rows(), request.resize().columns());
    } else if (request.kind_case() == pb::ControlRequest::kTyped) {
      if (client.attached) target_terminal_->type(request.typed());
    } else {
      reply_error(&client, "this supervisor does not know that request; it is of another version");
    }
  }

  static bool has_gone(const Client* client) {
    char next;
    return ::recv(client->fd.get(), &next, 1, MSG_PEEK | MSG_DONTWAIT) == 0;
  }

  void drop(Client& client) {
    // Nobody waits for its checkpoints any more: one that is under way is given up, others are not begun.
    if (running_ && running_->client == &client) {
      running_->client = nullptr;
      running_->checkpoint->abort("the checkpoint was cancelled: who asked for it has gone");
    }
    std::erase_if(orders_, [&](const Order& order) { return order.client == &client; });
    if (last_reply_ && last_reply_->client == &client) last_reply_.reset();
    clients_.remove_if([&](const Client& other) { return &other == &client; });
  }

  pb::Status status() const {
    pb::Status status;
    status.set_name(target_.name);
    pid_t remaining = target_ended_ ? 0 : target_.pid;
    status.set_supervisor_pid(::getpid());
    const std::vector<pid_t> all = processes();
    if (target_ended_ && !all.empty()) remaining = all.back();  // what the launched program left behind is the target now
    status.set_pid(remaining);
    status.set_processes(static_cast<uint32_t>(all.size()));
    auto fields = read_status(remaining);
    bool stopped = fields.ok() && status_field(*fields, "State").starts_with("T");
    status.set_state(!target_is_there_ ? "restarting"
                     : running_        ? "checkpointing"
                     : remaining == 0  ? "ended"
                     : stopped         ? "stopped"
                                       : "running");
    status.set_generation(target_.generation);
    status.set_image_dir(target_.image_dir);
    for (const std::string& word : target_.command) status.add_command(word);
    status.set_checkpoints(checkpoints_);
    status.set_last_image(last_image_);
    status.set_log(target_.log);
    status.set_has_terminal(target_terminal_ && target_terminal_->exists());
    return status;
  }

  void reply_error(Client* client, const std::string& text) {
    if (client == nullptr) return;
    pb::ControlReply reply;
    reply.set_error(text);
    (void)send_reply(client->fd.get(), reply);
  }

  void start_next_checkpoint() {
    if (running_ || orders_.empty()) return;
    const Order next = std::move(orders_.front());
    orders_.pop_front();
    if (has_gone(next.client)) return;  // the target need not stand still for nobody
    CheckpointRequest request;
    request.output = next.order.output();
    request.afterwards = next.order.afterwards() == pb::IS_KILLED       ? Afterwards::kKilled
                         : next.order.afterwards() == pb::STAYS_STOPPED ? Afterwards::kStopped
                                                                        : Afterwards::kRuns;
    request.self_contained = next.order.self_contained();
    request.shared_files = next.order.shared_files() == pb::ALL    ? SharedFileContent::kAll
                           : next.order.shared_files() == pb::NONE ? SharedFileContent::kNone
                                                                   : SharedFileContent::kMemory;
    if (next.order.shared_limit_bytes() != 0) request.shared_limit_bytes = next.order.shared_limit_bytes();
    if (next.order.freeze_timeout_us() != 0) request.freeze_timeout_us = next.order.freeze_timeout_us();
    request.timeout_us = next.order.timeout_us();
    request.asked_us = next.since_us;  // others may have been under way
    running_ = std::make_unique<Running>();
    running_->afterwards = next.order.afterwards();
    running_->client = next.client;
    running_->checkpoint = std::make_unique<Checkpoint>(target_, std::move(request), [this] { wait_for_events(0, true); });
    progress_due_us_ = monotonic_us() + kProgressIntervalMs * 1000;
  }

  // One phase after the other, until one has a thread of its own, or there is none left.
  void drive_checkpoint() {
    while (running_ && !running_->thread.joinable()) {
      Checkpoint& checkpoint = *running_->checkpoint;
      Result<void> result;
      if (checkpoint.is_complete()) return finish_checkpoint({});
      try {
        if (checkpoint.next_runs_beside_the_target()) running_->thread = start_phase_in_thread();
        else result = checkpoint.advance();
      } catch (const std::exception& problem) {
        result = error(why(problem));
      }
      if (!result.ok()) finish_checkpoint(result);
    }
  }

  std::thread start_phase_in_thread() {
    return std::thread([this, running = running_.get()] {
      try {
        running->phase_result = running->checkpoint->advance();
      } catch (const std::exception& problem) {
        running->phase_result = Result<void>(error(why(problem)));
      }
      uint64_t one = 1;
      (void)!::write(phase_ended_.get(), &one, sizeof one);
    });
  }

  void take_phase_result() {
    uint64_t count;
    (void)!::read(phase_ended_.get(), &count, sizeof count);
    if (!running_ || !running_->thread.joinable()) return;
    running_->thread.join();
    running_->thread = {};
    const Result<void> result = *std::exchange(running_->phase_result, std::nullopt);
    if (!result.ok()) finish_checkpoint(result);
  }

  // Threads that cannot be started and memory that cannot be had are failures of this checkpoint, not of the supervisor.
  static std::string why(const std::exception& problem) {
    if (dynamic_cast<const std::bad_alloc*>(&problem) != nullptr) return "the supervisor gets no more memory; free some";
    if (typeid(problem) != typeid(std::system_error)) return problem.what();
    return fmt::format("start a thread of the supervisor: {}; raise its limit of processes (ulimit -u) or end some of them",
                       problem.what());
  }

  void finish_checkpoint(const Result<void>& outcome) {
    std::unique_ptr<Running> done = std::move(running_);
    pb::ControlReply reply;
    if (outcome.ok()) {
      const CheckpointResult& result = done->checkpoint->result();
      done->checkpoint->end_pause();
      ++checkpoints_;
      last_image_ = result.image;
      target_.images_numbered = std::max(target_.images_numbered, result.image_number);
      fill(result, reply.mutable_done());
      reply.mutable_done()->set_afterwards(done->afterwards);
    }
    done->checkpoint.reset();  // lets go of the snapshot, or of a target that was stopped in vain
    if (done->client == nullptr) return;
    if (!outcome.ok()) return reply_error(done->client, outcome.error().message());
    if (done->afterwards == pb::IS_KILLED) {
      last_reply_ = LastReply{std::move(reply), done->client};
      return;
    }
    // One that has not read for long gets the end of the connection instead, and need not wait for ever.
    if (!send_reply(done->client->fd.get(), reply).ok()) return drop(*done->client);
  }

  static void fill(const CheckpointResult& result, pb::CheckpointDone* done) {
    done->set_image(result.image);
    done->set_pause_us(result.pause_us);
    done->set_total_us(result.total_us);
    done->set_image_bytes(result.image_bytes);
    done->set_memory_bytes_saved(result.memory_bytes_saved);
    auto add = [](const Phases& durations, google::protobuf::RepeatedPtrField<pb::Phase>* list) {
      for (const auto& [name, us] : durations) {
        pb::Phase* entry = list->Add();
        entry->set_name(name);
        entry->set_us(us);
      }
    };
    add(result.phases, done->mutable_phases());
    add(result.modules, done->mutable_modules());
    for (const std::string& note : result.notes) done->add_notes(note);
  }

  void send_progress() {
    progress_due_us_ = monotonic_us() + kProgressIntervalMs * 1000;
    running_->checkpoint->check_timeout();
    if (running_->client == nullptr) return;
    pb::ControlReply reply;
    pb::Progress* progress = reply.mutable_progress();
    progress->set_phase(running_->checkpoint->next_phase());
    progress->set_bytes_done(running_->checkpoint->progress().bytes_done);
    progress->set_bytes_saved(running_->checkpoint->progress().bytes_saved);
    progress->set_bytes_total(running_->checkpoint->bytes_to_look_at());
    (void)send_reply(running_->client->fd.get(), reply);
  }

  Target& target_;
  ControlListener& listener_;
  TerminalControl& terminal_;
  const bool detached_;
  std::optional<TargetTerminal> target_terminal_;  // once the target is there
  bool target_is_there_ = false;
  bool is_to_end_ = false;  // before it was there
  Fd signals_, phase_ended_;
  std::list<Client> clients_;
  std::list<Order> orders_;
  std::unique_ptr<Running> running_;
  int64_t progress_due_us_ = 0;
  std::optional<LastReply> last_reply_;
  uint32_t checkpoints_ = 0;
  std::string last_image_;
  int wait_status_ = 0;
  bool target_ended_ = false;
  bool namespace_ended_first_ = false;  // the target was killed with its PID namespace
  int64_t accept_again_us_ = 0;
};

sigset_t prepare_service() {
  ::prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
  sigset_t mask, before;
  sigemptyset(&mask);
  for (int signal : kServiceSignals) sigaddset(&mask, signal);
  ::pthread_sigmask(SIG_BLOCK, &mask, &before);
  return before;
}

Service::Service(Target& target, ControlListener& listener, TerminalControl& terminal, bool detached)
    : loop_(std::make_unique<Loop>(target, listener, terminal, detached)) {}

Service::~Service() = default;

Result<void> Service::look_after_clients() { return loop_->look_after_clients(); }

int Service::serve(Fd terminal_master) { return loop_->run(std::move(terminal_master)); }

int exit_status_of(int wait_status) {
  return WIFSIGNALED(wait_status) ? 128 + WTERMSIG(wait_status) : WEXITSTATUS(wait_status);
}

}  // namespace vmckpt
