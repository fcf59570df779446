// All open descriptors of one process: the three entry points that call the modules (descriptor_kinds.inc).
//
//   save     walk /proc/PID/fd -> one TargetFile per open file description -> its module -> links between the files
//   restore  every module makes its objects at service numbers -> status flags -> everything below the service numbers
//            is closed -> dup3 to the target's numbers -> epoll registrations -> service numbers closed -> locks
//
// Epoll registrations name numbers, so they wait for the numbers; POSIX locks are lost on any close of the same file,
// so they wait for the closes. Nothing here changes the running target: it works on duplicates (pidfd_getfd, Linux
// 5.6), which share the target's open files, and only asks.
#include "modules/descriptors.h"

#include <algorithm>
#include <ctime>

#include <linux/close_range.h>
#include <linux/kcmp.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "core/clock.h"
#include "image/one_process.h"
#include "modules/descriptor_module.h"
#include "modules/module.h"
#include "tracer/ledger_reader.h"

namespace vmckpt {
namespace {

constexpr const DescriptorModule* kModules[] = {
#define DESCRIPTOR_KIND(name, module) &module,
#include "modules/descriptor_kinds.inc"
#undef DESCRIPTOR_KIND
};

const DescriptorModule* find_module(const TargetFile& file) {
  for (const DescriptorModule* module : kModules) {
    if (module->recognise(file)) return module;
  }
  return nullptr;
}

int64_t realtime_ns() {
  return clock_ns(CLOCK_REALTIME);
}

// What stat does not tell and modules need to recognise their own.
Result<void> ask_for_kind(TargetFile& file) {
  if ((file.flags & O_PATH) != 0) return {};
  int fd = file.duplicate.get();
  if (S_ISREG(file.status.st_mode) || S_ISDIR(file.status.st_mode)) {
    struct statfs fs;
    if (::fstatfs(fd, &fs) != 0) return errno_error("ask for the file system of " + file.describe());
    file.file_system = static_cast<uint64_t>(fs.f_type);
  }
  if (!S_ISSOCK(file.status.st_mode)) return {};
  const std::pair<int, int*> questions[] = {
      {SO_DOMAIN, &file.socket_domain}, {SO_TYPE, &file.socket_type}, {SO_PROTOCOL, &file.socket_protocol}};
  for (auto [option, answer] : questions) {
    socklen_t bytes = sizeof *answer;
    if (::getsockopt(fd, SOL_SOCKET, option, answer, &bytes) != 0) {
      return errno_error("ask what kind of socket is " + file.describe());
    }
  }
  return {};
}

// unshare(2) gives a thread descriptors that /proc/PID/fd does not show, or a working directory and umask that are not the
// process's.
Result<void> refuse_separate_tables(const StoppedWorld& world) {
  constexpr std::pair<int, const char*> kOwn[] = {{KCMP_FILES, "a descriptor table of its own (unshare of CLONE_FILES)"},
                                                  {KCMP_FS, "a working directory and umask of its own (unshare of CLONE_FS)"}};
  for (const StoppedThread& thread : world.threads()) {
    for (const auto& [kind, what] : kOwn) {
      long order = ::syscall(SYS_kcmp, world.pid(), thread.tid, kind, 0, 0);
      if (order <= 0) continue;  // the same, or kcmp is not permitted
      return error(fmt::format("thread {} has {}", thread.tid_in_target, what), "checkpoint again when that thread has ended");
    }
  }
  return {};
}

uint64_t note_key(NoteKind kind, int64_t value) {
  return (uint64_t{static_cast<uint32_t>(kind)} << 32) ^ static_cast<uint64_t>(value);
}

Result<void> index_notes(SaveContext& context) {
  const Ledger& ledger = context.save.ledger;
  context.further_notes = VMCKPT_TRY(read_further_notes(context.pid(), ledger));
  for (uint32_t number = 0; number < ledger.notes_used; ++number) {
    if (number >= kLedgerNotes + context.further_notes.size()) break;
    const LedgerNote& note = context.ledger_note(number);
    switch (note.kind) {
      case NoteKind::kInotifyWatch:
      case NoteKind::kEventfdSemaphore:
      case NoteKind::kUnixBind: context.notes_by_key.emplace(note_key(note.kind, note.value), number); break;
      default: break;
    }
  }
  return {};
}

void index_files(SaveContext& context) {
  for (const TargetFile& file : context.files) {
    for (const TargetFile::Number& number : file.numbers) context.by_number[number.number] = &file;
    if (S_ISSOCK(file.status.st_mode) && (file.flags & O_PATH) == 0)
      context.by_socket_inode[file.status.st_ino] = &file;
  }
}

Result<void> save_file(SaveContext& context, TargetFile& file) {
  int fd = file.duplicate.get();
  VMCKPT_TRY(ask_for_kind(file));
  const DescriptorModule* module = find_module(file);
  if (module == nullptr) return refusal(file);
  pb::OpenFile* saved = context.image.add_open_files();
  file.saved = saved;
  saved->set_id(file.file_id());
  saved->set_shown_number(file.lowest());
  saved->set_name(file.link);
  saved->set_status_flags(file.flags);
  VMCKPT_TRY(save_async_io(context, file, fd, saved));
  VMCKPT_TRY(save_locks(file, saved));
  return module->save(context, file, fd, saved);
}

void save_numbers(const std::vector<TargetFile>& files, pb::DescriptorTable& table) {
  std::map<int, std::pair<uint32_t, bool>> by_number;
  for (const TargetFile& file : files) {
    for (const TargetFile::Number& number : file.numbers) by_number[number.number] = {file.file_id(), number.close_on_exec};
  }
  table.mutable_descriptors()->Reserve(static_cast<int>(by_number.size()));
  for (const auto& [number, leads_to] : by_number) {
    pb::Descriptor* entry = table.add_descriptors();
    entry->set_number(number);
    entry->set_file(leads_to.first);
    entry->set_close_on_exec(leads_to.second);
  }
}

// Objects are made beside their final numbers, so that many more are open for a moment than the target had.
Result<void> raise_descriptor_limit(const pb::Image& image, int first_service_fd) {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return errno_error("read the limit of open files");
  rlim_t needed = static_cast<rlim_t>(first_service_fd) + static_cast<rlim_t>(image.open_files_size()) * 2 + 64;
  for (const pb::Descriptor& descriptor : one_process(image).descriptors.descriptors()) {
    needed = std::max(needed, static_cast<rlim_t>(descriptor.number()) + 1);
  }
  if (limit.rlim_cur >= needed) return {};
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
  if (limit.rlim_max < needed) {
    return error(fmt::format("restart needs {} descriptors, the limit here is {}", needed, limit.rlim_max),
                 "raise it with `ulimit -Hn`");
  }
  return {};
}

Result<void> place_numbers(RestoreContext& context) {
  if (::syscall(SYS_close_range, 0, context.restore.first_service_fd - 1, 0) != 0) {
    return errno_error("close descriptors left over below the target's");
  }
  for (const pb::OpenFile& file : context.image.open_files()) {
    for (const pb::Descriptor& number : context.descriptors.of(file)) {
      int flags = number.close_on_exec() ? O_CLOEXEC : 0;
      if (::dup3(context.fd(file.id()), number.number(), flags) < 0) {
        return errno_error(fmt::format("put {} at number {}", describe(file), number.number()));
      }
    }
  }
  return {};
}

// From then on the file may send signals, which name the number by which the flag was set (si_fd).
Result<void> restore_async_flag(const RestoreContext& context, const pb::OpenFile& file) {
  if ((file.status_flags() & (O_PATH | O_ASYNC)) != O_ASYNC) return {};
  const int number = context.descriptors.lowest(file);
  const int flags = ::fcntl(number, F_GETFL);
  if (flags < 0 || ::fcntl(number, F_SETFL, flags | O_ASYNC) != 0) return errno_error(describe(file) + ": set O_ASYNC");
  return {};
}

}  // namespace

Result<void> save_descriptors(DescriptorSave& save, pb::Image& image) {
  Fd proc(::open(fmt::format("/proc/{}", save.world.pid()).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!proc) return errno_error(fmt::format("open /proc/{}", save.world.pid()));
  SaveContext context{save, image, *image.mutable_objects(), proc.get(), {}, {}, {}, {}, {}, {}, {}, {}};
  VMCKPT_TRY(refuse_separate_tables(save.world));
  context.objects.set_checkpoint_realtime_ns(realtime_ns());
  context.files = VMCKPT_TRY(walk_descriptors(save.world, proc.get()));
  index_files(context);
  VMCKPT_TRY(index_notes(context));
  save_numbers(context.files, one_process(&image).descriptors);
  image.mutable_open_files()->Reserve(static_cast<int>(context.files.size()));
  for (TargetFile& file : context.files) VMCKPT_TRY(save_file(context, file));
  for (const DescriptorModule* module : kModules) {
    if (module->save_links != nullptr) VMCKPT_TRY(module->save_links(context));
  }
  return {};
}

void check_descriptors(const pb::Image& image, const FileAccess& access, const std::set<std::string>& put_back,
                       std::vector<Error>& problems, Notes& notes) {
  const DescriptorsOfFiles descriptors(one_process(image).descriptors);
  CheckContext context{image, descriptors, access, put_back, problems, notes};
  for (const DescriptorModule* module : kModules) {
    if (module->check != nullptr) module->check(context);
  }
}

Result<void> restore_descriptors(const pb::Image& image, DescriptorRestore& restore) {
  const DescriptorsOfFiles descriptors(one_process(image).descriptors);
  RestoreContext context{image, descriptors, restore, {}, {}};
  VMCKPT_TRY(raise_descriptor_limit(image, restore.first_service_fd));
  for (const DescriptorModule* module : kModules) VMCKPT_TRY(module->restore(context));
  for (const pb::OpenFile& file : image.open_files()) {
    if (!context.has(file.id())) return error(describe(file) + " is of a kind that this vmckpt cannot restore");
    VMCKPT_TRY(restore_file_status(context, file, context.fd(file.id())));
  }
  VMCKPT_TRY(place_numbers(context));
  for (const pb::OpenFile& file : image.open_files()) VMCKPT_TRY(restore_async_flag(context, file));
  VMCKPT_TRY(restore_epoll_registrations(context));
  context.built.clear();
  for (const pb::OpenFile& file : image.open_files()) {
    if (context.shared_with_restart.count(file.id()) == 0) VMCKPT_TRY(restore_locks(context, file));
  }
  return {};
}

const TargetFile* SaveContext::find_number(int number) const {
  auto found = by_number.find(number);
  return found == by_number.end() ? nullptr : found->second;
}

const TargetFile* SaveContext::find_socket(uint64_t inode) const {
  auto found = by_socket_inode.find(inode);
  return found == by_socket_inode.end() ? nullptr : found->second;
}

const LedgerNote& SaveContext::ledger_note(uint32_t number) const {
  return number < kLedgerNotes ? save.ledger.notes[number] : further_notes[number - kLedgerNotes];
}

std::vector<uint32_t> SaveContext::list_ledger_notes(NoteKind kind, int64_t value) const {
  std::vector<uint32_t> numbers;
  auto [begin, end] = notes_by_key.equal_range(note_key(kind, value));
  for (auto entry = begin; entry != end; ++entry) {
    const LedgerNote& note = ledger_note(entry->second);
    if (note.kind == kind && note.value == value) numbers.push_back(entry->second);
  }
  return numbers;
}

const LedgerNote* SaveContext::find_ledger_note(NoteKind kind, const TargetFile& file, int64_t value) const {
  for (uint32_t number : list_ledger_notes(kind, value)) {
    const LedgerNote& note = ledger_note(number);
    for (const TargetFile::Number& own : file.numbers) {
      if (own.number == note.fd) return &note;
    }
  }
  return nullptr;
}

Result<Fd> RestoreContext::lift(Fd fd) const {
  return lift_above(std::move(fd), restore.first_service_fd);
}

Result<void> RestoreContext::put(const pb::OpenFile& file, Fd fd) {
  built[file.id()] = VMCKPT_TRY(lift(std::move(fd)));
  return {};
}

int RestoreContext::fd(uint32_t id) const {
  auto found = built.find(id);
  return found == built.end() ? -1 : found->second.get();
}

std::string describe(const pb::OpenFile& file) { return fmt::format("descriptor {} (\"{}\")", file.shown_number(), file.name()); }

namespace {

// While the leader answers: nothing moves in a stopped target but that.
Result<void> save(StateSave& state) {
  DescriptorSave save{*state.world, *state.ledger, state.captured, state.notes, state.kvm_notes.get()};
  return save_descriptors(save, state.image);
}

Result<void> restore(StateRestore& state) {
  DescriptorRestore restore{state.captured, state.access, state.stdio, state.first_service_fd, state.notes};
  VMCKPT_TRY(restore_descriptors(state.image, restore));
  state.terminal_master = std::move(restore.terminal_master);
  return {};
}

void check(Preflight& preflight) {
  check_descriptors(preflight.image, preflight.access, preflight.put_back, preflight.problems, preflight.notes);
}

}  // namespace

extern const StateModule kDescriptorsModule{.name = "descriptors", .save_beside = save, .check = check, .restore = restore};

}  // namespace vmckpt
