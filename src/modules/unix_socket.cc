// Unix sockets: streams, datagrams and sequenced packets, bound to a path, to an abstract name or to nothing.
//
// Made by socket(2), socketpair(2) and accept(2); changed by bind, listen, connect, shutdown and all that sends and
// receives. Saved: type, addresses, backlog, what is shut down, options, the unread queue with message boundaries
// (socket_queue.cc), and which socket is at the other end: the kernel tells its inode through NETLINK_SOCK_DIAG.
//
//   listener                 bound and listening again; connections that wait in it are made again if the client is
//   inside
//   other end inside         rebuilt as a pair with unread data; through the listener, or another one with its name
//                            where that is gone, so that the names are right
//   other end closed         a pair whose other end is closed again; unread data first
//   other end outside        the same, and noted: the program reads what is left, then end of file, and writing gives
//                            EPIPE; at 0 to 2 restart's own stdio takes its place
//   datagrams to outside     connected again to the same name (/dev/log); noted if nobody is there
//   descriptors in a queue   refused (socket_queue.cc)
//
// A path is bound again, with the file's owner and mode: a socket file nobody uses is removed first, one in use is a
// problem that preflight reports. It is bound with the rights that the program had; root's own make a socket only in a folder
// that nobody but root can exchange (a daemon's in /run, made before it gave its rights up). A file that was renamed gets its new
// place again; where the file was gone, or its place taken, only the name comes back (unix_names.cc). Paths that were given
// relative to a working directory of that time are known from the recorder, or tried against the present one. Restore:
// unix_socket_restore.cc. Sources: unix(7), sock_diag(7), net/unix/af_unix.c.
#include <algorithm>
#include <memory>

#include <dirent.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "modules/descriptor_module.h"
#include "modules/socket_options.h"
#include "modules/socket_queue.h"
#include "modules/unix_diag.h"
#include "modules/unix_socket.h"
#include "modules/unix_socket.pb.h"

namespace vmckpt {
namespace {

constexpr unsigned long kSiocUnixFile = SIOCPROTOPRIVATE + 0;  // linux/un.h, which clashes with libc's sys/un.h

bool recognise(const TargetFile& file) {
  return file.socket_domain == AF_UNIX &&
         (file.socket_type == SOCK_STREAM || file.socket_type == SOCK_DGRAM || file.socket_type == SOCK_SEQPACKET);
}

std::string read_address(int fd, int (*ask)(int, sockaddr*, socklen_t*)) {
  sockaddr_un address{};
  socklen_t bytes = sizeof address;
  if (ask(fd, reinterpret_cast<sockaddr*>(&address), &bytes) != 0 || bytes <= sizeof(sa_family_t)) return {};
  return std::string(reinterpret_cast<char*>(&address), std::min<size_t>(bytes, sizeof address));
}

int local_name(int fd, sockaddr* address, socklen_t* bytes) { return ::getsockname(fd, address, bytes); }
int peer_name(int fd, sockaddr* address, socklen_t* bytes) { return ::getpeername(fd, address, bytes); }

// Whose socket others see (SO_PEERCRED): the ids that its maker, or that of the other end, had at that time.
void save_maker(const SaveContext& context, int fd, pb::UnixSocket* socket) {
  ucred maker{};
  socklen_t bytes = sizeof maker;
  if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &maker, &bytes) != 0 || maker.pid != context.pid()) return;
  pb::SocketOption* option = socket->add_options();
  option->set_level(SOL_SOCKET);
  option->set_name(SO_PEERCRED);
  maker.pid = 0;  // the target itself
  option->set_value(&maker, sizeof maker);
}

Result<void> save(SaveContext& context, const TargetFile& file, int fd, pb::OpenFile* saved) {
  pb::UnixSocket* socket = saved->MutableExtension(pb::unix_socket);
  socket->set_type(file.socket_type);
  socket->set_inode(file.status.st_ino);
  socket->set_listening(get_option(fd, SOL_SOCKET, SO_ACCEPTCONN) != 0);
  socket->set_local_address(read_address(fd, local_name));
  socket->set_peer_address(read_address(fd, peer_name));
  VMCKPT_TRY(save_socket_options(context, file, fd, socket->mutable_options()));
  save_maker(context, fd, socket);
  if (!socket->listening()) VMCKPT_TRY(save_socket_queue(file, fd, socket->mutable_queue()));
  return {};
}

