#include "supervisor/checkpoint_sequence.h"

#include <algorithm>
#include <future>
#include <limits>
#include <map>
#include <optional>

#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/proc.h"
#include "core/random.h"
#include "image/one_process.h"
#include "image/writer.h"
#include "memory/page_dump.h"
#include "memory/snapshot.h"
#include "modules/clocks.h"
#include "modules/host.h"
#include "modules/module.h"
#include "modules/namespaces.h"
#include "modules/seccomp.h"
#include "supervisor/fault_point.h"
#include "supervisor/freeze_at_rest.h"
#include "supervisor/image_destination.h"
#include "supervisor/only_process.h"
#include "tracer/ledger_reader.h"
#include "tracer/remote_tape.h"

namespace vmckpt {
namespace {

constexpr int64_t kPatienceUs = 10'000'000;  // for other processes to end, which the target has only just started
constexpr useconds_t kLookAgainUs = 10'000;

// A target that is killed leaves the stop at once, and what is asked of it then, its descriptors for one, is empty: no error, but
// no image either. What was read before this is true if it is still stopped now.
Result<void> expect_still_stopped(pid_t pid) {
  auto status = read_status(pid);
  if (status.ok() && status_field(*status, "State").starts_with("t")) return {};
  return error(fmt::format("process {} was killed during the checkpoint", pid));
}

void save_target(const Target& target, const ImageDestination& destination, pb::Target* saved) {
  saved->set_name(target.name);
  saved->set_target_id(target.target_id.data(), target.target_id.size());
  saved->set_generation(target.generation);
  saved->set_image_dir(target.image_dir);
  saved->set_log(target.log);
  saved->set_images_numbered(destination.numbered_stem.empty() ? target.images_numbered : destination.number);
  for (const std::string& word : target.command) saved->add_command(word);
  saved->set_devices_denied(target.launch_filter);
  saved->set_ledger_address(target.ledger_address.value());
}

// All that is asked by tapes. `snapshot`: null where the target stays stopped and is copied itself.
Result<Questions> ask(const StoppedWorld& world, const AddressSpaceSave& space, const pb::Image& image, Snapshot* snapshot) {
  Questions questions{world, image, std::vector<TapeDraft>(world.threads().size())};
  for (const StateModule* module : state_modules()) {
    if (module->ask != nullptr) VMCKPT_TRY(module->ask(questions));
  }
  if (snapshot != nullptr) snapshot->ask(world, space, questions.leader());
  return questions;
}

// A filter that forbids a question is a refusal; one that only forbids forking costs a longer pause.
Result<bool> may_fork(const pb::Image& image, const Questions& questions) {
  const auto& threads = one_process(image).process.threads();
  for (int i = 0; i < threads.size(); ++i) {
    VMCKPT_TRY(check_tape_against_filters(threads[i], questions.tapes[static_cast<size_t>(i)], TapeNeeds::kEveryCall));
  }
  return check_tape_against_filters(threads[0], questions.tapes.front(), TapeNeeds::kEveryCallAndFork).ok();
}

void save_guards(std::vector<GuardRegion> found, const std::vector<GuardRegion>& known, pb::AddressSpace* saved) {
  found.insert(found.end(), known.begin(), known.end());
  std::sort(found.begin(), found.end(), [](const GuardRegion& a, const GuardRegion& b) { return a.start < b.start; });
  for (const GuardRegion& guard : found) {
    pb::GuardRegion* entry = saved->add_guards();
    entry->set_start(guard.start);
    entry->set_end(guard.end);
  }
}

}  // namespace

// What is taken by a phase is given back by the destructor, in reverse.
struct Checkpoint::Work {
  explicit Work(ImageWriter image_writer) : writer(std::move(image_writer)) {}

  // Calls one hook of every module that has it, in the registry's order.
  template <typename Hook, typename... More>
  Result<void> for_each_module(Hook hook, const More&... more) {
    for (const StateModule* module : state_modules()) {
      if (module->*hook == nullptr) continue;
      const int64_t begun_us = monotonic_us();
      VMCKPT_TRY((module->*hook)(*state, more...));
      if (state->world != nullptr) module_us[module] += monotonic_us() - begun_us;
    }
    return {};
  }

