#include "core/proc.h"

#include <algorithm>
#include <charconv>

#include <dirent.h>
#include <signal.h>
#include <unistd.h>

#include "core/fd.h"

namespace vmckpt {

Result<std::vector<pid_t>> list_threads(pid_t pid) {
  std::string path = fmt::format("/proc/{}/task", pid);
  DIR* directory = ::opendir(path.c_str());
  if (directory == nullptr) return errno_error("list threads in " + path);
  std::vector<pid_t> tids;
  while (dirent* entry = ::readdir(directory)) {
    if (entry->d_name[0] != '.') tids.push_back(static_cast<pid_t>(parse_number(entry->d_name)));
  }
  ::closedir(directory);
  return tids;
}

std::vector<pid_t> list_children(pid_t pid) {
  std::vector<pid_t> children;
  auto threads = list_threads(pid);
  if (!threads.ok()) return children;
  for (pid_t tid : *threads) {
    auto text = read_whole_file(fmt::format("/proc/{}/task/{}/children", pid, tid));
    if (!text.ok()) continue;
    for (std::string_view word : split_words(*text)) children.push_back(static_cast<pid_t>(parse_number(word)));
  }
  return children;
}

std::vector<pid_t> list_descendants(pid_t pid) {
  std::vector<pid_t> all = list_children(pid);
  for (size_t i = 0; i < all.size(); ++i) {
    for (pid_t child : list_children(all[i])) all.push_back(child);
  }
  return all;
}

Result<StatusFields> read_status(pid_t pid, pid_t tid) {
  std::string path = tid == 0 ? fmt::format("/proc/{}/status", pid) : fmt::format("/proc/{}/task/{}/status", pid, tid);
  std::string text = VMCKPT_TRY(read_whole_file(path));
  StatusFields fields;
  for (std::string_view line : split_lines(text)) {
    size_t colon = line.find(':');
    if (colon == std::string_view::npos) continue;
    std::string_view value = line.substr(colon + 1);
    while (!value.empty() && (value.front() == '\t' || value.front() == ' ')) value.remove_prefix(1);
    fields.emplace(line.substr(0, colon), value);
  }
  return fields;
}

std::string_view status_field(const StatusFields& status, std::string_view name) {
  auto found = status.find(name);
  return found == status.end() ? std::string_view() : std::string_view(found->second);
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
