// What the player's code is made of, in player.cc and in the operations that modules bring (src/modules/played).
//
// Rules: such code is compiled freestanding, with general registers only, and every function lies in the section "vmckpt_player",
// which restart copies into a process that has nothing else. No string or table constants (they would land in .rodata, which is
// not copied along), no address of a function (a relocation), no switch (a jump table would), no call out of the section, no
// libc, no thread-local storage, little stack. tests/unit/check_symbols.py looks at the symbols and sections that come of it.
#pragma once

#include <stdint.h>
#include <sys/syscall.h>

#include "player/tape.h"

#define PLAYER_CODE __attribute__((section("vmckpt_player"), used))
#define PLAYER_INLINE static inline __attribute__((always_inline))
// For functions that another file of the player calls: without a detour by the linker's tables.
#define PLAYER_SHARED __attribute__((visibility("hidden")))

namespace vmckpt {

constexpr int64_t kMaxErrno = 4095;
constexpr int64_t kErrorInterrupted = 4, kErrorIo = 5, kErrorInvalid = 22, kErrorNoCall = 38;

PLAYER_INLINE bool is_error(int64_t result) { return result < 0 && result >= -kMaxErrno; }

PLAYER_INLINE int64_t system_call(int64_t number, uint64_t a0 = 0, uint64_t a1 = 0, uint64_t a2 = 0, uint64_t a3 = 0,
                                  uint64_t a4 = 0, uint64_t a5 = 0) {
  int64_t result;
  register uint64_t r10 asm("r10") = a3;
  register uint64_t r8 asm("r8") = a4;
  register uint64_t r9 asm("r9") = a5;
  asm volatile("syscall"
               : "=a"(result)
               : "a"(number), "D"(a0), "S"(a1), "d"(a2), "r"(r10), "r"(r8), "r"(r9)
               : "rcx", "r11", "memory");
  return result;
}

// Operations from kOpFirstOfModules on: the player does not know what they are (modules/played/operations.cc).
PLAYER_SHARED int64_t play_for_module(TapeCall* call);

}  // namespace vmckpt
