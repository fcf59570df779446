// libvmckpt.so, preloaded into the target: wraps the few calls whose effect the kernel will not tell later, and writes it
// into the ledger. Rules: needs only libc; no exceptions, no allocation, no lock across the real call, safe before
// constructors, after fork and in signal handlers. A wrapper makes the real call first and notes it when it succeeded.
#include <cerrno>
#include <cstdarg>
#include <cstddef>

#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "player/player.h"
#include "recorder/ledger.h"
#include "recorder/notes.h"
#include "recorder/recorder.h"

namespace vmckpt {

alignas(4096) Ledger g_ledger;
alignas(4096) static unsigned char g_arena[size_t{kArenaSlots} * kArenaSlotBytes];

extern "C" {
// glibc 2.35 and newer publish where each thread's rseq area is (glibc manual, "Restartable Sequences").
extern const ptrdiff_t __rseq_offset __attribute__((weak));
extern const unsigned int __rseq_size __attribute__((weak));
}

// libc's own registration; pthread_atfork would need the start files, which this library does without.
extern "C" int __register_atfork(void (*prepare)(), void (*parent)(), void (*child)(), void* library);

extern "C" {
// All uses of REAL: the linker collects them.
extern RealFunction __start_vmckpt_real[] __attribute__((visibility("hidden")));
extern RealFunction __stop_vmckpt_real[] __attribute__((visibility("hidden")));
}

static void find_real_functions() {
  for (RealFunction* function = __start_vmckpt_real; function != __stop_vmckpt_real; ++function) {
    *function->address = real_function(function->name);
  }
}

// Where in its thread control block a thread's number stands: glibc tells debuggers (libthread_db) the field's size in bits,
// count and offset. 0: not known.
static uint32_t g_tid_offset;

static void find_tid_offset() {
  const auto* field = static_cast<const uint32_t*>(dlsym(RTLD_DEFAULT, "_thread_db_pthread_tid"));
  constexpr uint32_t kMost = 4096;
  if (field != nullptr && field[0] == 32 && field[2] < kMost) g_tid_offset = field[2];
}

// gettid(2) without the system call. 0: not known, which save_seccomp notices.
static int32_t own_tid() {
  if (g_tid_offset == 0) return is_locked_in() ? 0 : static_cast<int32_t>(raw_call(SYS_gettid));
  return *reinterpret_cast<const int32_t*>(static_cast<const char*>(__builtin_thread_pointer()) + g_tid_offset);
}

// ---- locked in -------------------------------------------------------------------------------------------------------

static bool g_locked_in;
// Where relative paths start then; empty: not known, and the supervisor takes the directory of the checkpoint (ledger_reader.cc).
static char g_directory[kLedgerNoteTextBytes];
static bool g_directory_is_known;

bool is_locked_in() { return __atomic_load_n(&g_locked_in, __ATOMIC_RELAXED); }

static bool environment_has(const char* entry) {
  for (char** known = environ; known != nullptr && *known != nullptr; ++known) {
    if (__builtin_strcmp(*known, entry) == 0) return true;
  }
  return false;
}

static bool g_landlocked;

bool is_landlocked() { return __atomic_load_n(&g_landlocked, __ATOMIC_RELAXED); }

static void note_landlock() {
  __atomic_store_n(&g_landlocked, true, __ATOMIC_RELAXED);
  take_note(NoteKind::kLandlock, 0, 0, nullptr);
}

void note_directory_watch(int fd, long events) {
  if (events != 0) take_note(NoteKind::kDirectoryNotify, fd, 0, nullptr);
  else forget_note(NoteKind::kDirectoryNotify, fd, 0);
}

// Before the call, which may block, and must not come without its note.
static void note_undo(int set, const sembuf* operations, size_t count) {
  for (size_t i = 0; i < count && operations != nullptr; ++i) {
    if (!(operations[i].sem_flg & SEM_UNDO) || operations[i].sem_op == 0) continue;
    return take_note(NoteKind::kSemaphoreUndo, 0, set, nullptr);
  }
}

// Before the program installs its first filter: what the recorder may have to know later.
static void prepare_for_lock() {
  if (is_locked_in()) return;
  // The raw call: glibc's getcwd may allocate. It returns the length with the final NUL.
  g_directory_is_known = raw_call(SYS_getcwd, reinterpret_cast<long>(g_directory), sizeof g_directory) > 0;
}

// Set before the call that locks in: with TSYNC the other threads are filtered before it comes back.
static bool lock_in() { return __atomic_exchange_n(&g_locked_in, true, __ATOMIC_RELAXED); }
static void was_not_locked_in(bool before) {
  if (!before) __atomic_store_n(&g_locked_in, false, __ATOMIC_RELAXED);
}

// A child forked while another thread was inside an update has no such thread.
static void forget_writers() {
  __atomic_store_n(&g_ledger.writers, 0, __ATOMIC_RELEASE);
  __atomic_store_n(&g_ledger.aio_submitters, 0, __ATOMIC_RELEASE);
  forget_kvm_lock();
  forget_notes_lock();
  forget_ram_lock();
}

__attribute__((constructor(101))) static void open_ledger() {
  __register_atfork(nullptr, nullptr, forget_writers, nullptr);
  Ledger& ledger = g_ledger;
  ledger.version = kLedgerVersion;
  ledger.bytes = sizeof(Ledger);
  ledger.self = reinterpret_cast<uint64_t>(&ledger);
  ledger.player_entry = reinterpret_cast<uint64_t>(&vmckpt_player_entry);
  ledger.arena = reinterpret_cast<uint64_t>(g_arena);
  ledger.kvm = kvm_ledger_address();
  ledger.partial_calls = partial_calls_address();
  open_ram_ledger();
  ledger.arena_slots = kArenaSlots;
  ledger.arena_slot_bytes = kArenaSlotBytes;
  if (&__rseq_size != nullptr && __rseq_size != 0) {
    ledger.rseq_offset = static_cast<int32_t>(__rseq_offset);
    ledger.rseq_bytes = __rseq_size;
  }
  if (environment_has(kLockedIn)) lock_in();
  if (environment_has(kLandlocked)) note_landlock();
  find_real_functions();
  find_tid_offset();
  ledger.magic1 = kLedgerMagic1;
  __atomic_store_n(&ledger.magic0, kLedgerMagic0, __ATOMIC_RELEASE);
}

const char* directory_when_locked() { return g_directory_is_known ? g_directory : nullptr; }

void note_seccomp_filter(unsigned int flags, const void* program, int32_t tid) {
  LedgerUpdate update;
  const sock_fprog* filter = static_cast<const sock_fprog*>(program);
  uint32_t slot = __atomic_fetch_add(&g_ledger.filters_used, 1, __ATOMIC_ACQ_REL);
  uint32_t first = __atomic_fetch_add(&g_ledger.filter_instructions_used, filter->len, __ATOMIC_ACQ_REL);
  if (slot >= kLedgerFilters || first + filter->len > kLedgerFilterInstructions) {
    __atomic_add_fetch(&g_ledger.filters_lost, 1, __ATOMIC_RELAXED);
    return;
  }
  LedgerFilter& entry = g_ledger.filters[slot];
  entry.flags = flags;
  entry.first_instruction = first;
  entry.instructions = filter->len;
  entry.tid = tid;
  __builtin_memcpy(&g_ledger.filter_instructions[first], filter->filter, size_t{filter->len} * sizeof(sock_filter));
}

bool devices_are_allowed() { return environment_has("VMCKPT_ALLOW_DEVICES=1"); }

// Once for each kind, and only of a device that is there: programs probe for many that are not (QEMU: /dev/sgx_vepc).
static void tell_of_denied_device(const char* path, uint32_t kind) {
  static uint32_t told;
  if (is_locked_in() || (__atomic_load_n(&told, __ATOMIC_RELAXED) & (1u << kind)) != 0) return;
  if (raw_call(SYS_faccessat, AT_FDCWD, reinterpret_cast<long>(path), F_OK) != 0) return;
  if ((__atomic_fetch_or(&told, 1u << kind, __ATOMIC_RELAXED) & (1u << kind)) != 0) return;
  static constexpr char kBefore[] = "vmckpt: opening ", kAfter[] =
      " was denied: a program that has it open cannot be checkpointed; `vmckpt launch --allow-devices` allows it\n";
  char text[256];
  const size_t before = sizeof kBefore - 1, after = sizeof kAfter - 1;
  __builtin_memcpy(text, kBefore, before);
  size_t length = before + copy_text(text + before, sizeof text - before - after, path);
  __builtin_memcpy(text + length, kAfter, after);
  raw_call(SYS_write, 2, reinterpret_cast<long>(text), static_cast<long>(length + after));
}

// Devices that have kernel state no checkpoint can read: opening them fails as if they were not there, and programs fall
// back (QEMU: vhost-net to user-space virtio). VMCKPT_ALLOW_DEVICES=1, set by launch --allow-devices, lifts it.
bool device_is_denied(const char* path) {
  static constexpr const char* kDenied[] = {"/dev/vhost-", "/dev/vfio/", "/dev/sev", "/dev/sgx_", "/dev/userfaultfd"};
  if (path == nullptr || path[0] != '/' || path[1] != 'd') return false;
  for (const char* const& prefix : kDenied) {
    size_t i = 0;
    while (prefix[i] != '\0' && prefix[i] == path[i]) ++i;
    if (prefix[i] != '\0') continue;
    if (devices_are_allowed()) return false;
    tell_of_denied_device(path, static_cast<uint32_t>(&prefix - kDenied));
    return true;
  }
  return false;
}

void* real_function(const char* name) { return dlsym(RTLD_NEXT, name); }

}  // namespace vmckpt

