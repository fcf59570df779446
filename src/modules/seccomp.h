// Seccomp filters. Kernel object: each thread's chain of classic BPF programs; inherited by its children, never removable.
//
// Installed by: seccomp(SECCOMP_SET_MODE_FILTER), prctl(PR_SET_SECCOMP). The first filter is launch's own (io_uring and AIO
// are denied so that programs fall back).
// Saved: with CAP_SYS_ADMIN by PTRACE_SECCOMP_GET_FILTER, otherwise from the ledger; when the number of filters that the
// kernel reports (/proc/PID/status, Seccomp_filters) is not the number known, the checkpoint is refused.
// Without CAP_SYS_ADMIN the kernel takes a filter only with no_new_privs, which is then set, at launch as at restart.
// Restored: as the last call of each thread's tape, oldest filter first.
//
// A filter also applies to the calls that the checkpoint makes inside the target; a forbidden one may kill it. So every call
// is first tried on the filters here (evaluate_filters), and a checkpoint that would need a forbidden call is refused.
#pragma once

#include <vector>

#include <linux/filter.h>

#include "core/result.h"
#include "image/image.pb.h"
#include "modules/seccomp.pb.h"
#include "recorder/ledger.h"
#include "tracer/stopped_world.h"
#include "tracer/tape_draft.h"

namespace vmckpt {

using FilterProgram = std::vector<sock_filter>;

// The filter that launch installs before it executes the program; nothing needs to run as root.
Result<FilterProgram> make_launch_filter();
Result<void> install_filter(const FilterProgram& program);  // in the calling process

// Oldest first.
inline const auto& filters_of(const pb::Thread& thread) { return thread.GetExtension(pb::seccomp).filters(); }

Result<void> save_seccomp(const StoppedThread& thread, const Ledger& ledger, bool launch_filter, pb::Seccomp* saved);

// What the filters of `thread` answer to a call: a SECCOMP_RET_* value with its data.
uint32_t evaluate_filters(const pb::Thread& thread, int64_t number, const uint64_t (&args)[6], uint64_t instruction_pointer);

// What a tape needs of the filters: that they let every call through; the calls of a fork as well; or only that no call ends
// or stops the thread, where the tape's reader deals with calls that fail.
enum class TapeNeeds { kEveryCall, kEveryCallAndFork, kNoHarm };
// The first call of the draft at which the filters do not grant that, as an Error.
Result<void> check_tape_against_filters(const pb::Thread& thread, const TapeDraft& tape, TapeNeeds needs);


}  // namespace vmckpt
