// Reads like the list in docs/architecture.md: prepare, freeze, save, snapshot, resume, write.
#include "supervisor/checkpoint_sequence.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <future>

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/fd.h"
#include "core/proc.h"
#include "core/random.h"
#include "image/one_process.h"
#include "image/reader.h"
#include "modules/aio.h"
#include "modules/clocks.h"
#include "modules/descriptors.h"
#include "modules/host.h"
#include "modules/kvm.h"
#include "modules/module.h"
#include "modules/seccomp.h"
#include "supervisor/fault_point.h"
#include "supervisor/phase_clock.h"
#include "tracer/thread_state.h"
#include "tracer/ledger_reader.h"
#include "tracer/remote_tape.h"

namespace vmckpt {
namespace {

constexpr int64_t kAioPatienceUs = 2'000'000;  // for requests in flight to end, while the target stands still
constexpr int kFreezeTries = 50;  // a ledger update lasts microseconds
constexpr int kLedgerUpdateUs = 200;  // between two of them

Result<std::vector<pid_t>> processes_of(const Target& target) {
  std::vector<pid_t> processes = VMCKPT_TRY(list_descendants(::getpid()));
  std::erase(processes, target.namespace_init);
  return processes;
}

// Until the coordinator takes on whole trees: one process. `others`: there are more.
Result<pid_t> only_process(const Target& target, bool& others) {
  std::vector<pid_t> processes = VMCKPT_TRY(processes_of(target));
  if (processes.empty()) return error(fmt::format("target \"{}\" has ended", target.name));
  if (processes.size() == 1) {
    if (!process_exists(processes.front())) return error(fmt::format("target \"{}\" has ended", target.name));
    return processes.front();
  }
  others = true;
  std::string list;
  for (pid_t pid : processes) list += fmt::format("{}{} ({})", list.empty() ? "" : ", ", pid, command_of(pid));
  return error(fmt::format("target \"{}\" has {} processes: {}", target.name, processes.size(), list),
               "one process can be checkpointed, trees cannot yet; wait until its children have ended");
}

// The same when `pid` stands still, and with it the only one that could start others. Its children come first: a middle process
// of a double fork that has ended meanwhile is a zombie there, or has already passed its child on to who adopts orphans.
Result<void> still_only_process(const Target& target, pid_t pid, bool& others) {
  others = !VMCKPT_TRY(list_children(pid)).empty();
  for (pid_t adopter : {::getpid(), target.namespace_init}) {
    if (adopter == 0) continue;
    for (pid_t child : VMCKPT_TRY(list_children(adopter))) {
      others |= child != pid && child != target.namespace_init && process_exists(child);
    }
  }
  if (!others) return {};
  return error(fmt::format("process {} has just started another", pid), "try again when that has ended");
}

// Whether it is worth while to wait: a program that has just started another often ends it soon; one that has run for longer is
// there to stay.
bool others_may_end_soon(const Target& target) {
  constexpr size_t kStartTime = 19;  // of read_stat()
  constexpr int64_t kYoungNs = 3'000'000'000;
  auto processes = processes_of(target);
  if (!processes.ok()) return false;
  timespec now{};
  ::clock_gettime(CLOCK_BOOTTIME, &now);
  const int64_t now_ns = now.tv_sec * 1'000'000'000 + now.tv_nsec, tick_ns = 1'000'000'000 / ::sysconf(_SC_CLK_TCK);
  if (processes->size() <= 1) return true;  // they have ended
  return std::any_of(processes->begin(), processes->end(), [&](pid_t pid) {
    auto stat = read_stat(pid);
    if (pid == target.pid || !stat.ok() || stat->size() <= kStartTime) return false;
    return now_ns - parse_number((*stat)[kStartTime]) * tick_ns < kYoungNs;
  });
}

// A process that has become another user can be looked into by root with CAP_SYS_PTRACE only, which containers leave out.
Result<void> check_may_look_into(pid_t pid) {
  const auto maps = open_file(fmt::format("/proc/{}/maps", pid), O_RDONLY);
  if (maps.ok() || maps.error().err != EACCES) return {};
  auto status = VMCKPT_TRY(read_status(pid));
  const auto ids = split_words(status_field(status, "Uid"));
  return error(fmt::format("the kernel does not let vmckpt look into process {}, which runs as user {}", pid, ids.empty() ? "?" : ids[0]),
               "give vmckpt CAP_SYS_PTRACE (docker run --cap-add=SYS_PTRACE), or let the program stay the user that launches it");
}

// The N of the NAME-N.ckpt with the highest one in the folder, 0 if there is none. Others may have been removed meanwhile: a
// number that was used is not used again, or the newest image would not be the one with the highest.
uint64_t highest_number(const std::string& directory, const std::string& name) {
  uint64_t highest = 0;
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(directory, ignored)) {
    const std::string file = entry.path().filename().string();
    constexpr std::string_view kEnd = ".ckpt";
    if (!file.starts_with(name + "-") || !file.ends_with(kEnd)) continue;
    const std::string_view digits = std::string_view(file).substr(name.size() + 1, file.size() - name.size() - 1 - kEnd.size());
    uint64_t number = 0;
    const auto [end, problem] = std::from_chars(digits.data(), digits.data() + digits.size(), number);
    if (problem == std::errc() && end == digits.data() + digits.size() && number < uint64_t{1} << 62) highest = std::max(highest, number);
  }
  return highest;
}

// Decides the final name before anything is stopped, so that a refused name costs nothing.
Result<ImageDestination> choose_destination(const Target& target, const CheckpointRequest& request) {
  ImageDestination destination;
  if (request.output.empty()) {
    destination.numbered_stem = target.image_dir + "/" + target.name;
    destination.number = std::max(target.images_numbered, highest_number(target.image_dir, target.name)) + 1;
    return destination;
  }
  destination.path = request.output;
  struct stat info {};
  if (::lstat(request.output.c_str(), &info) != 0) return destination;
  auto refuse = [&](const char* what) {
    return error(fmt::format("{} exists and is {}; it is not overwritten", request.output, what),
                 "choose another name or remove it");
  };
  if (!S_ISREG(info.st_mode)) return refuse("no regular file");
  Fd fd = VMCKPT_TRY(open_file(request.output, O_RDONLY));
  auto header = read_image_header(fd.get(), request.output);
  if (!header.ok()) return refuse("no image");
  if (!std::equal(target.target_id.begin(), target.target_id.end(), header->target_id)) return refuse("another target's image");
  destination.replace = true;
  return destination;
}

// Stops the target while no thread is writing into the ledger and every vCPU is at rest.
Result<StoppedWorld> freeze_with_ledger(pid_t pid, const CheckpointRequest& request, RemoteAddr ledger_address,
                                        std::optional<VcpuGate>& gate, bool split_irqchip, InterruptedCalls& interrupted,
                                        std::unique_ptr<Ledger>* ledger) {
  const int64_t deadline_us = monotonic_us() + request.freeze_timeout_us;
  std::optional<StoppedWorld> world;
  world.emplace(VMCKPT_TRY(freeze(pid, request.freeze_timeout_us, interrupted)));
  for (int tries = 1;; ++tries) {
    *ledger = VMCKPT_TRY(read_ledger(pid, ledger_address));
    std::optional<VcpuGate::Busy> busy;
    if (gate && split_irqchip) VMCKPT_TRY(gate->serve_requests(*world, request.freeze_timeout_us, interrupted));
    if (gate) busy = VMCKPT_TRY(gate->find_busy(*world));
    const bool submitting = (*ledger)->aio_submitters != 0;
    if ((*ledger)->writers == 0 && !submitting && !busy) return std::move(*world);
    // Submitting may mean waiting for a disk, as answering an access may.
    if ((submitting || busy) && monotonic_us() < deadline_us) tries = std::min(tries, kFreezeTries - 1);
    if (tries >= kFreezeTries && busy) return error(busy->describe(pid), "try again, or with a longer --freeze-timeout");
    if (tries >= kFreezeTries && submitting) {
      return error(fmt::format("process {} is submitting asynchronous I/O without end", pid), "try again when its disks are less busy");
    }
    if (tries >= kFreezeTries) {
      return error(fmt::format("process {} stays inside an update of its ledger", pid), "try again");
    }
    auto wait = [&](int64_t until_us) -> Result<bool> {
      if (busy) return gate->wait_for(*busy, std::min(deadline_us, until_us));
      ::usleep(kLedgerUpdateUs);
      return true;
    };
    if (world->is_stopped_by_job_control()) {
      constexpr int64_t kSliceUs = 500;
      const int64_t left_us = std::max<int64_t>(deadline_us - monotonic_us(), kSliceUs);
      StoppedWorld later = VMCKPT_TRY(
          freeze_later(std::move(*world), [&] { return wait(monotonic_us() + kSliceUs); }, left_us, interrupted));
      world.emplace(std::move(later));
    } else {
      world->resume();
      VMCKPT_TRY(wait(deadline_us));
      world.emplace(VMCKPT_TRY(freeze(pid, request.freeze_timeout_us, interrupted)));
    }
  }
}

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

std::vector<RunMapping> run_mappings_of(const pb::AddressSpace& memory) {
  std::vector<RunMapping> mappings;
  for (const pb::Mapping& mapping : memory.mappings()) {
    if (mapping.kind() == pb::Mapping::VCPU_RUN) mappings.push_back({RemoteAddr(mapping.start()), mapping.name()});
  }
  return mappings;
}

}  // namespace

