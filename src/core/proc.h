// Readers of /proc. Values are as this process's PID namespace shows them unless a name says otherwise.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <sys/types.h>

#include "core/fd.h"
#include "core/result.h"

namespace vmckpt {

// What has ended meanwhile has no children; anything else that cannot be read is an error, for a process that is overlooked
// would be missing from an image.
Result<std::vector<pid_t>> list_threads(pid_t pid);
Result<std::vector<pid_t>> list_children(pid_t pid);     // direct children of all its threads
Result<std::vector<pid_t>> list_descendants(pid_t pid);  // all of them, in no particular order

// The names in an open directory; closes it. `name` is for messages.
Result<std::vector<std::string>> list_names(Fd directory, const std::string& name);

// /proc/PID/status (or /proc/PID/task/TID/status) as it is: of its sixty fields a pause asks for a few.
struct StatusFields {
  std::string text;
};
Result<StatusFields> read_status(pid_t pid, pid_t tid = 0);
std::string_view status_field(const StatusFields& status, std::string_view name);
uint64_t status_hex(const StatusFields& status, std::string_view name);
int64_t status_number(const StatusFields& status, std::string_view name);
// The last number of a field such as NSpid: as the innermost namespace shows it.
int64_t status_innermost(const StatusFields& status, std::string_view name);

// Fields of /proc/PID/stat from the third on: fields[0] is the state, fields[1] the parent (proc(5) counts them 3, 4 ...).
Result<std::vector<std::string>> read_stat(pid_t pid);

pid_t tracer_of(pid_t tid);          // 0 when nobody traces it
std::string command_of(pid_t pid);   // name, or "?"
std::string describe_wait(pid_t tid);  // " (state D, in FUNCTION)" for messages
bool process_exists(pid_t pid);        // and is not a zombie
enum class ThreadLife { kRuns, kEnding, kEnded };  // kEnding: inside exit(2); kEnded: a zombie, or gone
ThreadLife life_of_thread(pid_t pid, pid_t tid);

// "a\0b\0" to {a, b}.
std::vector<std::string> split_nul(std::string_view text);
std::vector<std::string_view> split_words(std::string_view text);
std::vector<std::string_view> split_lines(std::string_view text);
uint64_t parse_hex(std::string_view text);
int64_t parse_number(std::string_view text);

}  // namespace vmckpt
