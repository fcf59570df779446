// What the recorder's files share. Nothing here is visible outside libvmckpt.so.
#pragma once

#include "recorder/ledger.h"

namespace vmckpt {

extern Ledger g_ledger;

// The next definition of a wrapped function: libc's.
void* real_function(const char* name);

}  // namespace vmckpt