// Where a socket file has been renamed to: root can ask, others look for it in its old folder. Empty: removed, or unknown.
std::string find_renamed_file(int fd, const std::string& old_path, uint64_t inode) {
  constexpr int kMostNames = 10'000;
  if (Fd file(::ioctl(fd, kSiocUnixFile)); file) {
    auto path = read_link(fmt::format("/proc/self/fd/{}", file.get()));
    return path.ok() ? *path : std::string();
  }
  std::string folder = old_path.substr(0, old_path.rfind('/') + 1);
  std::unique_ptr<DIR, int (*)(DIR*)> directory(::opendir(folder.c_str()), ::closedir);
  if (!directory) return {};
  for (int names = 0; names < kMostNames; ++names) {
    const dirent* entry = ::readdir(directory.get());
    if (entry == nullptr) break;
    if (static_cast<uint32_t>(entry->d_ino) == static_cast<uint32_t>(inode)) return folder + entry->d_name;
  }
  return {};
}

// Whether the socket's file is at `path`. Its owner and mode are saved then.
bool save_file(const std::string& path, const UnixSocketFacts& facts, pb::UnixSocket* socket) {
  struct stat there;
  if (path.empty() || ::lstat(path.c_str(), &there) != 0 || !S_ISSOCK(there.st_mode)) return false;
  // The kernel shows 32 bits of the inode number.
  if (facts.bound_inode != 0 && static_cast<uint32_t>(there.st_ino) != static_cast<uint32_t>(facts.bound_inode)) return false;
  socket->set_path_exists(true);
  socket->set_path_mode(there.st_mode & 07777);
  socket->set_path_owner(there.st_uid);
  socket->set_path_group(there.st_gid);
  return true;
}

// The absolute path a socket is bound to, if it can be told, and where its file is.
Result<void> save_path(const SaveContext& context, const TargetFile& file, const UnixSocketFacts& facts,
                       pb::UnixSocket* socket) {
  std::string name = path_of(socket->local_address());
  if (name.empty()) return {};
  std::vector<std::string> candidates;
  if (name[0] == '/') candidates.push_back(name);
  else {
    const LedgerNote* note = context.find_ledger_note(NoteKind::kUnixBind, file, 0);
    if (note != nullptr && note->text[0] == '/') candidates.push_back(note->text);
    if (auto folder = read_link(fmt::format("/proc/{}/cwd", context.pid())); folder.ok())
      candidates.push_back(*folder + "/" + name);
  }
  for (const std::string& path : candidates) {
    if (!save_file(path, facts, socket)) continue;
    socket->set_bound_path(path);
    return {};
  }
  if (candidates.empty()) {
    return error(fmt::format("{} is bound to the relative path \"{}\", and it is not known from which directory",
                             file.describe(), name),
                 "let the program use an absolute path");
  }
  socket->set_bound_path(candidates.front());  // removed or renamed meanwhile; still a name that the program can see
  bool has_own_name = socket->listening() || socket->type() == SOCK_DGRAM || !facts.has_peer;
  if (!has_own_name || facts.bound_inode == 0) return {};
  std::string renamed = find_renamed_file(file.duplicate.get(), candidates.front(), facts.bound_inode);
  if (save_file(renamed, facts, socket)) socket->set_file_path(renamed);
  return {};
}

struct Listener {
  const TargetFile* file;
  UnixSocketFacts facts;
};

// Where `inode` waits to be accepted, if it is at a listener inside. Returns its place in that queue.
const Listener* find_waiting_at(const std::vector<Listener>& listeners, uint64_t inode, uint32_t* place) {
  for (const Listener& listener : listeners) {
    auto found = std::find(listener.facts.pending.begin(), listener.facts.pending.end(), inode);
    if (found == listener.facts.pending.end()) continue;
    *place = static_cast<uint32_t>(found - listener.facts.pending.begin());
    return &listener;
  }
  return nullptr;
}

