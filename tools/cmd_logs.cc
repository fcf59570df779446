// vmckpt logs: what a detached target, running or ended, has said.
#include <cstdio>
#include <filesystem>

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "command_line.h"
#include "commands.h"
#include "core/printable.h"
#include "supervisor/control_socket.h"
#include "supervisor/ended_targets.h"

namespace vmckpt {

namespace po = boost::program_options;

namespace {

constexpr Verb kVerb = {"logs", "[NAME]",
                        "Prints the output of a detached target that is running or has ended within the last day."};
constexpr int kLookAgainMs = 200;

struct Log {
  std::string path;
  Fd connection;  // closed by the supervisor when the target has ended; none: it has ended
  uid_t owner;    // whose the log is: the supervisor's user
};

// A supervisor of another user may name any file: only a regular one of that user's own is read.
Result<Fd> open_log_of(const Log& log) {
  Fd place = VMCKPT_TRY(open_file(log.path, O_PATH | O_NOFOLLOW));
  struct stat info {};
  if (::fstat(place.get(), &info) != 0 || !S_ISREG(info.st_mode) || info.st_uid != log.owner) {
    return error(printable(log.path) + " is not a log of the target's user");
  }
  return open_file(fmt::format("/proc/self/fd/{}", place.get()), O_RDONLY | O_NONBLOCK);
}

uid_t user_behind(int connection) {
  ucred peer{};
  socklen_t bytes = sizeof peer;
  return ::getsockopt(connection, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) == 0 ? peer.uid : ::geteuid();
}

// The running target of that name, else the latest that has ended. Empty: the only one running, else the latest ended.
Result<Log> find_log(const std::string& name) {
  auto choose = [](const std::string& target, const std::string& path, Fd connection) -> Result<Log> {
    if (path.empty()) return error(fmt::format("target \"{}\" has no log: what it says goes where its caller wanted it", target));
    const uid_t owner = connection ? user_behind(connection.get()) : ::geteuid();
    return Log{path, std::move(connection), owner};
  };
  std::vector<std::pair<std::string, pb::Status>> running;
  for (const std::string& socket : list_sockets()) {
    auto status = ask_status(socket);
    if (status.ok() && (name.empty() || name == status->name())) running.emplace_back(socket, std::move(*status));
  }
  // One's own before another user's.
  if (running.size() > 1) {
    auto own = runtime_directory();
    std::erase_if(running, [&](const auto& entry) {
      return own.ok() && std::filesystem::path(entry.first).parent_path() != std::filesystem::path(*own);
    });
  }
  if (running.size() > 1) return error("several targets are running", "name one of them");
  if (running.size() == 1)
    return choose(running[0].second.name(), running[0].second.log(), VMCKPT_TRY(connect_to(running[0].first)));
  for (const pb::EndedTarget& ended : list_ended()) {
    if (name.empty() || name == ended.name()) return choose(ended.name(), ended.log(), Fd());
  }
  return error(name.empty() ? "there is no target" : fmt::format("there is no target \"{}\"", name),
               "`vmckpt list` shows those there are");
}

// On a terminal what would steer it is shown as \xNN; otherwise the log is printed as it is.
Result<void> print_rest(int file, const std::string& path) {
  const bool on_terminal = ::isatty(1);
  for (char text[64 << 10];;) {
    const ssize_t got = ::read(file, text, sizeof text);
    if (got == 0) return {};
    if (got < 0) return errno_error("read " + path);
    std::string shown(text, static_cast<size_t>(got));
    if (on_terminal) {
      std::erase(shown, '\r');
      shown = printable_lines(shown);
    }
    VMCKPT_TRY(write_exactly(1, shown.data(), shown.size(), "standard output"));
  }
}

Result<void> print(const Log& log, bool follow) {
  Fd file = VMCKPT_TRY(open_log_of(log));
  for (;;) {
    // Looked at first: what was said before the end is printed.
    pollfd poll{log.connection.get(), POLLIN, 0};
    const bool ended = !log.connection || ::poll(&poll, 1, 0) > 0;
    VMCKPT_TRY(print_rest(file.get(), log.path));
    if (!follow || ended) return {};
    (void)::poll(&poll, 1, kLookAgainMs);
    // A log that grew too long has been replaced by a new one.
    struct stat here {}, there {};
    if (::fstat(file.get(), &here) == 0 && ::stat(log.path.c_str(), &there) == 0 && here.st_ino != there.st_ino) {
      VMCKPT_TRY(print_rest(file.get(), log.path));
      file = VMCKPT_TRY(open_log_of(log));
    }
  }
}

}  // namespace

int cmd_logs(int argc, char** argv) {
  po::options_description options("options");
  options.add_options()("follow,f", "continue to print output as it is written, until the target has ended");
  po::variables_map values;
  if (auto status = parse_command_line(argc, argv, kVerb, options, {"TARGET?"}, values)) return *status;
  auto log = find_log(values.count("TARGET") ? values["TARGET"].as<std::string>() : "");
  if (!log.ok()) return fail(kVerb, log.error());
  auto printed = print(*log, values.count("follow") != 0);
  return printed.ok() ? kExitOk : fail(kVerb, printed.error());
}

}  // namespace vmckpt
