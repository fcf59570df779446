#include "restart/rebuild.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <vector>

#include <fcntl.h>
#include <linux/sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/rseq.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core/page.h"
#include "image/one_process.h"
#include "memory/maps.h"
#include "memory/address_space.h"
#include "memory/captured_files.h"
#include "memory/file_owner.h"
#include "modules/credentials.h"
#include "modules/descriptors.h"
#include "modules/kvm.pb.h"
#include "modules/module.h"
#include "modules/process.h"
#include "modules/threads.h"
#include "player/player.h"
#include "restart/memory_plan.h"
#include "restart/page_reads.h"
#include "restart/vdso_plan.h"

namespace vmckpt {
namespace {

constexpr uint64_t kThreadStackBytes = 2 * kPageBytes;
constexpr uint64_t kLowestArena = 0x10000000;

uint64_t round_up(uint64_t bytes) { return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes; }

// Descriptors that restart itself needs lie above all of the target's, out of their way; or, where the limit of open files
// forbids that, in a gap between them (valgrind keeps its own just below the limit).
class ServiceDescriptors {
 public:
  Result<void> open_space(const pb::DescriptorTable& table, int open_files) {
    std::vector<int> taken = {0, 1, 2};
    for (const pb::Descriptor& descriptor : table.descriptors()) taken.push_back(descriptor.number());
    std::sort(taken.begin(), taken.end());
    const int highest = taken.back();
    const int needs = kOwnNeeds + 2 * open_files;
    first_ = highest + 1;
    if (raise_limit(highest + 1 + needs)) return {};
    const int err = errno;
    for (size_t i = 0; i + 1 < taken.size(); ++i) {
      if (taken[i + 1] - taken[i] <= needs) continue;
      first_ = taken[i] + 1;
      last_ = static_cast<unsigned>(taken[i + 1]) - 1;
      if (raise_limit(highest + 1)) return {};
      break;
    }
    errno = err;
    return errno_error(fmt::format("allow {} open files", highest + 1 + needs), "raise `ulimit -n` before restarting");
  }

  int first() const { return first_; }
  unsigned last() const { return last_; }

  // Moves a descriptor that must survive out of the way; the old number is closed with all others.
  Result<int> keep(int fd) {
    int kept = ::fcntl(fd, F_DUPFD_CLOEXEC, first_);
    if (kept < 0) return errno_error("keep a descriptor open");
    return kept;
  }

 private:
  static constexpr int kOwnNeeds = 1024;

  static bool raise_limit(int files) {
    rlimit limit{};
    ::getrlimit(RLIMIT_NOFILE, &limit);
    const auto wanted = static_cast<rlim_t>(files);
    if (limit.rlim_cur >= wanted) return true;
    limit.rlim_cur = wanted;
    limit.rlim_max = std::max(limit.rlim_max, wanted);
    return ::setrlimit(RLIMIT_NOFILE, &limit) == 0;
  }

  int first_ = 3;
  unsigned last_ = ~0u;
};

// Files that mappings refer to, each opened once for reading and once for writing where needed.
class MappedFiles {
 public:
  MappedFiles(const RebuiltFiles& captured, const FileAccess& access, const ServiceDescriptors& service)
      : captured_(captured), access_(access), service_(service) {}

  // -1 when the mapping is of no System V segment.
  int segment_of(const pb::Mapping& mapping) const {
    return mapping.kind() == pb::Mapping::CAPTURED ? captured_.segment(mapping.captured_id()) : -1;
  }

