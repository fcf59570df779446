#include "supervisor/control_socket.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>

#include <fcntl.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "core/printable.h"
#include "core/proc.h"
#include "modules/host.h"
#include "supervisor/ended_targets.h"

namespace vmckpt {
namespace {

constexpr char kSuffix[] = ".sock";
constexpr size_t kMaxNameBytes = 100;

Result<sockaddr_un> address_of(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) {
    return error(fmt::format("the socket path {} is longer than {} bytes", path, sizeof address.sun_path - 1),
                 "use a shorter name, or set VMCKPT_RUNTIME_DIR to a shorter path");
  }
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  return address;
}

std::string directory_path() {
  if (const char* own = std::getenv("VMCKPT_RUNTIME_DIR"); own != nullptr && *own != '\0') return own;
  if (const char* xdg = std::getenv("XDG_RUNTIME_DIR"); xdg != nullptr && *xdg == '/') {
    // su and sudo leave another user's here, and a service may have none behind it.
    struct stat info {};
    if (::stat(xdg, &info) == 0 && S_ISDIR(info.st_mode) && info.st_uid == ::geteuid() && ::access(xdg, W_OK) == 0)
      return std::string(xdg) + "/vmckpt";
  }
  return fmt::format("/tmp/vmckpt-{}", ::geteuid());
}

pid_t supervisor_behind(int fd) {
  ucred peer{};
  socklen_t bytes = sizeof peer;
  return ::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) == 0 ? peer.pid : 0;
}

// The supervisor behind a connection if it is stopped, as Ctrl-Z stops the job that it is: then it cannot answer. Otherwise 0.
pid_t stopped_supervisor(int fd) {
  const pid_t supervisor = supervisor_behind(fd);
  auto fields = read_status(supervisor);
  return fields.ok() && status_field(*fields, "State").starts_with("T") ? supervisor : 0;
}

// Processes in the order of their start: the copy of a snapshot comes after the target.
std::vector<pid_t> eldest_first(std::vector<pid_t> pids) {
  constexpr size_t kStartTime = 19;
  std::map<pid_t, int64_t> starts;
  for (pid_t pid : pids) {
    auto stat = read_stat(pid);
    starts[pid] = stat.ok() && stat->size() > kStartTime ? parse_number((*stat)[kStartTime]) : 0;
  }
  std::stable_sort(pids.begin(), pids.end(), [&](pid_t a, pid_t b) { return starts[a] < starts[b]; });
  return pids;
}

// What /proc tells of a target whose supervisor does not answer: it is stopped, or in the midst of a freeze.
pb::Status status_from_outside(const std::string& socket_path, pid_t supervisor, const char* state) {
  pb::Status status;
  status.set_name(std::filesystem::path(socket_path).stem().string());
  status.set_supervisor_pid(supervisor);
  status.set_state(state);
  uint32_t processes = 0;
  auto descendants = list_descendants(supervisor);
  if (!descendants.ok()) return status;
  for (pid_t pid : eldest_first(*descendants)) {
    if (command_of(pid) == kNamespaceInitName || !process_exists(pid)) continue;
    if (processes++ != 0) continue;
    status.set_pid(pid);
    if (auto command = read_whole_file(fmt::format("/proc/{}/cmdline", pid)); command.ok()) {
      for (const std::string& word : split_nul(*command)) status.add_command(word);
    }
  }
  status.set_processes(processes);
  return status;
}

// Whoever takes, replaces or removes a name holds it: two launches of one name must not unlink each other's socket.
Result<Fd> lock_directory(const std::string& directory) {
  Fd fd = VMCKPT_TRY(open_file(directory, O_RDONLY | O_DIRECTORY));
  while (::flock(fd.get(), LOCK_EX) != 0) {
    if (errno != EINTR) return errno_error("lock " + directory);
  }
  return fd;
}

bool answers(const std::string& path) { return connect_to(path).ok(); }

