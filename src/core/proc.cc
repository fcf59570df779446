#include "core/proc.h"

#include <algorithm>
#include <charconv>
#include <memory>

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include "core/fd.h"

namespace vmckpt {

Result<std::vector<std::string>> list_names(Fd folder, const std::string& name) {
  DIR* directory = ::fdopendir(folder.get());
  if (directory == nullptr) return errno_error("list " + name);
  folder.release();
  std::unique_ptr<DIR, int (*)(DIR*)> closed_at_end(directory, ::closedir);
  std::vector<std::string> names;
  for (;;) {
    errno = 0;
    dirent* entry = ::readdir(directory);
    if (entry == nullptr && errno != 0) return errno_error("list " + name);
    if (entry == nullptr) return names;
    if (entry->d_name[0] != '.') names.emplace_back(entry->d_name);
  }
}

Result<std::vector<pid_t>> list_threads(pid_t pid) {
  std::string path = fmt::format("/proc/{}/task", pid);
  Fd folder = VMCKPT_TRY(open_file(path, O_RDONLY | O_DIRECTORY));
  std::vector<pid_t> tids;
  for (const std::string& name : VMCKPT_TRY(list_names(std::move(folder), path))) {
    tids.push_back(static_cast<pid_t>(parse_number(name)));
  }
  return tids;
}

Result<std::vector<pid_t>> list_children(pid_t pid) {
  auto has_ended = [](const Error& error) { return error.err == ENOENT || error.err == ESRCH; };
  std::vector<pid_t> children;
  auto threads = list_threads(pid);
  if (!threads.ok() && has_ended(threads.error())) return children;
  for (pid_t tid : VMCKPT_TRY(std::move(threads))) {
    auto text = read_whole_file(fmt::format("/proc/{}/task/{}/children", pid, tid));
    if (!text.ok() && has_ended(text.error())) continue;
    if (!text.ok()) return text.error();
    for (std::string_view word : split_words(*text)) children.push_back(static_cast<pid_t>(parse_number(word)));
  }
  return children;
}

Result<std::vector<pid_t>> list_descendants(pid_t pid) {
  std::vector<pid_t> all = VMCKPT_TRY(list_children(pid));
  for (size_t i = 0; i < all.size(); ++i) {
    for (pid_t child : VMCKPT_TRY(list_children(all[i]))) all.push_back(child);
  }
  return all;
}

Result<StatusFields> read_status(pid_t pid, pid_t tid) {
  std::string path = tid == 0 ? fmt::format("/proc/{}/status", pid) : fmt::format("/proc/{}/task/{}/status", pid, tid);
  return StatusFields{VMCKPT_TRY(read_whole_file(path))};
}

std::string_view status_field(const StatusFields& status, std::string_view name) {
  // A line's end in a name is shown as "\\n" (proc(5)), so that each line is a field.
  for (std::string_view rest = status.text; !rest.empty();) {
    std::string_view line = rest.substr(0, rest.find('\n'));
    rest.remove_prefix(std::min(rest.size(), line.size() + 1));
    if (line.size() <= name.size() || line[name.size()] != ':' || !line.starts_with(name)) continue;
    line.remove_prefix(name.size() + 1);
    line.remove_prefix(std::min(line.size(), line.find_first_not_of("\t ")));
    return line;
  }
  return {};
}

uint64_t status_hex(const StatusFields& status, std::string_view name) { return parse_hex(status_field(status, name)); }

int64_t status_number(const StatusFields& status, std::string_view name) {
  auto words = split_words(status_field(status, name));
  return words.empty() ? 0 : parse_number(words.front());
}

int64_t status_innermost(const StatusFields& status, std::string_view name) {
  auto words = split_words(status_field(status, name));
  return words.empty() ? 0 : parse_number(words.back());
}

Result<std::vector<std::string>> read_stat(pid_t pid) {
  std::string text = VMCKPT_TRY(read_whole_file(fmt::format("/proc/{}/stat", pid)));
  size_t end_of_name = text.rfind(')');
  if (end_of_name == std::string::npos) return error(fmt::format("/proc/{}/stat has an unknown form", pid));
  std::vector<std::string> fields;
  for (std::string_view word : split_words(std::string_view(text).substr(end_of_name + 1))) fields.emplace_back(word);
  return fields;
}

pid_t tracer_of(pid_t tid) {
  auto status = read_status(tid);
  return status.ok() ? static_cast<pid_t>(status_number(*status, "TracerPid")) : 0;
}

std::string command_of(pid_t pid) {
  auto text = read_whole_file(fmt::format("/proc/{}/comm", pid));
  if (!text.ok()) return "?";
  std::string name = *text;
  if (!name.empty() && name.back() == '\n') name.pop_back();
  return name;
}

std::string describe_wait(pid_t tid) {
  auto status = read_status(tid);
  auto place = read_whole_file(fmt::format("/proc/{}/wchan", tid));
  std::string state = status.ok() ? std::string(status_field(*status, "State")) : "unknown";
  std::string text = " (state " + state;
  if (place.ok() && !place->empty() && *place != "0") text += ", in " + *place;
  return text + ")";
}

bool process_exists(pid_t pid) {
  auto stat = read_stat(pid);
  return stat.ok() && !stat->empty() && (*stat)[0] != "Z" && (*stat)[0] != "X";
}

ThreadLife life_of_thread(pid_t pid, pid_t tid) {
  constexpr int64_t kExiting = 4;  // PF_EXITING, include/linux/sched.h
  auto text = read_whole_file(fmt::format("/proc/{}/task/{}/stat", pid, tid));
  if (!text.ok()) return text.error().err == ENOENT || text.error().err == ESRCH ? ThreadLife::kEnded : ThreadLife::kRuns;
  auto fields = split_words(std::string_view(*text).substr(text->rfind(')') + 1));
  if (fields.size() < 7) return ThreadLife::kRuns;
  if (fields[0] == "Z" || fields[0] == "X") return ThreadLife::kEnded;
  return (parse_number(fields[6]) & kExiting) != 0 ? ThreadLife::kEnding : ThreadLife::kRuns;
}

std::vector<std::string> split_nul(std::string_view text) {
  std::vector<std::string> parts;
  while (!text.empty()) {
    size_t end = text.find('\0');
    parts.emplace_back(text.substr(0, end));
    if (end == std::string_view::npos) break;
    text.remove_prefix(end + 1);
  }
  return parts;
}

std::vector<std::string_view> split_words(std::string_view text) {
  std::vector<std::string_view> words;
  constexpr std::string_view kBlank = " \t\n";
  for (size_t start = text.find_first_not_of(kBlank); start != std::string_view::npos;) {
    size_t end = text.find_first_of(kBlank, start);
    words.push_back(text.substr(start, end == std::string_view::npos ? end : end - start));
    start = end == std::string_view::npos ? end : text.find_first_not_of(kBlank, end);
  }
  return words;
}

std::vector<std::string_view> split_lines(std::string_view text) {
  std::vector<std::string_view> lines;
  while (!text.empty()) {
    size_t end = text.find('\n');
    lines.push_back(text.substr(0, end));
    if (end == std::string_view::npos) break;
    text.remove_prefix(end + 1);
  }
  return lines;
}

uint64_t parse_hex(std::string_view text) {
  if (text.starts_with("0x")) text.remove_prefix(2);
  uint64_t value = 0;
  std::from_chars(text.data(), text.data() + text.size(), value, 16);
  return value;
}

int64_t parse_number(std::string_view text) {
  int64_t value = 0;
  std::from_chars(text.data(), text.data() + text.size(), value, 10);
  return value;
}

}  // namespace vmckpt
