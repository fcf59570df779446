// The ledger: what the recorder writes down because the kernel cannot be asked later. Plain data of fixed layout inside
// libvmckpt.so's own writable memory, read by the supervisor from outside (src/tracer/ledger_reader.cc) while every thread
// of the target is stopped. Shared by recorder (no libc++), player and supervisor: only fixed-size types here.
//
// Updates are bracketed by `writers`: the freeze lets a thread that is inside an update finish first.
#pragma once

#include <stdint.h>

namespace vmckpt {

constexpr uint64_t kLedgerMagic0 = 0x4c54504b434d5631ull;  // found by scanning libvmckpt.so's writable pages
constexpr uint64_t kLedgerMagic1 = 0x9d1c3f5a7e2b6840ull;
constexpr uint32_t kLedgerVersion = 5;

constexpr uint32_t kLedgerNotes = 1024;         // notes of any kind in the ledger itself
constexpr uint32_t kLedgerNoteTables = 11;      // further tables, each as large as all notes before it: 2 Mi notes
constexpr uint32_t kLedgerNoteTextBytes = 236;  // longest path kept with a note
constexpr uint32_t kLedgerFilters = 16;         // seccomp filters the program installed itself
constexpr uint32_t kLedgerFilterInstructions = 4096;

enum class NoteKind : uint32_t {
  kFree = 0,
  kClaimed = 0xffff,      // being written
  kStale = 0xfffe,        // of something that is not there any more; the recorder uses the note again
  kInotifyWatch = 1,      // fd, value = watch descriptor, text = path watched, absolute where the recorder could tell
  kEventfdSemaphore = 2,  // fd: created with EFD_SEMAPHORE (fdinfo shows it only on newer kernels)
  kUnixBind = 3,          // fd, text = path of a Unix socket bound by a relative path, made absolute where the recorder could
  kLandlock = 4,          // the program has restricted itself with Landlock
  kSemaphoreUndo = 5,     // value = System V semaphore set on which it has used SEM_UNDO
  kDirectoryNotify = 6,   // fd: a directory watched with F_NOTIFY
};

struct LedgerNote {
  NoteKind kind;
  int32_t fd;
  int64_t value;
  uint32_t mark;  // notes.cc
  char text[kLedgerNoteTextBytes];
};

struct LedgerFilter {  // one seccomp filter, in order of installation
  uint32_t flags;      // SECCOMP_FILTER_FLAG_*
  uint32_t first_instruction;
  uint32_t instructions;
  int32_t tid;  // thread that installed it (filters without TSYNC belong to one thread)
};

struct LedgerAioContext {  // one context of Linux AIO
  uint64_t id;             // its ring's address; 0 when this entry is free
  uint64_t submitted;      // requests that io_submit has accepted
};

constexpr uint32_t kLedgerAioContexts = 256;
// In the sixth argument of io_setup and io_submit, which take two and three: the recorder made this call and counts it.
constexpr uint64_t kAioMark = 0x76'6d63'6b70'742d;

// The arena is where the supervisor places tapes and signal frames while the world is stopped; the player runs on its
// stacks. One slot per thread, reused in batches.
constexpr uint32_t kArenaSlots = 64;
constexpr uint32_t kArenaSlotBytes = 64 * 1024;

struct Ledger {
  uint64_t magic0;
  uint64_t magic1;
  uint32_t version;
  uint32_t bytes;         // sizeof(Ledger): a supervisor of another version notices
  uint64_t self;          // own address: tells a copy from the ledger in use
  uint64_t player_entry;  // address of player_entry (src/player/player.h)
  uint64_t arena;         // address of the arena
  uint32_t arena_slots;
  uint32_t arena_slot_bytes;
  int32_t rseq_offset;  // glibc's __rseq_offset from the thread pointer; rseq_bytes 0 when not registered
  uint32_t rseq_bytes;

  uint64_t kvm;            // address of the KvmLedger (kvm_ledger.h)
  uint64_t partial_calls;  // address of the PartialCallTable (partial_calls.h)

  uint32_t writers;  // threads inside an update
  uint32_t madvise_generation;
  uint32_t notes_lost;  // notes that found the table full
  uint32_t filters_used;
  uint32_t filter_instructions_used;
  uint32_t filters_lost;
  uint32_t mlockall_flags;
  uint32_t notes_used;  // notes at or beyond this index have never been used
  uint32_t aio_submitters;  // threads inside io_submit
  uint32_t note_tables_used;
  LedgerAioContext aio_contexts[kLedgerAioContexts];

  uint64_t note_tables[kLedgerNoteTables];  // addresses; note N is in the ledger below kLedgerNotes, else in one of these

  LedgerFilter filters[kLedgerFilters];
  uint64_t filter_instructions[kLedgerFilterInstructions];  // struct sock_filter, 8 bytes each
  LedgerNote notes[kLedgerNotes];                           // last: read only as far as they are used
};

}  // namespace vmckpt