#ifndef SYS_landlock_restrict_self
#define SYS_landlock_restrict_self 446
#endif

using namespace vmckpt;

EXPORT int mlockall(int flags) noexcept {
  REAL(mlockall);
  int result = real(flags);
  if (result == 0) g_ledger.mlockall_flags = static_cast<uint32_t>(flags);
  if (result == 0 && (flags & MCL_CURRENT)) note_lock_of_all(true);
  return result;
}

EXPORT int munlockall() noexcept {
  REAL(munlockall);
  int result = real();
  if (result == 0) g_ledger.mlockall_flags = 0;
  if (result == 0) note_lock_of_all(false);
  return result;
}

EXPORT int inotify_add_watch(int fd, const char* path, uint32_t mask) noexcept {
  REAL(inotify_add_watch);
  int watch = real(fd, path, mask);
  if (watch >= 0) take_note(NoteKind::kInotifyWatch, fd, watch, path);
  return watch;
}

EXPORT int inotify_rm_watch(int fd, int watch) noexcept {
  REAL(inotify_rm_watch);
  int result = real(fd, watch);
  if (result == 0) forget_note(NoteKind::kInotifyWatch, fd, watch);
  return result;
}

EXPORT int semop(int set, sembuf* operations, size_t count) noexcept {
  REAL(semop);
  note_undo(set, operations, count);
  return real(set, operations, count);
}

