// Finds and reads the recorder's ledger in a stopped target.
#pragma once

#include <memory>
#include <vector>

#include "core/remote_addr.h"
#include "core/result.h"
#include "recorder/ledger.h"

namespace vmckpt {

// `maps` is the text of /proc/PID/maps. The ledger is found by its magic in libvmckpt.so's writable pages, so it is found in
// a restarted target too, whatever its pages are backed by: `hint` is where it was last time, if that is known.
Result<RemoteAddr> find_ledger(pid_t pid, const std::string& maps, RemoteAddr hint);
Result<std::unique_ptr<Ledger>> read_ledger(pid_t pid, RemoteAddr address);
// The notes beyond those in the ledger itself.
Result<std::vector<LedgerNote>> read_further_notes(pid_t pid, const Ledger& ledger);
// Lets the recorder use notes again that say nothing any more: those with these numbers, ascending.
Result<void> mark_notes_stale(pid_t pid, const Ledger& ledger, const std::vector<uint32_t>& numbers);

}  // namespace vmckpt