  Result<int> open_for(const pb::Mapping& mapping) {
    if (mapping.kind() == pb::Mapping::CAPTURED_PRIVATE) return captured_.fd(mapping.captured_id());
    if (mapping.kind() == pb::Mapping::CAPTURED) {
      return mapping.writable_file() ? captured_.fd(mapping.captured_id()) : open_captured_for_reading(mapping.captured_id());
    }
    const bool writable = mapping.kind() == pb::Mapping::FILE_SHARED && mapping.writable_file();
    auto [known, is_new] = files_.try_emplace({mapping.file().path(), writable}, -1);
    if (is_new) {
      Fd fd = VMCKPT_TRY(open(mapping.file(), writable));
      known->second = ::fcntl(fd.get(), F_DUPFD_CLOEXEC, service_.first());
      if (known->second < 0) return errno_error("keep " + mapping.file().path() + " open");
    }
    return known->second;
  }

 private:
  Result<Fd> open(const pb::FileIdentity& file, bool writable) const {
    const int flags = writable ? O_RDWR : O_RDONLY;
    if (const int put_back = captured_.fd_of_path(file.path()); put_back >= 0)
      return open_file(fmt::format("/proc/self/fd/{}", put_back), flags);
    pb::FileIdentity now;
    Fd fd = VMCKPT_TRY(open_mapped_file(file, flags, access_, &now));
    // Once more: it may have been exchanged since the preflight.
    if (writable && !access_.policy().accept_changed && !is_same_owner(file.origin(), now.origin().uid())) {
      return another_users(now.path(), file.origin(), now.origin().uid());
    }
    return fd;
  }

  // A mapping made through this descriptor can never be made writable. Where its mode forbids to read it, the one at hand must
  // do.
  int open_captured_for_reading(uint64_t id) {
    auto [known, is_new] = for_reading_.try_emplace(id, captured_.fd(id));
    if (!is_new) return known->second;
    Fd fd(::open(fmt::format("/proc/self/fd/{}", captured_.fd(id)).c_str(), O_RDONLY | O_CLOEXEC));
    const int kept = fd ? ::fcntl(fd.get(), F_DUPFD_CLOEXEC, service_.first()) : -1;
    if (kept >= 0) known->second = kept;
    return known->second;
  }

  const RebuiltFiles& captured_;
  const FileAccess& access_;
  const ServiceDescriptors& service_;
  std::map<std::pair<std::string, bool>, int> files_;
  std::map<uint64_t, int> for_reading_;
};

// A range that is free both now and in the target.
Result<uint64_t> find_free_range(const pb::AddressSpace& space, const std::vector<Vma>& own_maps, uint64_t bytes) {
  std::vector<std::pair<uint64_t, uint64_t>> taken;
  for (const pb::Mapping& mapping : space.mappings()) taken.emplace_back(mapping.start(), mapping.end());
  for (const Vma& vma : own_maps) taken.emplace_back(vma.start, vma.end);
  std::sort(taken.begin(), taken.end());
  // Away from neighbours: the kernel keeps a gap below mappings that grow down (stack_guard_gap, 1 MiB).
  constexpr uint64_t kMarginBytes = 16u << 20;
  uint64_t candidate = kLowestArena;
  for (const auto& [start, end] : taken) {
    if (start > candidate + bytes + kMarginBytes) break;
    candidate = std::max(candidate, round_up(end) + kMarginBytes);
  }
  if (candidate + bytes > kUserSpaceEnd) return error("the target's address space has no free range left for restart");
  return candidate;
}

struct Tapes {
  TapeDraft leader;
  std::vector<TapeDraft> others;
};

// Places in and around the arena, as tapes name them: tapes are drafted before it has a place, since its size depends on theirs.
constexpr TapeWord kArena = late_number(0), kArenaEnd = late_number(1), kBytesAboveArena = late_number(2);
constexpr TapeWord kVdsoParking = late_number(3);
constexpr TapeWord tape_of(size_t thread) { return late_number(static_cast<uint32_t>(4 + 2 * thread)); }
constexpr TapeWord stack_of(size_t thread) { return late_number(static_cast<uint32_t>(5 + 2 * thread)); }

// [player code | leader's tape | other threads' tapes | stacks | parking place of the vdso]
class Arena {
 public:
  Arena(const Tapes& tapes, uint64_t vdso_size) {
    code_bytes_ = round_up(static_cast<uint64_t>(__stop_vmckpt_player - __start_vmckpt_player));
    uint64_t offset = code_bytes_;
    auto place = [&](uint64_t bytes) {
      uint64_t at = offset;
      offset += round_up(bytes);
      return at;
    };
    tape_offsets_.push_back(place(tapes.leader.bytes_with_texts()));
    for (const TapeDraft& tape : tapes.others) tape_offsets_.push_back(place(tape.bytes_with_texts()));
    stacks_offset_ = place(kThreadStackBytes * tape_offsets_.size());
    parking_offset_ = place(vdso_size);
    bytes_ = offset;
  }

