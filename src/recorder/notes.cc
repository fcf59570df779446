// The ledger's notes: where they lie, how they are found again, and when they end.
//
//   g_ledger.notes          1024 notes, always there
//   g_ledger.note_tables    further ones, each as large as all before it, mapped when they are needed
//   slots                   a hash table of kind, descriptor and value to the number of the note; only the recorder uses it
//
// A note ends when the program takes back what it is about, when the same thing is noted anew, and, because the kernel removes
// inotify watches by itself (the file is deleted, IN_ONESHOT, the descriptor is closed), in two more ways: a checkpoint sees all
// watches and marks the notes of others kStale; and a recorder that has no free note asks /proc which watches there are. Only
// if most notes are in use then does it map another table: what a target keeps for us stays in proportion to its watches, and
// so does the time for looking.
//
// Asking and mapping are system calls of our own, so neither happens after the program has locked itself in. A note for which
// there is no room is counted as lost.
//
// Signal handlers and other threads: a lock with an owner. A handler that interrupted its own thread in here gives up.
#include <fcntl.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "recorder/notes.h"
#include "recorder/recorder.h"

namespace vmckpt {
namespace {

constexpr uint32_t kFirstSlots = kLedgerNotes * 2;
constexpr uint32_t kEmpty = 0, kDeleted = UINT32_MAX;  // a slot holds the number of a note plus one
constexpr uint32_t kNone = UINT32_MAX;

uint32_t first_slots[kFirstSlots];
uint32_t* slots = first_slots;
uint32_t slot_count = kFirstSlots;
uint32_t slots_taken;        // deleted ones too
uint32_t first_free = kNone; // notes that were used before, linked through `value`
uint32_t free_notes;
bool distrust;  // slots and free notes may be half changed: forked inside an update
uint64_t owner;

uint32_t capacity() { return kLedgerNotes << g_ledger.note_tables_used; }

LedgerNote& note_at(uint32_t i) {
  if (i < kLedgerNotes) return g_ledger.notes[i];
  const uint32_t table = 31u - static_cast<uint32_t>(__builtin_clz(i / kLedgerNotes));
  return reinterpret_cast<LedgerNote*>(g_ledger.note_tables[table])[i - (kLedgerNotes << table)];
}

NoteKind kind_of(const LedgerNote& note) {
  NoteKind kind;
  __atomic_load(&note.kind, &kind, __ATOMIC_ACQUIRE);
  return kind;
}

void set_kind(LedgerNote& note, NoteKind kind) { __atomic_store(&note.kind, &kind, __ATOMIC_RELEASE); }

bool is_about_something(NoteKind kind) {
  return kind != NoteKind::kFree && kind != NoteKind::kClaimed && kind != NoteKind::kStale;
}

uint32_t slot_of(NoteKind kind, int fd, int64_t value) {
  uint64_t key = (static_cast<uint64_t>(value) << 24) ^ (static_cast<uint64_t>(static_cast<uint32_t>(fd)) << 4) ^
                 static_cast<uint64_t>(kind);
  key *= 0x9e3779b97f4a7c15ull;
  return static_cast<uint32_t>(key >> 32) & (slot_count - 1);
}

// Where the note's number is in `slots`; kNone when there is no such note.
uint32_t find_slot(NoteKind kind, int fd, int64_t value) {
  for (uint32_t slot = slot_of(kind, fd, value); slots[slot] != kEmpty; slot = (slot + 1) & (slot_count - 1)) {
    if (slots[slot] == kDeleted) continue;
    const LedgerNote& note = note_at(slots[slot] - 1);
    if (note.kind == kind && note.fd == fd && note.value == value) return slot;
  }
  return kNone;
}

void enter(NoteKind kind, int fd, int64_t value, uint32_t number) {
  uint32_t slot = slot_of(kind, fd, value);
  while (slots[slot] != kEmpty) slot = (slot + 1) & (slot_count - 1);
  slots[slot] = number + 1;
  ++slots_taken;
}

void release(uint32_t number) {
  LedgerNote& note = note_at(number);
  set_kind(note, NoteKind::kFree);
  note.value = first_free;
  first_free = number;
  ++free_notes;
}

// Slots and free notes again from the notes themselves; stale ones become free.
void rebuild() {
  for (uint32_t i = 0; i < slot_count; ++i) slots[i] = kEmpty;
  slots_taken = 0;
  first_free = kNone;
  free_notes = 0;
  distrust = false;
  for (uint32_t i = g_ledger.notes_used; i-- > 0;) {
    const LedgerNote& note = note_at(i);
    if (is_about_something(kind_of(note))) enter(note.kind, note.fd, note.value, i);
    else release(i);
  }
}

uint32_t unused_notes() { return free_notes + (capacity() - g_ledger.notes_used); }

char* append(char* to, const char* text) {
  while (*text != '\0') *to++ = *text++;
  *to = '\0';
  return to;
}

char* append_number(char* to, unsigned number) {
  char digits[12];
  int count = 0;
  do digits[count++] = static_cast<char>('0' + number % 10);
  while ((number /= 10) != 0);
  while (count > 0) *to++ = digits[--count];
  *to = '\0';
  return to;
}

// Marks the notes of the watches that inotify file `fd` has, from lines like "inotify wd:1f ino:3c51a sdev:...". False when it
// cannot be told.
bool mark_live_watches(int fd, uint32_t mark) {
  char path[48];
  append_number(append(path, "/proc/self/fdinfo/"), static_cast<unsigned>(fd));
  const long info = raw_call(SYS_openat, AT_FDCWD, reinterpret_cast<long>(path), O_RDONLY | O_CLOEXEC);
  if (info < 0) return info == -ENOENT;  // closed: no watch
  static constexpr char kPrefix[] = "inotify wd:";
  constexpr int kPrefixLength = sizeof kPrefix - 1;
  char buffer[1024];
  int matched = 0;  // characters of kPrefix at the beginning of this line; -1: another line, or done with it
  int64_t watch = 0;
  long got;
  while ((got = raw_call(SYS_read, info, reinterpret_cast<long>(buffer), sizeof buffer)) > 0) {
    for (long i = 0; i < got; ++i) {
      const char c = buffer[i];
      if (c == '\n') {
        matched = 0;
      } else if (matched >= 0 && matched < kPrefixLength) {
        matched = c == kPrefix[matched] ? matched + 1 : -1;
        watch = 0;
      } else if (matched == kPrefixLength) {
        const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
        if (digit >= 0) {
          watch = watch * 16 + digit;
          continue;
        }
        matched = -1;
        const uint32_t slot = find_slot(NoteKind::kInotifyWatch, fd, watch);
        if (slot != kNone) note_at(slots[slot] - 1).mark = mark;
      }
    }
  }
  raw_call(SYS_close, info);
  return got == 0;
}

// Frees the notes of watches that are not there any more.
void forget_removed_watches() {
  static uint32_t last_mark;
  const uint32_t mark = ++last_mark;
  for (uint32_t i = 0; i < g_ledger.notes_used; ++i) {
    const LedgerNote& first = note_at(i);
    if (kind_of(first) != NoteKind::kInotifyWatch || first.mark == mark) continue;
    const int fd = first.fd;
    const bool told = mark_live_watches(fd, mark);
    for (uint32_t other = i; other < g_ledger.notes_used; ++other) {
      LedgerNote& note = note_at(other);
      if (kind_of(note) != NoteKind::kInotifyWatch || note.fd != fd || note.mark == mark) continue;
      if (told) set_kind(note, NoteKind::kStale);
      else note.mark = mark;
    }
  }
  rebuild();
}

// Another table as large as all before, and slots for all.
void grow() {
  const uint32_t table = g_ledger.note_tables_used;
  if (table == kLedgerNoteTables) return;
  const size_t notes_bytes = size_t{capacity()} * sizeof(LedgerNote);
  const uint32_t more_slots = slot_count * 2;
  const size_t slots_bytes = size_t{more_slots} * sizeof(uint32_t);
  const long mapped = raw_call(SYS_mmap, 0, static_cast<long>(notes_bytes + slots_bytes), PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped < 0 && mapped >= -4095) return;
  g_ledger.note_tables[table] = static_cast<uint64_t>(mapped);
  slots = reinterpret_cast<uint32_t*>(static_cast<size_t>(mapped) + notes_bytes);
  slot_count = more_slots;
  __atomic_store_n(&g_ledger.note_tables_used, table + 1, __ATOMIC_RELEASE);
  rebuild();
}

void make_room() {
  rebuild();
  if (unused_notes() >= capacity() / 4 || is_locked_in()) return;
  forget_removed_watches();
  if (unused_notes() < capacity() / 4) grow();
}

uint64_t this_thread() { return reinterpret_cast<uint64_t>(__builtin_thread_pointer()); }

class NotesLock {
 public:
  NotesLock() {
    const uint64_t self = this_thread();
    // Long enough for a holder that waits for its processor; a holder that is never seen again must not stop us for good.
    for (uint32_t tries = 0; tries < 100'000'000; ++tries) {
      uint64_t nobody = 0;
      if (__atomic_compare_exchange_n(&owner, &nobody, self, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
        held_ = true;
        if (distrust) rebuild();
        return;
      }
      if (nobody == self) return;
      __builtin_ia32_pause();
    }
  }
  ~NotesLock() {
    if (held_) __atomic_store_n(&owner, 0, __ATOMIC_RELEASE);
  }
  NotesLock(const NotesLock&) = delete;
  NotesLock& operator=(const NotesLock&) = delete;
  bool held() const { return held_; }

 private:
  bool held_ = false;
};

// A note to be written, kClaimed and in `slots`; kNone when there is no room.
uint32_t claim(NoteKind kind, int fd, int64_t value) {
  if (const uint32_t slot = find_slot(kind, fd, value); slot != kNone) {
    const uint32_t number = slots[slot] - 1;
    set_kind(note_at(number), NoteKind::kClaimed);
    return number;
  }
  uint32_t number = first_free;
  if (number != kNone) {
    first_free = static_cast<uint32_t>(note_at(number).value);
    --free_notes;
  } else if (g_ledger.notes_used < capacity()) {
    number = g_ledger.notes_used;
  } else {
    return kNone;
  }
  set_kind(note_at(number), NoteKind::kClaimed);
  if (number == g_ledger.notes_used) __atomic_store_n(&g_ledger.notes_used, number + 1, __ATOMIC_RELEASE);
  enter(kind, fd, value, number);
  return number;
}

// Absolute, for the working directory may be another one by the time of the checkpoint. A program that has locked itself in is
// not asked for it.
void write_path(LedgerNote& note, const char* path) {
  size_t used = 0;
  if (path[0] != '/' && !is_locked_in()) {
    // The raw call: glibc's getcwd may allocate. It returns the length with the final NUL.
    const long length = raw_call(SYS_getcwd, reinterpret_cast<long>(note.text), sizeof note.text);
    used = length > 0 ? static_cast<size_t>(length) - 1 : 0;
  } else if (const char* directory = path[0] != '/' ? directory_when_locked() : nullptr) {
    used = copy_text(note.text, sizeof note.text, directory);
  }
  if (used != 0 && used + 1 < sizeof note.text) note.text[used++] = '/';
  copy_text(note.text + used, sizeof note.text - used, path);
}

}  // namespace

void take_note(NoteKind kind, int fd, int64_t value, const char* path) {
  NotesLock lock;
  if (lock.held() && (unused_notes() == 0 || slots_taken > slot_count / 4 * 3)) make_room();
  LedgerUpdate update;  // not around make_room(), which may take longer than a freeze waits and leaves notes whole
  const uint32_t number = lock.held() ? claim(kind, fd, value) : kNone;
  if (number == kNone) {
    __atomic_add_fetch(&g_ledger.notes_lost, 1, __ATOMIC_RELAXED);
    return;
  }
  LedgerNote& note = note_at(number);
  note.fd = fd;
  note.value = value;
  note.mark = 0;
  note.text[0] = '\0';
  if (path != nullptr) write_path(note, path);
  set_kind(note, kind);  // last: it is not read before it is whole
}

void forget_note(NoteKind kind, int fd, int64_t value) {
  NotesLock lock;
  const uint32_t slot = lock.held() ? find_slot(kind, fd, value) : kNone;
  if (slot == kNone) return;
  release(slots[slot] - 1);
  slots[slot] = kDeleted;
}

void forget_notes_of(NoteKind kind, int fd) {
  NotesLock lock;
  if (!lock.held()) return;
  bool any = false;
  for (uint32_t i = 0; i < g_ledger.notes_used; ++i) {
    LedgerNote& note = note_at(i);
    if (kind_of(note) != kind || note.fd != fd) continue;
    set_kind(note, NoteKind::kStale);
    any = true;
  }
  if (any) rebuild();
}

void forget_notes_lock() {
  __atomic_store_n(&owner, 0, __ATOMIC_RELEASE);
  distrust = true;
}

}  // namespace vmckpt
