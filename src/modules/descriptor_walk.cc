// Reads /proc/PID/fd and fdinfo of a stopped process once and finds which numbers share one open file description
// (dup, dup2, fork and SCM_RIGHTS make such numbers): they share position and status flags, so restart must share them
// too.
//
// Two numbers can only share if device, inode, flags, position and the rest of fdinfo agree, which leaves few
// candidates; those are compared with kcmp(2) KCMP_FILE. Where kcmp is not permitted or not built in, fcntl
// F_DUPFD_QUERY (Linux 6.10) answers the same question about two duplicates; failing that too, agreement in all of the
// above must do. Sources: proc_pid_fdinfo(5), kcmp(2), include/uapi/linux/fcntl.h.
#include <algorithm>
#include <charconv>
#include <tuple>

#include <linux/kcmp.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core/proc.h"
#include "modules/descriptor_module.h"

namespace vmckpt {
namespace {

constexpr int kFcntlDupfdQuery = 1024 + 3;  // F_DUPFD_QUERY, newer than Debian 12's headers

Result<std::vector<int>> list_numbers(int proc) {
  Fd folder(::openat(proc, "fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!folder) return errno_error("open the target's /proc/PID/fd");
  std::vector<int> numbers;
  for (const std::string& name : VMCKPT_TRY(list_names(std::move(folder), "the target's /proc/PID/fd"))) {
    numbers.push_back(static_cast<int>(parse_number(name)));
  }
  std::sort(numbers.begin(), numbers.end());
  return numbers;
}

class Walk {
 public:
  Walk(const StoppedWorld& world, int proc) : world_(world), proc_(proc), buffer_(size_t{64} << 10, '\0') {}

  Result<TargetFile> read_number(int number) {
    TargetFile file;
    file.duplicate = VMCKPT_TRY(world_.duplicate_fd(number));
    if (::fstat(file.duplicate.get(), &file.status) != 0)
      return errno_error(fmt::format("look at descriptor {}", number));
    file.link = VMCKPT_TRY(read_link(number, file.status));
    file.fdinfo = VMCKPT_TRY(read_fdinfo(number));
    uint64_t flags = parse_octal(fdinfo_field(file.fdinfo, "flags"));
    file.flags = static_cast<uint32_t>(flags & ~uint64_t{O_CLOEXEC});
    file.position = parse_number(fdinfo_field(file.fdinfo, "pos"));
    file.numbers.push_back({number, (flags & O_CLOEXEC) != 0});
    return file;
  }

 private:
  // "socket:[123]" and "pipe:[123]" only repeat the inode: asked once per kind, which is known by its device.
  Result<std::string> read_link(int number, const struct stat& status) {
    for (const auto& [device, kind] : kinds_) {
      if (device == status.st_dev) return fmt::format("{}:[{}]", kind, status.st_ino);
    }
    char name[32], link[4096 + 16];
    std::snprintf(name, sizeof name, "fd/%d", number);
    ssize_t length = ::readlinkat(proc_, name, link, sizeof link);
    if (length < 0 && errno == ENAMETOOLONG) {
      return error(fmt::format("the path of descriptor {} is longer than {} characters, which the kernel does not tell", number,
                               PATH_MAX),
                   "let the program open it below a shorter path");
    }
    if (length < 0) return errno_error(fmt::format("read /proc/PID/fd/{} of the target", number));
    std::string text(link, static_cast<size_t>(length));
    for (const char* kind : {"socket", "pipe"}) {
      if (text == fmt::format("{}:[{}]", kind, status.st_ino)) kinds_.emplace_back(status.st_dev, kind);
    }
    return text;
  }

  Result<std::string> read_fdinfo(int number) {
    char name[32];
    std::snprintf(name, sizeof name, "fdinfo/%d", number);
    Fd info(::openat(proc_, name, O_RDONLY | O_CLOEXEC));
    if (!info) return errno_error(fmt::format("open /proc/PID/fdinfo/{} of the target", number));
    // The file is one record, which the kernel gives whole if it fits: a read that leaves room has seen the end
    // (fs/seq_file.c, single_open).
    ssize_t got = ::read(info.get(), buffer_.data(), buffer_.size());
    if (got < 0) return errno_error(fmt::format("read /proc/PID/fdinfo/{} of the target", number));
    std::string text(buffer_, 0, static_cast<size_t>(got));
    if (static_cast<size_t>(got) < buffer_.size()) return text;
    return text + VMCKPT_TRY(read_whole_fd(info.get(), fmt::format("/proc/PID/fdinfo/{}", number), size_t{256} << 20));
  }

  const StoppedWorld& world_;
  int proc_;
  std::string buffer_;
  std::vector<std::pair<dev_t, const char*>> kinds_;
};

// Every duplicate takes a number in this process too.
void raise_own_limit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == limit.rlim_max) return;
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
}

// What follows the flags line, which alone differs between numbers of one open file (O_CLOEXEC belongs to the number).
std::string_view after_flags(std::string_view fdinfo) {
  size_t flags = fdinfo.find("flags:");
  size_t end = flags == std::string_view::npos ? flags : fdinfo.find('\n', flags);
  return end == std::string_view::npos ? std::string_view() : fdinfo.substr(end);
}

// Open files that look alike, in the order that kcmp gives (0 equal, 1 less, 2 greater), so that the comparisons stay
// few when a program has the same file open a thousand times.
class Lookalikes {
 public:
  // The one that `file` shares its open file description with, or -1; then `file`, about to become files[index], is
  // added.
  int find_or_add(pid_t pid, const std::vector<TargetFile>& files, const TargetFile& file, size_t index) {
    size_t low = 0, high = sorted_.size();
    while (low < high) {
      size_t middle = (low + high) / 2;
      long order = ::syscall(SYS_kcmp, pid, pid, KCMP_FILE, file.lowest(), files[sorted_[middle]].lowest());
      if (order == 0) return static_cast<int>(sorted_[middle]);
      if (order < 0) return find_without_kcmp(files, file, index);
      if (order == 1) high = middle;
      else low = middle + 1;
    }
    sorted_.insert(sorted_.begin() + static_cast<ptrdiff_t>(low), index);
    return -1;
  }