void note_outside(SaveContext& context, const TargetFile& file, const pb::UnixSocket& socket) {
  std::string name = path_of(socket.peer_address());
  std::string to = name.empty() ? std::string("another process") : fmt::format("\"{}\"", name);
  if (socket.type() == SOCK_DGRAM && !socket.peer_address().empty()) return;  // connected again
  context.note(
      fmt::format("{} is connected to {} outside; after a restart that connection is closed", file.describe(), to));
}

void save_peer(SaveContext& context, const TargetFile& file, const UnixSocketFacts& facts,
               const std::vector<Listener>& listeners, pb::UnixSocket* socket) {
  bool is_connection = socket->type() != SOCK_DGRAM;
  if (!facts.has_peer) {
    socket->set_peer(pb::PEER_NONE);
    return;
  }
  if (const TargetFile* peer = facts.peer_inode != 0 ? context.find_socket(facts.peer_inode) : nullptr) {
    socket->set_peer(pb::PEER_INSIDE);
    socket->set_peer_id(peer->file_id());
    return;
  }
  uint32_t place = 0;
  if (const Listener* listener = is_connection ? find_waiting_at(listeners, socket->inode(), &place) : nullptr) {
    socket->set_peer(pb::PEER_INSIDE);
    socket->set_pending(true);
    socket->set_pending_order(place);
    socket->set_peer_id(listener->file->file_id());
    return;
  }
  constexpr uint32_t kBothWays = 3;
  if (facts.peer_inode == 0 && (!is_connection || facts.shutdown == kBothWays)) {
    socket->set_peer(pb::PEER_CLOSED);
    return;
  }
  socket->set_peer(file.stdio() >= 0 ? pb::PEER_STDIO : pb::PEER_OUTSIDE);
  if (socket->peer() == pb::PEER_OUTSIDE) note_outside(context, file, *socket);
}

// What a client inside has sent to a listener inside waits in a socket that no number leads to.
Result<void> refuse_unreadable(const TargetFile& file, const pb::UnixSocket& socket, int fd) {
  if (!socket.pending()) return {};
  int unsent = 0;
  if (::ioctl(fd, kSiocOutq, &unsent) != 0 || unsent == 0) return {};
  return error(file.describe() + " has sent data over a connection that the program has not accepted yet",
               "checkpoint again when it has");
}

void note_lost_connections(SaveContext& context, const Listener& listener, pb::UnixSocket* socket) {
  for (uint64_t inode : listener.facts.pending) {
    if (inode == 0 || context.find_socket(inode) == nullptr)
      socket->set_pending_connections(socket->pending_connections() + 1);
  }
  if (socket->pending_connections() == 0) return;
  context.note(
      fmt::format("{} has {} connections from outside that the program has not accepted; a restart closes them",
                  listener.file->describe(), socket->pending_connections()));
}

Result<void> save_links(SaveContext& context) {
  std::vector<std::pair<const TargetFile*, UnixSocketFacts>> sockets;
  std::vector<Listener> listeners;
  UnixDiag diag;
  for (const TargetFile& file : context.files) {
    if (!file.saved->HasExtension(pb::unix_socket)) continue;
    if (sockets.empty()) diag = VMCKPT_TRY(UnixDiag::open());
    sockets.emplace_back(&file, VMCKPT_TRY(diag.ask(file.status.st_ino)));
    if (unix_state(*file.saved).listening()) listeners.push_back({&file, sockets.back().second});
  }
  for (const auto& [file, facts] : sockets) {
    pb::UnixSocket* socket = file->saved->MutableExtension(pb::unix_socket);
    VMCKPT_TRY(save_path(context, *file, facts, socket));
    socket->set_shutdown(facts.shutdown);
    if (socket->listening()) {
      socket->set_backlog(facts.backlog);
      continue;
    }
    save_peer(context, *file, facts, listeners, socket);
    VMCKPT_TRY(refuse_unreadable(*file, *socket, file->duplicate.get()));
  }
  for (const Listener& listener : listeners)
    note_lost_connections(context, listener, listener.file->saved->MutableExtension(pb::unix_socket));
  return {};
}