  ImageWriter writer;
  pb::Image image;
  std::vector<std::string> notes;
  std::optional<CapturedFiles> captured;
  std::optional<StateSave> state;
  Snapshot snapshot;  // ends after the target has gone on: its page tables take their time
  std::optional<StoppedWorld> world;  // if it does not run on, or where the target may not fork, to the end
  std::optional<Questions> questions;
  pid_t source = 0;  // whose memory is written
  int64_t frozen_us = 0;
  int64_t clocks_late_ns = 0;
  std::map<const StateModule*, int64_t> module_us;  // in the pause
};

constexpr Checkpoint::Phase Checkpoint::kPhases[] = {
    {"prepare", &Checkpoint::prepare, Limit::kPatience},
    {"quiesce", &Checkpoint::quiesce, Limit::kFreeze},
    {"freeze", &Checkpoint::freeze, Limit::kFreeze},
    {"drain", &Checkpoint::drain, Limit::kFreeze},
    {"save", &Checkpoint::save, Limit::kNone},
    {"snapshot", &Checkpoint::snapshot, Limit::kNone},  // tapes have a limit of their own
    {"resume", &Checkpoint::resume, Limit::kNone},
    {"write", &Checkpoint::write, Limit::kNone, true},
    {"seal", &Checkpoint::seal, Limit::kNone, true},
    {"publish", &Checkpoint::publish, Limit::kNone, true},
};

Checkpoint::Checkpoint(Target& target, CheckpointRequest request, std::function<void()> look_after_others)
    : target_(target), request_(std::move(request)), meanwhile_([this, look = std::move(look_after_others)] {
        try {
          if (look) look();
        } catch (const std::exception& problem) {  // not through the tapes that are being played
          abort(fmt::format("look after clients during the checkpoint: {}", problem.what()));
        }
        return check_wanted();
      }),
      started_us_(monotonic_us()) {}

Checkpoint::~Checkpoint() = default;

bool Checkpoint::is_complete() const { return next_ == std::size(kPhases); }

// Looked at once: the thread of a phase may be about to count it up.
const char* Checkpoint::next_phase() const {
  const size_t next = next_;
  return next == std::size(kPhases) ? "complete" : kPhases[next].name;
}

bool Checkpoint::next_runs_beside_the_target() const {
  const size_t next = next_;
  return next != std::size(kPhases) && kPhases[next].beside_target;
}

pid_t Checkpoint::snapshot_pid() const { return work_ ? work_->snapshot.pid() : 0; }

pid_t Checkpoint::copied_pid() const {
  if (!work_) return 0;
  return work_->snapshot.exists() || !work_->world ? work_->snapshot.pid() : work_->world->pid();
}

int64_t Checkpoint::limit_us(Limit limit) const {
  if (limit == Limit::kFreeze) return request_.freeze_timeout_us;
  return limit == Limit::kPatience ? std::max<int64_t>(started_us_ + kPatienceUs - monotonic_us(), 0)
                                   : std::numeric_limits<int64_t>::max() / 2;
}

Result<void> Checkpoint::advance() {
  const Phase& phase = kPhases[next_];
  VMCKPT_TRY(check_wanted());
  auto done = (this->*phase.run)(Waiting(monotonic_us() + limit_us(phase.limit), &meanwhile_));
  if (!done.ok()) {
    VMCKPT_TRY(check_wanted());  // why it was given up is the better reason
    const bool may_begin_again = has_others_ && monotonic_us() - started_us_ < kPatienceUs && others_may_end_soon(target_);
    if (!may_begin_again) return done;
    work_.reset();
    VMCKPT_TRY(meanwhile_.check());
    ::usleep(kLookAgainUs);
    clock_ = PhaseClock();
    next_ = 0;
    return {};
  }
  clock_.mark(phase.name);
  fault_point(phase.name);
  ++next_;
  if (!is_complete()) return {};
  result_.phases = clock_.phases;
  result_.total_us = monotonic_us() - started_us_;
  return {};
}

void Checkpoint::abort(const std::string& why) {
  const std::lock_guard lock(abort_mutex_);
  if (is_being_published_) return;
  if (why_aborted_.empty()) why_aborted_ = why;
  progress_.cancelled = true;
}

void Checkpoint::check_timeout() {
  if (request_.timeout_us == 0 || monotonic_us() - request_.asked_us < request_.timeout_us) return;
  abort(fmt::format("the checkpoint took longer than {:g} s, which is its --timeout",
                    static_cast<double>(request_.timeout_us) / 1e6));
}

Result<void> Checkpoint::check_wanted() {
  check_timeout();
  const std::lock_guard lock(abort_mutex_);
  return why_aborted_.empty() ? Result<void>() : error(why_aborted_);
}

Result<pid_t> Checkpoint::wait_for_only_process(const Waiting& waiting) {
  for (;; ::usleep(kLookAgainUs)) {
    bool others = false;
    auto pid = only_process(target_, others);
    if (pid.ok() || !others || waiting.is_over() || !others_may_end_soon(target_)) return pid;
    VMCKPT_TRY(waiting.check());
  }
}

Result<void> Checkpoint::prepare(const Waiting& waiting) {
  has_others_ = false;
  const pid_t pid = VMCKPT_TRY(wait_for_only_process(waiting));
  VMCKPT_TRY(check_namespaces(pid, target_.namespaces));
  VMCKPT_TRY(check_root_directory(pid));
  const ImageDestination destination = VMCKPT_TRY(choose_destination(target_, request_.output));
  const ImageIdentity identity{random_id(), target_.parent_image_id, target_.target_id};
  work_ = std::make_unique<Work>(VMCKPT_TRY(ImageWriter::create(destination, identity)));
  Work& work = *work_;
  (void)work.image.mutable_objects();  // there before another thread fills it (save_beside)
  save_host(work.image.mutable_host());
  VMCKPT_TRY(check_may_look_into(pid));
  const std::string maps = VMCKPT_TRY(read_whole_file(fmt::format("/proc/{}/maps", pid)));
  target_.ledger_address = VMCKPT_TRY(find_ledger(pid, maps, target_.ledger_address));
  save_target(target_, destination, work.image.mutable_target());
  work.captured.emplace(work.writer, copies_stopped_target() ? ~uint64_t{0} : request_.shared_limit_bytes);
  work.state.emplace(StateSave{pid,
                               target_.launch_filter,
                               target_.backing,
                               {request_.self_contained, request_.shared_files},
                               target_.kvm,
                               target_.interrupted,
                               work.image,
                               *work.captured,
                               work.notes});
  work.state->ledger = VMCKPT_TRY(read_ledger(pid, target_.ledger_address));
  return work.for_each_module(&StateModule::prepare);
}

Result<void> Checkpoint::quiesce(const Waiting&) {
  work_->frozen_us = monotonic_us();
  target_.interrupted.set_partial_calls({work_->state->pid, RemoteAddr(work_->state->ledger->partial_calls)});
  return work_->for_each_module(&StateModule::quiesce);
}

Result<void> Checkpoint::freeze(const Waiting& waiting) {
  StateSave& state = *work_->state;
  work_->world.emplace(VMCKPT_TRY(freeze_at_rest(state, target_.ledger_address, waiting)));
  state.world = &*work_->world;
  // From now on nothing moves but what tapes do, and no image has a closed gate.
  if (state.gate) state.gate->open();
  return still_only_process(target_, state.pid, has_others_);
}

Result<void> Checkpoint::drain(const Waiting& waiting) { return work_->for_each_module(&StateModule::drain, waiting); }

Result<void> Checkpoint::save(const Waiting&) { return work_->for_each_module(&StateModule::save); }

Result<void> Checkpoint::snapshot(const Waiting&) {
  Work& work = *work_;
  StoppedWorld& world = *work.world;
  auto saved_beside = std::async(std::launch::async, [&] { return work.for_each_module(&StateModule::save_beside); });
  work.questions.emplace(
      VMCKPT_TRY(ask(world, work.state->space, work.image, copies_stopped_target() ? nullptr : &work.snapshot)));
  if (!VMCKPT_TRY(may_fork(work.image, *work.questions)) && !copies_stopped_target()) {
    work.snapshot.give_up("the target's seccomp filter forbids forking");
    work.questions.emplace(VMCKPT_TRY(ask(world, work.state->space, work.image, nullptr)));
  }
  std::vector<ThreadTape> tapes;
  for (size_t i = 0; i < world.threads().size(); ++i) tapes.push_back({&world.threads()[i], &work.questions->tapes[i]});
  const int64_t asked_us = monotonic_us();
  VMCKPT_TRY(play_tapes(world, *work.state->ledger, tapes, work.snapshot.taker(), &meanwhile_));
  VMCKPT_TRY(work.snapshot.settle(work.questions->leader()));
  VMCKPT_TRY(saved_beside.get());
  VMCKPT_TRY(expect_still_stopped(world.pid()));
  VMCKPT_TRY(work.for_each_module(&StateModule::connect));
  // Timers were looked at up to now: clocks that were read earlier than they would let them go off early after a restart.
  work.clocks_late_ns = (monotonic_us() - asked_us) * 1000;
  for (const auto& [id, file] : work.captured->files()) *work.image.add_captured_files() = file;
  if (!work.snapshot.why_none().empty())
    work.notes.push_back(work.snapshot.why_none() + ": its memory was copied while it was stopped");
  return {};
}

Result<void> Checkpoint::resume(const Waiting&) {
  Work& work = *work_;
  work.source = work.state->pid;
  if (work.snapshot.exists()) {
    work.source = work.snapshot.pid();
    work.world->resume();
    work.world.reset();
    result_.pause_us = monotonic_us() - work.frozen_us;
  }
  work.state->world = nullptr;
  const AddressSpaceSave& space = work.state->space;
  VMCKPT_TRY(work.snapshot.check(space));
  work.questions->take_answers(work.image);
  advance_clocks(work.clocks_late_ns, work.image.mutable_host());
  for (const std::string& note : work.notes) work.image.add_notes(note);
  for (const DumpRange& range : space.ranges) {
    if (range.pages != DumpRange::Pages::kGuards) bytes_to_look_at_ += range.end - range.start;
  }
  for (const StateModule* module : state_modules()) {
    if (auto found = work.module_us.find(module); found != work.module_us.end())
      result_.modules.emplace_back(module->name, found->second);
  }
  result_.notes = work.notes;
  return {};
}

Result<void> Checkpoint::write(const Waiting&) {
  const AddressSpaceSave& space = work_->state->space;
  std::vector<GuardRegion> guards = VMCKPT_TRY(dump_pages(work_->source, space.ranges, work_->writer, progress_));
  save_guards(std::move(guards), space.guards, &one_process(&work_->image).memory);
  return {};
}

Result<void> Checkpoint::seal(const Waiting&) {
  VMCKPT_TRY(work_->writer.seal(work_->image));
  result_.memory_bytes_saved = work_->writer.page_bytes_written();
  result_.image_bytes = work_->writer.file_bytes();
  return {};
}

Result<void> Checkpoint::publish(const Waiting&) {
  {
    const std::lock_guard lock(abort_mutex_);
    if (!why_aborted_.empty()) return error(why_aborted_);
    is_being_published_ = true;
  }
  result_.image = VMCKPT_TRY(work_->writer.publish());
  if (work_->writer.is_numbered()) result_.image_number = work_->writer.number();
  if (work_->world) result_.pause_us = monotonic_us() - work_->frozen_us;
  return {};
}

void Checkpoint::end_pause() {
  if (!work_->world) return;
  // By pidfd: it may have been killed by somebody else meanwhile, and its number be another process's.
  auto send = [&](int signal) { (void)::syscall(SYS_pidfd_send_signal, work_->world->pidfd(), signal, nullptr, 0); };
  if (request_.afterwards == Afterwards::kKilled) {
    send(SIGKILL);
    work_->world->abandon();
  } else if (request_.afterwards == Afterwards::kStopped) {
    // The first thread that is let go of takes it before its next instruction, and it is all threads' then.
    send(SIGSTOP);
  }
}

Result<CheckpointResult> checkpoint_target(Target& target, const CheckpointRequest& request) {
  Checkpoint checkpoint(target, request);
  while (!checkpoint.is_complete()) VMCKPT_TRY(checkpoint.advance());
  return checkpoint.result();
}

}  // namespace vmckpt
