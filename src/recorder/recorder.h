// What the recorder's files share. Nothing here is visible outside libvmckpt.so.
#pragma once

#include <errno.h>
#include <stdint.h>

#include "recorder/ledger.h"

namespace vmckpt {

extern Ledger g_ledger;

// Marks the calling thread as inside an update; the freeze lets it leave before it takes the ledger as read.
class LedgerUpdate {
 public:
  LedgerUpdate() { __atomic_add_fetch(&g_ledger.writers, 1, __ATOMIC_ACQ_REL); }
  ~LedgerUpdate() { __atomic_sub_fetch(&g_ledger.writers, 1, __ATOMIC_ACQ_REL); }
};

inline long raw_call(long number, long a0 = 0, long a1 = 0, long a2 = 0, long a3 = 0, long a4 = 0, long a5 = 0) {
  long result;
  register long r10 asm("r10") = a3;
  register long r8 asm("r8") = a4;
  register long r9 asm("r9") = a5;
  asm volatile("syscall"
               : "=a"(result)
               : "a"(number), "D"(a0), "S"(a1), "d"(a2), "r"(r10), "r"(r8), "r"(r9)
               : "rcx", "r11", "memory");
  return result;
}

// As libc gives it to programs.
inline long libc_result(long result) {
  if (result >= 0 || result < -4095) return result;
  errno = static_cast<int>(-result);
  return -1;
}

bool devices_are_allowed();  // launch --allow-devices

// kvm_recorder.cc
uint64_t kvm_ledger_address();
void forget_kvm_lock();  // in a forked child

// aio_recorder.cc: the calls of Linux AIO, made and noted. They return what the kernel does.
long aio_setup(long events, unsigned long* context);
long aio_destroy(long id);
long aio_submit(long id, long count, long requests);

// The next definition of a wrapped function: libc's.
void* real_function(const char* name);

}  // namespace vmckpt
