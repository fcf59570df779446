// What the new process does itself: as hosted C++ it rebuilds everything that survives a change of memory (directories,
// descriptors), then it lays out the tapes and the player in an arena between the target's mappings and jumps into it. The
// player replaces the memory, makes the threads, and stops each of them; the supervisor takes over from there.
#pragma once

#include <array>
#include <cstdint>

#include "core/remote_addr.h"
#include "core/result.h"
#include "image/reader.h"
#include "memory/file_access.h"
#include "modules/host.h"
#include "restart/new_process.h"

namespace vmckpt {

// What the new process tells the supervisor before it jumps: where to look when the tapes have been played.
struct RebuildReport {
  RemoteAddr arena;
  uint64_t arena_bytes = 0;
  RemoteAddr syscall_instruction;
};

// Messages on the channel, first byte says the kind.
enum class ChannelMessage : char {
  kNote = 'N',
  kError = 'E',
  kReady = 'R',  // RebuildReport, then the tapes' addresses (RemoteAddr each) in the order of the image's threads; the master of
                 // a fresh terminal may come along (SCM_RIGHTS)
};

struct RebuildInputs {
  ImageReader& image;
  std::array<int, 3> stdio;  // restart's own, as duplicates
  FilePolicy files;
  GuestClock guest_clock = GuestClock::kContinue;
};

[[noreturn]] void rebuild_and_play(RebuildInputs& inputs, const Birthplace& birthplace);

}  // namespace vmckpt