// Folders where targets of this caller may be: his own, and for root everybody's.
std::vector<std::string> directories_to_search() {
  std::vector<std::string> directories = {directory_path()};
  if (::geteuid() != 0 || std::getenv("VMCKPT_RUNTIME_DIR") != nullptr) return directories;
  std::error_code ignored;
  // Anybody can make a folder of any name there, or a link: only one that its user, and nobody else, could have filled.
  auto is_private = [](const std::string& path, struct stat* info) {
    return ::lstat(path.c_str(), info) == 0 && S_ISDIR(info->st_mode) && (info->st_mode & 077) == 0;
  };
  struct stat info {};
  for (const auto& entry : std::filesystem::directory_iterator("/run/user", ignored)) {
    const std::string path = entry.path().string() + "/vmckpt";
    if (is_private(path, &info)) directories.push_back(path);
  }
  for (const auto& entry : std::filesystem::directory_iterator("/tmp", ignored)) {
    if (!is_private(entry.path().string(), &info)) continue;
    if (entry.path().filename() == fmt::format("vmckpt-{}", info.st_uid)) directories.push_back(entry.path().string());
  }
  return directories;
}

}  // namespace

Result<std::string> runtime_directory() {
  std::string path = directory_path();
  if (::mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
    return errno_error("make the directory for control sockets, " + path, "set VMCKPT_RUNTIME_DIR to a directory of yours");
  }
  struct stat info {};
  if (::lstat(path.c_str(), &info) != 0) return errno_error("examine " + path);
  if (!S_ISDIR(info.st_mode) || info.st_uid != ::geteuid() || (info.st_mode & 077) != 0) {
    return error(fmt::format("{} is not a private directory of yours", path),
                 fmt::format("chmod 700 it if it is yours, or set VMCKPT_RUNTIME_DIR"));
  }
  return path;
}

Result<void> check_name(const std::string& name) {
  auto allowed = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' || c == '-';
  };
  if (!name.empty() && name.size() <= kMaxNameBytes && name[0] != '.' && std::all_of(name.begin(), name.end(), allowed))
    return {};
  return error(fmt::format("\"{}\" cannot be a target's name", name),
               "use letters, digits, '.', '_' and '-', at most 100 of them, not starting with '.'");
}

std::string free_name(const std::string& directory, const std::string& command) {
  std::string base = std::filesystem::path(command).filename().string();
  for (char& c : base) {
    if (!check_name(std::string("x") + c).ok()) c = '_';
  }
  if (base.empty() || base[0] == '.') base = "target" + base;
  base.resize(std::min<size_t>(base.size(), kMaxNameBytes - 8));
  std::string name = base;
  for (int number = 2; answers(directory + "/" + name + kSuffix); ++number) name = fmt::format("{}-{}", base, number);
  return name;
}

Result<ControlListener> ControlListener::create(const std::string& name) {
  VMCKPT_TRY(check_name(name));
  const std::string directory = VMCKPT_TRY(runtime_directory());
  const std::string path = directory + "/" + name + kSuffix;
  VMCKPT_TRY(address_of(path));
  const Fd lock = VMCKPT_TRY(lock_directory(directory));
  if (answers(path)) return error(fmt::format("a target named \"{}\" is running", name), "give another name with -n");
  // A name that can be seen always listens: one that does not was left by a supervisor that was killed, and is replaced.
  const std::string temporary = fmt::format("{}/.{}", directory, ::getpid());
  sockaddr_un address = VMCKPT_TRY(address_of(temporary));
  ::unlink(temporary.c_str());
  ControlListener listener;
  listener.fd_ = Fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!listener.fd_) return errno_error("make the control socket");
  if (::bind(listener.fd_.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) != 0 ||
      ::chmod(temporary.c_str(), 0600) != 0 || ::listen(listener.fd_.get(), 16) != 0 ||
      ::rename(temporary.c_str(), path.c_str()) != 0) {
    Error problem = errno_error("listen on " + path);
    ::unlink(temporary.c_str());
    return problem;
  }
  listener.path_ = path;
  listener.owner_ = ::getpid();
  return listener;
}