EXPORT int semtimedop(int set, sembuf* operations, size_t count, const timespec* timeout) noexcept {
  REAL(semtimedop);
  note_undo(set, operations, count);
  return real(set, operations, count, timeout);
}

static int note_inotify(int fd) {
  if (fd >= 0) forget_notes_of(NoteKind::kInotifyWatch, fd);
  return fd;
}

EXPORT int inotify_init1(int flags) noexcept {
  REAL(inotify_init1);
  return note_inotify(real(flags));
}

// A system call of its own, which a filter may allow when it allows no other.
EXPORT int inotify_init() noexcept {
  REAL(inotify_init);
  return note_inotify(real());
}

// After a lock; before it, the kernel is asked when it matters.
static void note_directory(const char* path) {
  size_t used = 0;
  if (path[0] != '/') {
    if (!g_directory_is_known) return;
    used = __builtin_strlen(g_directory);
    if (used + 1 < sizeof g_directory) g_directory[used++] = '/';
  }
  copy_text(g_directory + used, sizeof g_directory - used, path);
  g_directory_is_known = true;
}

static void note_eventfd(int fd, int flags) {
  if (fd < 0) return;
  {
    LedgerUpdate update;
    name_eventfd(fd);
  }
  if (flags & EFD_SEMAPHORE) take_note(NoteKind::kEventfdSemaphore, fd, 0, nullptr);
  else forget_note(NoteKind::kEventfdSemaphore, fd, 0);
}

