// What the kernel keeps about a process and shows to nobody: known from the recorder's notes alone, and lost in a restart.
// Landlock's rules cannot be had again, and a sandbox must not come back open: refused. The others are noted.
#pragma once

#include <string>
#include <vector>

#include <sys/types.h>

#include "core/result.h"
#include "recorder/ledger.h"

namespace vmckpt {

Result<void> check_hidden_state(pid_t pid, const Ledger& ledger, std::vector<std::string>& notes);

}  // namespace vmckpt
