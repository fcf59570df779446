// What belongs to the process as a whole and is no resource of its own: identity, names, directories, limits, prctl settings.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/result.h"
#include "image/image.pb.h"
#include "memory/file_access.h"
#include "tracer/stopped_world.h"
#include "tracer/tape_draft.h"

namespace vmckpt {

struct ProcessQuestions {
  size_t dumpable, subreaper, thp_disabled, xstate_permission, xstate_guest_permission;
  std::optional<size_t> membarrier, deny_write_execute, memory_merge;  // unless a seccomp filter forbids to ask
  uint64_t subreaper_answer, xstate_permission_answer, xstate_guest_permission_answer;
};

ProcessQuestions ask_process(const pb::Thread& leader, TapeDraft& tape);
Result<void> save_process(const StoppedWorld& world, pb::Process* process);
void save_process_answers(const ProcessQuestions& questions, const TapeDraft& tape, pb::Process* process);

void check_process(const pb::Process& process, const FileAccess& access, std::vector<Error>& problems);
// In the new process, before descriptors are rebuilt: directories, umask, personality, session and group.
Result<void> restore_process(const pb::Process& process, const FileAccess& access);
// By the leader's tape, when memory is in place and before threads are made.
void plan_process(const pb::Process& process, TapeDraft& tape);
// By the leader's tape, when all memory is in place and before threads are made: they inherit the personality.
void plan_memory_rules(const pb::Process& process, TapeDraft& tape);
// By the leader's tape after its credentials are set.
void plan_process_end(const pb::Process& process, TapeDraft& tape);
// By the leader's tape after that: a process of another user takes its limits from nobody without CAP_SYS_RESOURCE.
void plan_limits(const pb::Process& process, const pb::Credentials& credentials, TapeDraft& tape);
// From the supervisor, when all else is done: the new process itself might not be able to open its last files otherwise.
void restore_limits(const pb::Process& process, pid_t pid, std::vector<std::string>& notes);
// From the supervisor: its cgroups where they are and may be entered; they and another login uid are noted otherwise.
void restore_surroundings(const pb::Process& process, pid_t pid, std::vector<std::string>& notes);

}  // namespace vmckpt