  uint64_t bytes() const { return bytes_; }
  void put_at(uint64_t address) { address_ = address; }
  uint64_t address() const { return address_; }
  uint64_t tape(size_t thread) const { return address_ + tape_offsets_[thread]; }
  uint64_t stack_top(size_t thread) const { return address_ + stacks_offset_ + kThreadStackBytes * (thread + 1); }
  uint64_t entry() const {
    return address_ + static_cast<uint64_t>(reinterpret_cast<const char*>(&vmckpt_player_entry) - __start_vmckpt_player);
  }

  Result<void> map() const {
    void* got = ::mmap(reinterpret_cast<void*>(address_), bytes_, PROT_READ | PROT_WRITE | PROT_EXEC,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (got == MAP_FAILED) return errno_error(fmt::format("map the player's arena at {:#x}", address_));
    std::memcpy(got, __start_vmckpt_player, static_cast<size_t>(__stop_vmckpt_player - __start_vmckpt_player));
    return {};
  }

  LateNumbers late_numbers() const {
    const uint64_t end = address_ + bytes_;
    LateNumbers late = {address_, end, kUserSpaceEnd - end, address_ + parking_offset_};
    for (size_t thread = 0; thread < tape_offsets_.size(); ++thread) {
      late.push_back(tape(thread));
      late.push_back(stack_top(thread) - kThreadStackBytes);
    }
    return late;
  }

  void lay_tape(size_t thread, const TapeDraft& tape, const LateNumbers& late, pid_t pid, pid_t tid) const {
    Tape head{};
    // The supervisor traces every thread: SIGSTOP is what it waits for, and cannot be blocked.
    head.end_signal = SIGSTOP;
    head.process_id = pid;
    head.thread_id = tid;
    std::vector<uint8_t> bytes = tape.lay_out_with_texts(this->tape(thread), head, late);
    std::memcpy(reinterpret_cast<void*>(this->tape(thread)), bytes.data(), bytes.size());
  }

 private:
  uint64_t address_ = 0;
  uint64_t bytes_ = 0;
  uint64_t code_bytes_ = 0;
  uint64_t stacks_offset_ = 0;
  uint64_t parking_offset_ = 0;
  std::vector<uint64_t> tape_offsets_;
};

// Everything that the tapes are made from.
struct Materials {
  const ImageReader& image;
  const pb::Image& metadata;
  const ServiceDescriptors& service;
  MappedFiles& files;
  const RebuiltFiles& captured;
  const std::vector<Vma>& own_maps;
  int executable_fd;
  int kvm_device;
  GuestClock guest_clock;
  const GuestRam& guest_ram;
  std::vector<pid_t> helper_numbers;  // free for threads that only help
};

std::vector<pid_t> free_helper_numbers(const pb::Image& image) {
  std::vector<pid_t> taken;
  for (const pb::Thread& thread : one_process(image).process.threads()) taken.push_back(thread.tid());
  return choose_helper_numbers(taken);
}

void plan_seals(const Materials& materials, TapeDraft& tape) {
  for (const pb::CapturedFile& file : materials.metadata.captured_files()) {
    if (file.seals() == 0 || file.has_segment()) continue;
    // Last, since seals forbid the very mappings and writes that came before.
    tape.call(SYS_fcntl, {static_cast<uint64_t>(materials.captured.fd(file.id())), F_ADD_SEALS, file.seals()}, true,
              "seal " + file.name());
  }
}

// A segment that was removed lives as long as it is attached: so only now.
void plan_segment_removal(const Materials& materials, TapeDraft& tape) {
  for (const pb::CapturedFile& file : materials.metadata.captured_files()) {
    if (!file.segment().removed()) continue;
    tape.call(SYS_shmctl, {static_cast<uint64_t>(materials.captured.segment(file.id())), IPC_RMID, 0}, true,
              "remove the System V segment " + file.name());
  }
}

void plan_new_thread(size_t index, const pb::Thread& thread, const user_regs_struct& regs, TapeDraft& leader) {
  int32_t wanted = thread.tid();
  clone_args args{};
  args.flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | CLONE_SETTLS;
  args.tls = regs.fs_base;
  args.stack_size = kThreadStackBytes;
  args.set_tid_size = 1;
  const TapeWord number = leader.data_of(wanted);
  const TapeWord argument = leader.data_of(args);
  leader.point(argument, offsetof(clone_args, set_tid), number);
  leader.point(argument, offsetof(clone_args, stack), stack_of(index));
  leader.call(kOpThread, {argument, sizeof args, tape_of(index)}, true, fmt::format("make thread {}", wanted));
}

user_regs_struct registers_of(const pb::Thread& thread) {
  user_regs_struct regs{};
  const std::string& saved = state_of(thread).registers();
  std::memcpy(&regs, saved.data(), std::min(saved.size(), sizeof regs));
  return regs;
}

Result<void> plan_own_state(const pb::Image& image, int thread, TapeDraft& tape) {
  ThreadPlan plan{image, one_process(image).process.threads(thread), thread == 0, tape};
  for (const StateModule* module : state_modules()) {
    if (module->plan_thread != nullptr) VMCKPT_TRY(module->plan_thread(plan));
  }
  return {};
}

// The leader's tape is the restart from here on; its order is the order of what depends on what.
Result<Tapes> draft_tapes(const Materials& materials, const VdsoPlan& vdso) {
  const pb::Image& image = materials.metadata;
  const OneProcess one = one_process(image);
  Tapes tapes;
  TapeDraft& leader = tapes.leader;
  // 1. an empty address space but for the arena
  plan_vdso_parking(vdso, leader);
  leader.call(SYS_munmap, {0, kArena}, true, "unmap the memory below the arena");
  leader.call(SYS_munmap, {kArenaEnd, kBytesAboveArena}, true, "unmap the memory above the arena");
  plan_vdso_return(vdso, leader);
  // 2. the target's memory
  VMCKPT_TRY(plan_memory(one.memory, materials.image, materials.guest_ram,
                         {[&](const pb::Mapping& mapping) { return materials.files.open_for(mapping); },
                          [&](const pb::Mapping& mapping) { return materials.files.segment_of(mapping); }},
                         materials.helper_numbers, leader));
  plan_segment_removal(materials, leader);
  plan_layout(one.memory, materials.executable_fd, leader);
  plan_seals(materials, leader);
  // 3. what belongs to the process, and its virtual machines
  ProcessPlan process{image, materials.image.fd(), materials.kvm_device, materials.service.first(), materials.guest_clock,
                      leader};
  for (const StateModule* module : state_modules()) {
    if (module->plan != nullptr) VMCKPT_TRY(module->plan(process));
  }
  // 4. its threads, while there is still the right to choose their numbers
  for (int i = 1; i < one.process.threads_size(); ++i) {
    const pb::Thread& thread = one.process.threads(i);
    plan_new_thread(static_cast<size_t>(i), thread, registers_of(thread), leader);
    TapeDraft& tape = tapes.others.emplace_back();
    VMCKPT_TRY(plan_own_state(image, i, tape));
  }
  // 5. what may be meant for one of those threads
  for (const StateModule* module : state_modules()) {
    if (module->plan_late != nullptr) VMCKPT_TRY(module->plan_late(process));
  }
  // 6. restart's own descriptors go
  leader.call(SYS_close_range, {static_cast<uint64_t>(materials.service.first()), materials.service.last(), 0}, true,
              "close restart's descriptors");
  for (const LateLock& late : late_locks(image)) {
    leader.call(SYS_fcntl, {static_cast<uint64_t>(late.number), F_SETLK, leader.data_of(late.lock)}, true,
                fmt::format("take the lock on descriptor {} again", late.number));
  }
  // 7. the leader's own state
  VMCKPT_TRY(plan_own_state(image, 0, leader));
  return tapes;
}

Result<void> refuse_threads_inside_foreign_vdso(const pb::Image& image, const VdsoPlan& vdso) {
  if (vdso.patched_code.empty()) return {};
  for (const pb::Thread& thread : one_process(image).process.threads()) {
    uint64_t rip = registers_of(thread).rip;
    if (rip - vdso.patched_address >= vdso.patched_code.size()) continue;
    return error(fmt::format("thread {} was inside the vdso of another kernel ({})", thread.tid(), image.host().kernel_release()),
                 "restart it on that kernel, or use another image of this target");
  }
  return {};
}

void send_message(int channel, ChannelMessage kind, const void* bytes, size_t size) {
  std::string text(1, static_cast<char>(kind));
  text.append(static_cast<const char*>(bytes), size);
  (void)!::send(channel, text.data(), text.size(), MSG_NOSIGNAL);
}

// What must stay open until the player has used it, and where everything lies.
struct Prepared {
  Arena arena;
  RebuiltFiles captured;
  Fd executable, kvm_device, terminal_master;
  std::string report;  // the kReady message
};

void send_ready(int channel, const Prepared& prepared) {
  std::string text(1, static_cast<char>(ChannelMessage::kReady));
  text += prepared.report;
  iovec part{text.data(), text.size()};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  if (prepared.terminal_master) {
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    const int master = prepared.terminal_master.get();
    std::memcpy(CMSG_DATA(header), &master, sizeof master);
  }
  (void)::sendmsg(channel, &message, MSG_NOSIGNAL);
}

Result<Prepared> rebuild(RebuildInputs& inputs, const Birthplace& birthplace, int* channel) {
  const pb::Image& image = inputs.image.metadata();
  const OneProcess one = one_process(image);
  Notes notes;
  ServiceDescriptors service;
  VMCKPT_TRY(service.open_space(one.descriptors, image.open_files_size()));
  *channel = VMCKPT_TRY(service.keep(birthplace.channel));
  // The reader's descriptor is what tapes and rebuilt files read from: the same number must stay valid to the end.
  inputs.image.use_fd(Fd(VMCKPT_TRY(service.keep(inputs.image.fd()))));
  std::array<int, 3> stdio{};
  for (size_t i = 0; i < stdio.size(); ++i) stdio[i] = inputs.stdio[i] < 0 ? -1 : VMCKPT_TRY(service.keep(inputs.stdio[i]));
  ::syscall(SYS_close_range, 0, service.first() - 1, 0);

  const FileAccess access = file_access_of(credentials_of(one.leader), inputs.files);
  StateRestore restore{image, inputs.image, access, stdio, service.first(), birthplace.own_user_namespace, notes};
  for (const StateModule* module : state_modules()) {
    if (module->restore != nullptr) VMCKPT_TRY(module->restore(restore));
  }
  for (const std::string& note : notes) send_message(*channel, ChannelMessage::kNote, note.data(), note.size());

  MappedFiles files(restore.captured, access, service);
  const std::vector<Vma> own_maps = VMCKPT_TRY(read_maps(::getpid()));
  const GuestRam guest_ram(inputs.image);
  Materials materials{inputs.image,       image,     service,  files, restore.captured, own_maps, restore.executable.get(),
                      restore.kvm_device.get(), inputs.guest_clock, guest_ram, free_helper_numbers(image)};
  // Where there is another vdso, the new one lies behind the arena for good.
  const uint64_t vdso_size = vdso_bytes(own_maps);
  const VdsoPlan vdso = VMCKPT_TRY(make_vdso_plan(one.memory, own_maps, kVdsoParking, kArenaEnd));
  VMCKPT_TRY(refuse_threads_inside_foreign_vdso(image, vdso));
  const Tapes tapes = VMCKPT_TRY(draft_tapes(materials, vdso));
  Prepared prepared{Arena(tapes, vdso_size),           std::move(restore.captured),        std::move(restore.executable),
                    std::move(restore.kvm_device), std::move(restore.terminal_master), {}};
  Arena& arena = prepared.arena;
  arena.put_at(VMCKPT_TRY(find_free_range(one.memory, own_maps, arena.bytes() + vdso_size)));
  VMCKPT_TRY(arena.map());
  const LateNumbers late = arena.late_numbers();
  arena.lay_tape(0, tapes.leader, late, one.process.pid(), one.leader.tid());
  for (size_t i = 0; i < tapes.others.size(); ++i) {
    arena.lay_tape(i + 1, tapes.others[i], late, one.process.pid(), one.process.threads(static_cast<int>(i) + 1).tid());
  }
  // For the supervisor these are addresses in another process.
  RebuildReport report{RemoteAddr(arena.address()), arena.bytes(),
                       RemoteAddr(known_number(VMCKPT_TRY(syscall_instruction(vdso)), late))};
  prepared.report.assign(reinterpret_cast<const char*>(&report), sizeof report);
  for (size_t thread = 0; thread <= tapes.others.size(); ++thread) {
    const RemoteAddr address(arena.tape(thread));
    prepared.report.append(reinterpret_cast<const char*>(&address), sizeof address);
  }
  return prepared;
}

[[noreturn]] void jump_to_player(const Arena& arena) {
  // Every signal stays blocked until the supervisor puts the saved masks in; new threads inherit it.
  uint64_t all = ~uint64_t{0};
  ::syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, nullptr, sizeof all);
  // The kernel must not write into this thread's rseq area once its memory has gone: libc registered it (size: glibc's
  // sysdeps/unix/sysv/linux/rseq-internal.h).
  constexpr uint32_t kRegisteredBytes = 32, kSignature = 0x53053053;
  constexpr int kUnregister = 1;
  ::syscall(SYS_rseq, static_cast<char*>(__builtin_thread_pointer()) + __rseq_offset, kRegisteredBytes, kUnregister, kSignature);
  asm volatile(
      "movq %0, %%rsp\n\t"
      "jmpq *%2"
      :
      : "r"(arena.stack_top(0)), "D"(arena.tape(0)), "r"(arena.entry())
      : "memory");
  __builtin_unreachable();
}

}  // namespace

void rebuild_and_play(RebuildInputs& inputs, const Birthplace& birthplace) {
  // The supervisor says when it traces this process.
  char go = 0;
  if (::recv(birthplace.channel, &go, 1, 0) != 1) ::_exit(1);
  int channel = birthplace.channel;
  // Nothing may get past this function: what is behind it on the stack is the supervisor's.
  auto prepared = [&]() -> Result<Prepared> {
    try {
      return rebuild(inputs, birthplace, &channel);
    } catch (const std::exception& problem) {
      return error(fmt::format("rebuild the process: {}", problem.what()));
    }
  }();
  if (!prepared.ok()) {
    std::string text = prepared.error().message();
    send_message(channel, ChannelMessage::kError, text.data(), text.size());
    ::_exit(1);
  }
  send_ready(channel, *prepared);
  jump_to_player(prepared->arena);
}

}  // namespace vmckpt