void remove_if_stale(const std::string& socket_path) {
  // Only in a folder of one's own: whoever owns it may hold its lock, or lead its names elsewhere.
  struct stat folder {};
  const std::string directory = std::filesystem::path(socket_path).parent_path().string();
  if (::lstat(directory.c_str(), &folder) != 0 || !S_ISDIR(folder.st_mode) || folder.st_uid != ::geteuid() ||
      (folder.st_mode & 077) != 0)
    return;
  auto lock = lock_directory(std::filesystem::path(socket_path).parent_path().string());
  struct stat info {};
  if (!lock.ok() || ::lstat(socket_path.c_str(), &info) != 0 || !S_ISSOCK(info.st_mode) || info.st_uid != ::geteuid()) return;
  auto connection = connect_to(socket_path);
  if (!connection.ok() && connection.error().err == ECONNREFUSED) ::unlink(socket_path.c_str());
}

ControlListener::ControlListener(ControlListener&& other) noexcept
    : path_(std::exchange(other.path_, {})), owner_(other.owner_), fd_(std::move(other.fd_)) {}

ControlListener::~ControlListener() { close(); }

void ControlListener::close() {
  if (!path_.empty() && owner_ == ::getpid()) ::unlink(path_.c_str());
  path_.clear();
  fd_.reset();
}