EXPORT int eventfd(unsigned int count, int flags) noexcept {
  REAL(eventfd);
  int fd = real(count, flags);
  note_eventfd(fd, flags);
  return fd;
}

EXPORT int bind(int fd, const sockaddr* address, socklen_t bytes) noexcept {
  REAL(bind);
  int result = real(fd, address, bytes);
  if (result == 0 && address != nullptr && address->sa_family == AF_UNIX &&
      bytes > static_cast<socklen_t>(offsetof(sockaddr_un, sun_path))) {
    const char* path = reinterpret_cast<const sockaddr_un*>(address)->sun_path;
    if (path[0] != '\0' && path[0] != '/') take_note(NoteKind::kUnixBind, fd, 0, path);
  }
  return result;
}

// The kernel gives no strict mode to a thread with a filter (EINVAL), and launch's is one. A filter that lets the same four
// calls pass takes its place. What differs: a thread that makes another call ends by SIGSYS, not SIGKILL.
static long be_strict() {
  static constexpr sock_filter kStrict[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, arch)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 0, 5),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_read, 4, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_write, 3, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit, 2, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_rt_sigreturn, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_THREAD),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program{sizeof kStrict / sizeof kStrict[0], const_cast<sock_filter*>(kStrict)};
  const long result = raw_call(SYS_prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, reinterpret_cast<long>(&program));
  if (result == 0) note_seccomp_filter(0, &program, own_tid());
  return result;
}

EXPORT int prctl(int option, ...) noexcept {
  va_list list;
  va_start(list, option);
  unsigned long a2 = va_arg(list, unsigned long), a3 = va_arg(list, unsigned long), a4 = va_arg(list, unsigned long),
                a5 = va_arg(list, unsigned long);
  va_end(list);
  REAL(prctl);
  const bool locks_in = option == PR_SET_SECCOMP;
  const bool installs_filter = locks_in && a2 == SECCOMP_MODE_FILTER;
  if (locks_in) prepare_for_lock();
  const bool before = locks_in && lock_in();
  int result = real(option, a2, a3, a4, a5);
  if (result != 0 && locks_in && a2 == SECCOMP_MODE_STRICT && errno == EINVAL)
    result = static_cast<int>(libc_result(be_strict()));
  if (result != 0 && locks_in) was_not_locked_in(before);
  if (result == 0 && installs_filter) note_seccomp_filter(0, reinterpret_cast<const void*>(a3), own_tid());
  return result;
}

EXPORT int chdir(const char* path) noexcept {
  REAL(chdir);
  const int result = real(path);
  if (result == 0 && is_locked_in()) note_directory(path);
  return result;
}

EXPORT int fchdir(int fd) noexcept {
  REAL(fchdir);
  const int result = real(fd);
  if (result == 0) g_directory_is_known = false;
  return result;
}