Result<std::unique_ptr<CheckpointInProgress>> begin_checkpoint(Target& target, const CheckpointRequest& request) {
  constexpr int64_t kPatienceUs = 10'000'000;
  for (const int64_t until_us = monotonic_us() + kPatienceUs;;) {
    bool others = false;
    auto begun = try_checkpoint(target, request, others);
    if (begun.ok() || !others || monotonic_us() > until_us || !others_may_end_soon(target)) return begun;
    ::usleep(10'000);
  }
}

Result<std::unique_ptr<CheckpointInProgress>> try_checkpoint(Target& target, const CheckpointRequest& request, bool& others) {
  PhaseClock clock;
  int64_t started_us = monotonic_us();

  // 1. prepare, target running: everything that can be found out or opened early
  pid_t pid = VMCKPT_TRY(only_process(target, others));
  VMCKPT_TRY(check_namespaces(pid, target.namespaces));
  VMCKPT_TRY(check_root_directory(pid));
  ImageDestination destination = VMCKPT_TRY(choose_destination(target, request));
  ImageIdentity identity{random_id(), target.parent_image_id, target.target_id};
  std::unique_ptr<CheckpointInProgress> checkpoint(
      new CheckpointInProgress(VMCKPT_TRY(ImageWriter::create(destination, identity))));
  checkpoint->started_us_ = started_us;
  pb::Image& image = checkpoint->metadata_;
  save_host(image.mutable_host());
  VMCKPT_TRY(check_may_look_into(pid));
  std::string maps = VMCKPT_TRY(read_whole_file(fmt::format("/proc/{}/maps", pid)));
  target.ledger_address = VMCKPT_TRY(find_ledger(pid, maps, target.ledger_address));
  save_target(target, destination, image.mutable_target());
  auto early_ledger = VMCKPT_TRY(read_ledger(pid, target.ledger_address));
  AddressSpacePreview preview = VMCKPT_TRY(preview_address_space(pid, early_ledger->madvise_generation));
  const RemoteAddr kvm_ledger(early_ledger->kvm);
  const uint32_t kvm_objects = VMCKPT_TRY(count_kvm_objects(pid, kvm_ledger));
  if (kvm_objects != 0 && !target.kvm) target.kvm = VMCKPT_TRY(KvmHost::ask());
  bool split_irqchip = false;
  if (kvm_objects != 0) {
    // The target may just be writing them: what is missed now is found out later.
    if (auto early_notes = read_kvm_notes(pid, kvm_ledger); early_notes.ok()) {
      prepare_kvm(**early_notes, *target.kvm);
      split_irqchip = has_split_irqchip(**early_notes);
    }
  }
  clock.mark("prepare");
  fault_point("prepare");

  // 2. freeze: every vCPU at rest, every thread stopped, none inside a ledger update
  std::unique_ptr<Ledger> ledger;
  checkpoint->frozen_us_ = monotonic_us();
  std::optional<VcpuGate> gate;
  target.interrupted.set_partial_calls({pid, RemoteAddr(early_ledger->partial_calls)});
  if (kvm_ledger) target.interrupted.set_kvm_run_code(VMCKPT_TRY(find_kvm_run_code(pid, kvm_ledger)));
  if (kvm_objects != 0) gate.emplace(VMCKPT_TRY(VcpuGate::close(pid, kvm_ledger)));
  StoppedWorld world = VMCKPT_TRY(freeze_with_ledger(pid, request, target.ledger_address, gate, split_irqchip, target.interrupted, &ledger));
  // From now on nothing moves but what tapes do, and no image has a closed gate.
  if (gate) gate->open();
  VMCKPT_TRY(still_only_process(target, pid, others));
  VMCKPT_TRY(wait_for_aio(world, *ledger, std::min(request.freeze_timeout_us, kAioPatienceUs)));
  clock.mark("freeze");
  fault_point("freeze");

  // 3. save: what the kernel tells from outside
  Notes notes;
  CapturedFiles captured(checkpoint->writer_, request.stop ? ~uint64_t{0} : request.shared_limit_bytes);
  StateSave state{world, *ledger, target.launch_filter, image, notes};
  for (const StateModule* module : state_modules()) {
    if (module->save != nullptr) VMCKPT_TRY(module->save(state));
  }
  clock.mark("threads");
  AddressSpaceSave space = VMCKPT_TRY(save_address_space(world, *ledger, preview, target.backing,
                                                         {request.self_contained, request.shared_files, kvm_objects != 0}, captured,
                                                         &one_process(&image).memory));
  notes.insert(notes.end(), space.notes.begin(), space.notes.end());
  VMCKPT_TRY(save_aio(world, *ledger, target.launch_filter, &one_process(&image).memory));
  clock.mark("maps");
  std::unique_ptr<KvmNotes> kvm_notes;
  if (kvm_objects != 0) {
    kvm_notes = VMCKPT_TRY(read_kvm_notes(pid, RemoteAddr(ledger->kvm)));
    find_runs(run_mappings_of(one_process(image).memory), kvm_notes->objects);
    VMCKPT_TRY(save_kvm(world, *ledger, *kvm_notes, *target.kvm, image));
    clock.mark("kvm");
  }
  fault_point("save");

  // 4. snapshot: what the target must be asked itself, and the copy of its memory; descriptors are looked at meanwhile, since
  // nothing moves in a stopped target but its leader, which only answers
  DescriptorSave descriptors{world, *ledger, captured, notes, kvm_notes.get()};
  auto descriptors_saved = std::async(std::launch::async, [&] {
    return save_descriptors(descriptors, image);
  });
  Snapshot& snapshot = checkpoint->snapshot_;
  std::optional<Questions> questions;
  questions.emplace(VMCKPT_TRY(ask(world, space, image, request.stop ? nullptr : &snapshot)));
  if (!VMCKPT_TRY(may_fork(image, *questions)) && !request.stop) {
    snapshot.give_up("the target's seccomp filter forbids forking");
    questions.emplace(VMCKPT_TRY(ask(world, space, image, nullptr)));
  }
  std::vector<ThreadTape> tapes;
  for (size_t i = 0; i < world.threads().size(); ++i) tapes.push_back({&world.threads()[i], &questions->tapes[i]});
  const int64_t asked_us = monotonic_us();
  VMCKPT_TRY(play_tapes(world, *ledger, tapes, snapshot.taker()));
  VMCKPT_TRY(snapshot.settle(questions->leader()));
  clock.mark("snapshot");
  VMCKPT_TRY(descriptors_saved.get());
  VMCKPT_TRY(expect_still_stopped(pid));
  if (kvm_notes) VMCKPT_TRY(link_kvm_events(*kvm_notes, image));
  // Timers were looked at up to now: clocks that were read earlier than they would let them go off early after a restart.
  const int64_t clocks_late_ns = (monotonic_us() - asked_us) * 1000;
  for (const auto& [id, file] : captured.files()) *image.add_captured_files() = file;
  if (!snapshot.why_none().empty()) notes.push_back(snapshot.why_none() + ": its memory was copied while it was stopped");
  clock.mark("descriptors");
  fault_point("snapshot");

  // 5. resume: the pause ends here
  checkpoint->source_ = snapshot.exists() ? snapshot.pid() : pid;
  if (snapshot.exists()) {
    world.resume();
    checkpoint->result_.pause_us = monotonic_us() - checkpoint->frozen_us_;
  } else {
    checkpoint->world_.emplace(std::move(world));
  }
  clock.mark("resume");
  fault_point("resume");
  VMCKPT_TRY(snapshot.check(space));

  questions->take_answers(image);
  advance_clocks(clocks_late_ns, image.mutable_host());
  for (const std::string& note : notes) image.add_notes(note);
  checkpoint->ranges_ = std::move(space.ranges);
  checkpoint->guards_ = std::move(space.guards);
  for (const DumpRange& range : checkpoint->ranges_) {
    if (range.pages != DumpRange::Pages::kGuards) checkpoint->bytes_to_look_at_ += range.end - range.start;
  }
  checkpoint->result_.phases = std::move(clock.phases);
  checkpoint->result_.notes = std::move(notes);
  return checkpoint;
}

Result<CheckpointResult> CheckpointInProgress::write() {
  PhaseClock clock;
  std::vector<GuardRegion> guards = VMCKPT_TRY(dump_pages(source_, ranges_, writer_, progress_));
  guards.insert(guards.end(), guards_.begin(), guards_.end());
  std::sort(guards.begin(), guards.end(), [](const GuardRegion& a, const GuardRegion& b) { return a.start < b.start; });
  for (const GuardRegion& guard : guards) {
    pb::GuardRegion* saved = one_process(&metadata_).memory.add_guards();
    saved->set_start(guard.start);
    saved->set_end(guard.end);
  }
  clock.mark("write");
  fault_point("write");
  if (progress_.cancelled) return error("the checkpoint was cancelled: who asked for it has gone");
  result_.image = VMCKPT_TRY(writer_.commit(metadata_));
  if (writer_.is_numbered()) result_.image_number = writer_.number();
  clock.mark("commit");
  if (world_) result_.pause_us = monotonic_us() - frozen_us_;
  result_.memory_bytes_saved = writer_.page_bytes_written();
  result_.image_bytes = writer_.file_bytes();
  result_.phases.insert(result_.phases.end(), clock.phases.begin(), clock.phases.end());
  result_.total_us = monotonic_us() - started_us_;
  return result_;
}

void CheckpointInProgress::kill_target() {
  if (!world_) return;
  ::kill(world_->pid(), SIGKILL);
  world_->abandon();
}

CheckpointInProgress::~CheckpointInProgress() = default;

}  // namespace vmckpt
