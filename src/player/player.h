// The player: a tiny interpreter of tapes (tape.h). No libc, no thread-local storage, no data of its own, position
// independent, general-purpose registers only: its machine code sits in one section that can be copied anywhere.
#pragma once

#include "player/tape.h"

extern "C" {

// Entry point: rdi = Tape*, rsp = a stack of its own with at least kPlayerStackBytes. Never returns.
[[noreturn]] void vmckpt_player_entry();

// First and one past the last byte of the player's code (made by the linker for the section "vmckpt_player").
extern const char __start_vmckpt_player[] __attribute__((visibility("hidden")));
extern const char __stop_vmckpt_player[] __attribute__((visibility("hidden")));
}