// libseccomp and others install filters, and some programs add watches, through syscall(2)'s wrapper.
EXPORT long syscall(long number, ...) noexcept {
  va_list list;
  va_start(list, number);
  long a[6];
  for (long& argument : a) argument = va_arg(list, long);
  va_end(list);
  const bool locks_in = number == SYS_seccomp && (a[0] == SECCOMP_SET_MODE_FILTER || a[0] == SECCOMP_SET_MODE_STRICT);
  if (number == SYS_prctl && a[0] == PR_SET_SECCOMP) return prctl(PR_SET_SECCOMP, a[1], a[2], a[3], a[4]);
  if (number == SYS_ioctl) return ioctl(static_cast<int>(a[0]), static_cast<unsigned long>(a[1]), a[2]);
  if (number == SYS_io_setup) return libc_result(aio_setup(a[0], reinterpret_cast<unsigned long*>(a[1])));
  if (number == SYS_io_destroy) return libc_result(aio_destroy(a[0]));
  if (number == SYS_io_submit) return libc_result(aio_submit(a[0], a[1], a[2]));
  if (number == SYS_semop || number == SYS_semtimedop) {
    note_undo(static_cast<int>(a[0]), reinterpret_cast<const sembuf*>(a[1]), static_cast<size_t>(a[2]));
  }
  if (locks_in) prepare_for_lock();
  const bool before = locks_in && lock_in();
  long result;
  if (!ram_call(number, a, &result)) result = raw_call(number, a[0], a[1], a[2], a[3], a[4], a[5]);
  if (locks_in && a[0] == SECCOMP_SET_MODE_STRICT && result == -EINVAL && a[1] == 0 && a[2] == 0) result = be_strict();
  if (result < 0 && result >= -4095) {
    if (locks_in) was_not_locked_in(before);
    errno = static_cast<int>(-result);
    return -1;
  }
  const int fd = static_cast<int>(a[0]);
  // seccomp(2): with TSYNC and no listener, the number of a thread that stands in the way.
  constexpr long kListenerOrThread = SECCOMP_FILTER_FLAG_TSYNC | SECCOMP_FILTER_FLAG_NEW_LISTENER;
  if (locks_in && result > 0 && (a[1] & kListenerOrThread) == SECCOMP_FILTER_FLAG_TSYNC) {
    was_not_locked_in(before);
    return result;
  }
  if (locks_in) {
    if (a[0] == SECCOMP_SET_MODE_FILTER) {
      note_seccomp_filter(static_cast<unsigned int>(a[1]), reinterpret_cast<const void*>(a[2]), own_tid());
    }
  } else if (number == SYS_madvise || number == SYS_process_madvise) {
    __atomic_add_fetch(&g_ledger.madvise_generation, 1, __ATOMIC_RELEASE);
  } else if (number == SYS_landlock_restrict_self) {
    if (a[0] >= 0) note_landlock();  // -1 only sets what is logged
  } else if (number == SYS_fcntl && a[1] == F_NOTIFY) {
    note_directory_watch(fd, a[2]);
  } else if (number == SYS_inotify_rm_watch) {
    forget_note(NoteKind::kInotifyWatch, static_cast<int>(a[0]), static_cast<int>(a[1]));
  } else if (number == SYS_inotify_add_watch) {
    take_note(NoteKind::kInotifyWatch, fd, result, reinterpret_cast<const char*>(a[1]));
  } else if (number == SYS_eventfd || number == SYS_eventfd2) {
    note_eventfd(static_cast<int>(result), number == SYS_eventfd2 ? static_cast<int>(a[1]) : 0);
  } else if (number == SYS_dup || number == SYS_dup2 || number == SYS_dup3 ||
             (number == SYS_fcntl && (a[1] == F_DUPFD || a[1] == F_DUPFD_CLOEXEC))) {
    note_duplicate(fd, static_cast<int>(result));
  }
  return result;
}

static int deny() {
  errno = ENOENT;
  return -1;
}

static bool takes_mode(int flags) { return (flags & O_CREAT) != 0 || (flags & O_TMPFILE) == O_TMPFILE; }

#define WRAP_OPEN(name)                                        \
  EXPORT int name(const char* path, int flags, ...) {          \
    mode_t mode = 0;                                           \
    if (takes_mode(flags)) {                                   \
      va_list list;                                            \
      va_start(list, flags);                                   \
      mode = va_arg(list, mode_t);                             \
      va_end(list);                                            \
    }                                                          \
    if (device_is_denied(path)) return deny();                 \
    REAL(name);                                                \
    return real(path, flags, mode);                            \
  }
#define WRAP_OPENAT(name)                                      \
  EXPORT int name(int directory, const char* path, int flags, ...) { \
    mode_t mode = 0;                                           \
    if (takes_mode(flags)) {                                   \
      va_list list;                                            \
      va_start(list, flags);                                   \
      mode = va_arg(list, mode_t);                             \
      va_end(list);                                            \
    }                                                          \
    if (device_is_denied(path)) return deny();                 \
    REAL(name);                                                \
    return real(directory, path, flags, mode);                 \
  }
WRAP_OPEN(open)
WRAP_OPEN(open64)
WRAP_OPENAT(openat)
WRAP_OPENAT(openat64)

// What programs compiled with _FORTIFY_SOURCE call instead.
extern "C" int __open_2(const char* path, int flags);
extern "C" int __open64_2(const char* path, int flags);
EXPORT int __open_2(const char* path, int flags) { return device_is_denied(path) ? deny() : open(path, flags, 0); }
EXPORT int __open64_2(const char* path, int flags) { return device_is_denied(path) ? deny() : open64(path, flags, 0); }
