#include "supervisor/ended_targets.h"

#include <algorithm>
#include <cstring>
#include <ctime>
#include <filesystem>

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/fd.h"
#include "supervisor/control_socket.h"

namespace vmckpt {
namespace {

constexpr char kSuffix[] = ".ended";
constexpr int64_t kKeptS = 24 * 60 * 60;
constexpr size_t kMaxRecordBytes = 1 << 20;

Result<pb::EndedTarget> read_record(const std::string& path) {
  Fd fd = VMCKPT_TRY(open_file(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK));
  struct stat info {};
  // Its text ends up on a terminal: only what the caller's own supervisors wrote.
  if (::fstat(fd.get(), &info) != 0 || !S_ISREG(info.st_mode) || info.st_uid != ::geteuid()) return error(path + " is not yours");
  pb::EndedTarget target;
  if (!target.ParseFromString(VMCKPT_TRY(read_whole_fd(fd.get(), path, kMaxRecordBytes)))) return error(path + " cannot be read");
  VMCKPT_TRY(check_name(target.name()));
  return target;
}

std::string time_ago(int64_t seconds) {
  if (seconds < 60) return fmt::format("{} s", std::max<int64_t>(seconds, 0));
  if (seconds < 60 * 60) return fmt::format("{} min", seconds / 60);
  return fmt::format("{} h", seconds / (60 * 60));
}

}  // namespace

void remember_ended(const pb::EndedTarget& target) {
  auto directory = runtime_directory();
  if (!directory.ok()) return;
  const std::string path = *directory + "/" + target.name() + kSuffix;
  const std::string temporary = fmt::format("{}/.{}{}-{}", *directory, target.name(), kSuffix, ::getpid());
  std::string bytes = target.SerializeAsString();
  auto fd = open_file(temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW, 0600);
  if (!fd.ok()) return;
  if (!write_exactly(fd->get(), bytes.data(), bytes.size(), temporary).ok() || ::rename(temporary.c_str(), path.c_str()) != 0) {
    ::unlink(temporary.c_str());
  }
}

std::vector<pb::EndedTarget> list_ended() {
  std::vector<pb::EndedTarget> ended;
  auto directory = runtime_directory();
  if (!directory.ok()) return ended;
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(*directory, ignored)) {
    const std::string path = entry.path().string();
    if (!path.ends_with(kSuffix) || entry.path().filename().string().starts_with('.')) continue;
    auto target = read_record(path);
    if (!target.ok()) continue;
    if (target->ended_s() + kKeptS < std::time(nullptr)) {
      ::unlink(path.c_str());
    } else {
      ended.push_back(std::move(*target));
    }
  }
  std::sort(ended.begin(), ended.end(), [](const auto& a, const auto& b) { return a.ended_s() > b.ended_s(); });
  return ended;
}

std::string how_it_ended(const pb::EndedTarget& target) {
  const std::string ago = time_ago(std::time(nullptr) - target.ended_s());
  const int status = target.wait_status();
  if (!WIFSIGNALED(status)) return fmt::format("ended {} ago with status {}", ago, WEXITSTATUS(status));
  const bool with_namespace = target.namespace_ended_first() && WTERMSIG(status) == SIGKILL;
  return fmt::format("was killed by signal {} ({}) {} ago{}", WTERMSIG(status), ::strsignal(WTERMSIG(status)), ago,
                     with_namespace ? ", with its PID namespace, whose first process had ended" : "");
}

}  // namespace vmckpt
