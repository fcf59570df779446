// The host: what the image needs of the one it is restarted on.
#pragma once

#include <string>
#include <vector>

#include "core/result.h"
#include "image/image.pb.h"

namespace vmckpt {

// The process that is PID 1 of a restarted target's PID namespace carries this name.
inline constexpr char kNamespaceInitName[] = "vmckpt-init";

enum class CpuCheck {
  kStrict,  // every CPU flag of the old host must be here: programs chose their code by them at start
  kGuest,  // only what the guest of a KVM virtual machine was shown
  kNone,
};

// How the clocks of a virtual machine's guest go on after the time that it was away.
enum class GuestClock {
  kContinue,  // from where they stood
  kAdvance,   // after the gap
};

void save_host(pb::Host* host);
// Whether the image was made on this host since it was booted: clocks that count from the boot (the TSC) can then be compared.
bool is_this_boot(const pb::Host& host);

}  // namespace vmckpt