void check_path(CheckContext& context, const pb::OpenFile& file) {
  const pb::UnixSocket& socket = unix_state(file);
  const std::string& path = file_path_of(socket);
  struct stat there;
  if (!socket.path_exists()) return;  // only a name: what is there now is somebody else's
  std::string folder = path.substr(0, path.rfind('/') + 1);
  auto write_there = [&] { return ::faccessat(AT_FDCWD, folder.c_str(), W_OK | X_OK, AT_EACCESS); };
  bool permitted = context.access.as_target(write_there) == 0 ||
                   (context.access.is_foreign() && is_roots_alone(folder) && write_there() == 0);
  if (!permitted) {
    context.problem(
        errno_error(fmt::format("socket \"{}\" ({}) cannot be made again", path, describe(file)),
                    "make its directory, or permit writing there"));
    return;
  }
  if (::lstat(path.c_str(), &there) != 0) return;
  if (!S_ISSOCK(there.st_mode)) {
    context.problem(
        error(fmt::format("\"{}\" ({}) was a socket and is something else now", path, describe(file)),
              "move it out of the way"));
  } else if (is_unix_path_in_use(path, socket.type())) {
    context.problem(
        error(fmt::format("socket \"{}\" ({}) is in use by another process", path, describe(file)),
              "end that process"));
  }
}

void check_abstract(CheckContext& context, const pb::OpenFile& file) {
  const pb::UnixSocket& socket = unix_state(file);
  Fd probe(::socket(AF_UNIX, socket.type() | SOCK_CLOEXEC, 0));
  const std::string& address = socket.local_address();
  if (!probe || ::bind(probe.get(), reinterpret_cast<const sockaddr*>(address.data()),
                       static_cast<socklen_t>(address.size())) == 0) {
    return;
  }
  context.problem(errno_error(fmt::format("abstract socket \"@{}\" ({}) cannot be made again",
                                          address.substr(sizeof(sa_family_t) + 1), describe(file)),
                              "end the process that uses it"));
}

void check(CheckContext& context) {
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (!file.HasExtension(pb::unix_socket) || !is_bound_anew(unix_state(file))) continue;
    if (unix_state(file).bound_path().empty()) check_abstract(context, file);
    else check_path(context, file);
  }
}

}  // namespace

std::string path_of(const std::string& address) {
  if (address.size() <= sizeof(sa_family_t) || address[sizeof(sa_family_t)] == '\0') return {};
  return address.c_str() + sizeof(sa_family_t);
}

bool is_bound_anew(const pb::UnixSocket& socket) {
  if (socket.local_address().empty()) return false;
  if (socket.listening() || socket.type() == SOCK_DGRAM) return true;
  return socket.peer() == pb::PEER_NONE;  // a connection has its name from the listener
}

const std::string& file_path_of(const pb::UnixSocket& socket) {
  return socket.file_path().empty() ? socket.bound_path() : socket.file_path();
}

bool is_unix_path_in_use(const std::string& path, int type) {
  PathAddress address(path);
  std::string bytes = address.bytes();
  // Connecting with another type never succeeds, so nobody at the other end notices: EPROTOTYPE means in use,
  // ECONNREFUSED that no socket is bound there any more (net/unix/af_unix.c, unix_find_bsd).
  Fd probe(::socket(AF_UNIX, (type == SOCK_DGRAM ? SOCK_STREAM : SOCK_DGRAM) | SOCK_CLOEXEC, 0));
  if (!probe) return true;
  return ::connect(probe.get(), reinterpret_cast<const sockaddr*>(bytes.data()), static_cast<socklen_t>(bytes.size())) == 0 ||
         errno != ECONNREFUSED;
}

const DescriptorModule kUnixSocketModule{"Unix socket", recognise, save, save_links, check, restore_unix_sockets};

}  // namespace vmckpt