Result<Fd> ControlListener::accept() const {
  Fd client(::accept4(fd_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (!client) return errno_error("accept a control connection");
  ucred peer{};
  socklen_t bytes = sizeof peer;
  if (::getsockopt(client.get(), SOL_SOCKET, SO_PEERCRED, &peer, &bytes) != 0) return errno_error("ask who connected");
  if (peer.uid != ::geteuid() && peer.uid != 0) {
    pb::ControlReply reply;
    reply.set_error("this target belongs to another user");
    (void)send_reply(client.get(), reply);
    return error(fmt::format("user {} may not control this target", peer.uid));
  }
  return client;
}

Result<void> send_reply(int fd, const pb::ControlReply& reply) {
  std::string bytes = reply.SerializeAsString();
  // Never waits: a client that does not read loses its answer, not the supervisor's time.
  if (::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT) < 0) return errno_error("answer a control request");
  return {};
}

Result<Fd> connect_to(const std::string& socket_path) {
  sockaddr_un address = VMCKPT_TRY(address_of(socket_path));
  Fd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (!fd) return errno_error("make a socket");
  // A supervisor that does not take connections, another user's perhaps, must not keep us waiting for ever.
  timeval limit{1, 0};
  (void)::setsockopt(fd.get(), SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
  if (::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) != 0)
    return errno_error("connect to " + socket_path);
  limit = {};
  (void)::setsockopt(fd.get(), SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
  return fd;
}

std::vector<std::string> list_sockets() {
  std::vector<std::string> sockets;
  for (const std::string& directory : directories_to_search()) {
    std::error_code ignored;
    for (const auto& entry : std::filesystem::directory_iterator(directory, ignored)) {
      // In another user's folder a name may be anything, and is shown.
      if (entry.path().string().ends_with(kSuffix) && check_name(entry.path().stem().string()).ok())
        sockets.push_back(entry.path().string());
    }
  }
  std::sort(sockets.begin(), sockets.end());
  sockets.erase(std::unique(sockets.begin(), sockets.end()), sockets.end());  // own folder is among everybody's
  return sockets;
}

Result<void> send_request(int fd, const pb::ControlRequest& request) {
  std::string bytes = request.SerializeAsString();
  if (::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL) < 0) return errno_error("send a request to the supervisor");
  return {};
}

Result<pb::ControlReply> receive_reply(int fd) {
  std::string bytes(kMaxControlBytes, '\0');
  ssize_t got;
  do got = ::recv(fd, bytes.data(), bytes.size(), 0);
  while (got < 0 && errno == EINTR);
  if (got < 0) return errno_error("hear from the supervisor");
  if (got == 0) return error("the supervisor ended before it answered");
  pb::ControlReply reply;
  if (!reply.ParseFromArray(bytes.data(), static_cast<int>(got))) return error("the supervisor's answer cannot be read");
  return reply;
}

Result<pb::Status> ask_status(const std::string& socket_path) {
  Fd fd = VMCKPT_TRY(connect_to(socket_path));
  if (pid_t supervisor = stopped_supervisor(fd.get()); supervisor > 0)
    return status_from_outside(socket_path, supervisor, "stopped");
  // It does not answer while it freezes its target, which may take as long as --freeze-timeout.
  timeval limit{1, 0};
  (void)::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  pb::ControlRequest request;
  request.mutable_status();
  VMCKPT_TRY(send_request(fd.get(), request));
  auto answer = receive_reply(fd.get());
  if (!answer.ok() && answer.error().err == EAGAIN) {
    return status_from_outside(socket_path, supervisor_behind(fd.get()), "checkpointing");
  }
  if (!answer.ok()) return answer.error();
  const pb::ControlReply& reply = *answer;
  if (reply.has_error()) return error(printable(reply.error()));
  // Another user's supervisor may say anything; who it is the kernel says.
  pb::Status status = reply.status();
  if (status.name() != std::filesystem::path(socket_path).stem().string())
    return error("the supervisor behind " + socket_path + " gives another name");
  if (const pid_t supervisor = supervisor_behind(fd.get()); supervisor > 0) status.set_supervisor_pid(supervisor);
  return status;
}

Result<Fd> find_target(const std::string& name_or_pid) {
  std::vector<std::string> matches, matches_of_others;
  std::string names;
  for (const std::string& socket : list_sockets()) {
    auto status = ask_status(socket);
    if (!status.ok()) continue;
    names += (names.empty() ? "" : ", ") + status->name();
    bool by_pid = name_or_pid == std::to_string(status->pid()) || name_or_pid == std::to_string(status->supervisor_pid());
    const bool own = std::filesystem::path(socket).parent_path() == std::filesystem::path(directory_path());
    if (name_or_pid.empty() || name_or_pid == status->name() || by_pid) (own ? matches : matches_of_others).push_back(socket);
  }
  // Root's own come first: nobody else's can take their names.
  if (matches.empty()) matches = std::move(matches_of_others);
  if (matches.size() == 1) {
    Fd fd = VMCKPT_TRY(connect_to(matches.front()));
    if (stopped_supervisor(fd.get()) == 0) return fd;
    return error(fmt::format("the job of target \"{}\" is stopped", std::filesystem::path(matches.front()).stem().string()),
                 "continue it first, with `fg` or `bg` in its shell");
  }
  if (matches.size() > 1) return error("several targets are running: " + names, "name one of them");
  for (const pb::EndedTarget& ended : list_ended()) {
    if (name_or_pid != ended.name() && !(name_or_pid.empty() && names.empty())) continue;
    std::string cure = ended.last_image().empty() ? "it had made no image" : "restart it from " + printable(ended.last_image());
    if (!ended.log().empty()) cure += "; `vmckpt logs " + ended.name() + "` shows what it said";
    return error(fmt::format("target \"{}\" {}", ended.name(), how_it_ended(ended)), cure);
  }
  if (name_or_pid.empty()) return error("no target is running", "start one with `vmckpt launch`");
  std::string known = names.empty() ? "none is running" : "running: " + names;
  return error(fmt::format("no target \"{}\" ({})", printable(name_or_pid), known),
               "if its supervisor was killed it runs on, but can no longer be checkpointed");
}

}  // namespace vmckpt
