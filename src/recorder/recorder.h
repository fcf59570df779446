// What the recorder's files share. Nothing here is visible outside libvmckpt.so.
#pragma once

#include <errno.h>
#include <stddef.h>
#include <stdint.h>

#include "player/code.h"
#include "recorder/ledger.h"

namespace vmckpt {

extern Ledger g_ledger;

// Marks the calling thread as inside an update; the freeze lets it leave before it takes the ledger as read.
class LedgerUpdate {
 public:
  LedgerUpdate() { __atomic_add_fetch(&g_ledger.writers, 1, __ATOMIC_ACQ_REL); }
  ~LedgerUpdate() { __atomic_sub_fetch(&g_ledger.writers, 1, __ATOMIC_ACQ_REL); }
};

// As the player makes it: past libc, the kernel's answer as it is.
inline long raw_call(long number, long a0 = 0, long a1 = 0, long a2 = 0, long a3 = 0, long a4 = 0, long a5 = 0) {
  auto plain = [](long argument) { return static_cast<uint64_t>(argument); };
  return system_call(number, plain(a0), plain(a1), plain(a2), plain(a3), plain(a4), plain(a5));
}

// As libc gives it to programs.
inline long libc_result(long result) {
  if (result >= 0 || result < -4095) return result;
  errno = static_cast<int>(-result);
  return -1;
}

inline size_t copy_text(char* to, size_t room, const char* from) {
  size_t used = 0;
  while (used + 1 < room && from[used] != '\0') {
    to[used] = from[used];
    ++used;
  }
  to[used] = '\0';
  return used;
}

// Where relative paths of a program that has locked itself in start; null: not known.
const char* directory_when_locked();

bool devices_are_allowed();  // launch --allow-devices

// Whether the program has installed a system call filter, or strict mode. From then on a system call of the recorder's own, which
// the filter may not know, could kill it: wrappers make the call that the program has made, and no other.
bool is_locked_in();
inline constexpr char kLockedIn[] = "VMCKPT_LOCKED_IN=1";  // in the environment of a program that was executed after that

inline constexpr char kLandlocked[] = "VMCKPT_LANDLOCKED=1";  // the same for Landlock, whose domain lasts as well
bool is_landlocked();
void note_directory_watch(int fd, long events);  // fcntl(F_NOTIFY)

// kvm_recorder.cc
uint64_t kvm_ledger_address();
void forget_kvm_lock();  // in a forked child
void name_eventfd(int fd);                   // a new one has this number
int note_duplicate(int fd, int duplicate);   // dup(2) and its kin; returns `duplicate`

uint64_t partial_calls_address();  // partial_calls.cc

// aio_recorder.cc: the calls of Linux AIO, made and noted. They return what the kernel does.
long aio_setup(long events, unsigned long* context);
long aio_destroy(long id);
long aio_submit(long id, long count, long requests);
// ram_recorder.cc
void open_ram_ledger();
void forget_ram_lock();                                              // in a forked child
void note_lock_of_all(bool locked);                                  // mlockall(2), munlockall(2)
// False: what is known of image-backed memory around a new mapping would not fit (the caller answers ENOMEM).
bool ram_has_room_for_mapping(uint64_t address, uint64_t bytes, int flags);
void note_ram_mapping(long address, uint64_t bytes, int flags);      // what mmap(2) answered
bool ram_call(long number, const long (&arguments)[6], long* result);  // false: no call that matters there

// The next definition of a wrapped function: libc's.
void* real_function(const char* name);
struct RealFunction {
  const char* name;
  void** address;
};

}  // namespace vmckpt

#define EXPORT extern "C" __attribute__((visibility("default")))

// Declares `real`, the wrapped function. All are looked up at start (find_real_functions): dlsym may make system calls. Whoever
// calls a wrapper before that looks it up himself; racing threads store the same value.
#define REAL(name)                                                                                            \
  static void* real_address;                                                                                  \
  static ::vmckpt::RealFunction real_entry __attribute__((section("vmckpt_real"), used)) = {#name, &real_address}; \
  if (real_address == nullptr) real_address = ::vmckpt::real_function(#name);                                 \
  const auto real = reinterpret_cast<decltype(&::name)>(real_address)