 private:
  int find_without_kcmp(const std::vector<TargetFile>& files, const TargetFile& file, size_t index) {
    for (size_t other : sorted_) {
      int answer = ::fcntl(file.duplicate.get(), kFcntlDupfdQuery, files[other].duplicate.get());
      if (answer != 0) return static_cast<int>(other);  // -1: an older kernel; the two agree in all that can be seen
    }
    sorted_.push_back(index);
    return -1;
  }

  std::vector<size_t> sorted_;
};

}  // namespace

Result<std::vector<TargetFile>> walk_descriptors(const StoppedWorld& world, int proc) {
  std::vector<TargetFile> files;
  std::vector<int> numbers = VMCKPT_TRY(list_numbers(proc));
  raise_own_limit();
  Walk walk(world, proc);
  files.reserve(numbers.size());
  // Views into the strings of `files`, which does not grow beyond what is reserved.
  using Key = std::tuple<uint64_t, uint64_t, uint32_t, int64_t, std::string_view>;
  auto key_of = [](const TargetFile& file) {
    return Key(file.status.st_dev, file.status.st_ino, file.flags, file.position, after_flags(file.fdinfo));
  };
  std::map<Key, Lookalikes> seen;
  for (int number : numbers) {
    files.push_back(VMCKPT_TRY(walk.read_number(number)));
    TargetFile& file = files.back();
    int same = seen[key_of(file)].find_or_add(world.pid(), files, file, files.size() - 1);
    if (same < 0) continue;
    files[static_cast<size_t>(same)].numbers.push_back(file.numbers.front());
    files.pop_back();  // its key stays that of the first one
  }
  return files;
}

std::string_view fdinfo_field(std::string_view fdinfo, std::string_view name) {
  for (size_t start = 0; start < fdinfo.size();) {
    size_t end = std::min(fdinfo.find('\n', start), fdinfo.size());
    std::string_view line = fdinfo.substr(start, end - start);
    if (line.starts_with(name) && line.size() > name.size() && line[name.size()] == ':') {
      size_t value = line.find_first_not_of(" \t", name.size() + 1);
      return value == std::string_view::npos ? std::string_view() : line.substr(value);
    }
    start = end + 1;
  }
  return {};
}

std::vector<std::string_view> fdinfo_lines(std::string_view fdinfo, std::string_view prefix) {
  std::vector<std::string_view> lines;
  for (size_t start = 0; start < fdinfo.size();) {
    size_t end = std::min(fdinfo.find('\n', start), fdinfo.size());
    std::string_view line = fdinfo.substr(start, end - start);
    if (line.starts_with(prefix)) lines.push_back(line);
    start = end + 1;
  }
  return lines;
}

std::string_view word_after(std::string_view line, std::string_view key) {
  size_t found = line.find(key);
  if (found == std::string_view::npos) return {};
  size_t start = line.find_first_not_of(" \t", found + key.size());
  if (start == std::string_view::npos) return {};
  return line.substr(start, line.find_first_of(" \t\n", start) - start);
}

uint64_t parse_octal(std::string_view text) {
  uint64_t value = 0;
  std::from_chars(text.data(), text.data() + text.size(), value, 8);
  return value;
}

std::string TargetFile::describe() const { return fmt::format("descriptor {} (\"{}\")", lowest(), link); }

bool TargetFile::is_anonymous(std::string_view name) const {
  return std::string_view(link).starts_with("anon_inode:") && std::string_view(link).substr(11) == name;
}

}  // namespace vmckpt
