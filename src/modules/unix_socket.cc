// Unix sockets: streams, datagrams and sequenced packets, bound to a path, to an abstract name or to nothing.
//
// Made by socket(2), socketpair(2) and accept(2); changed by bind, listen, connect, shutdown and all that sends and
// receives. Saved: type, addresses, backlog, what is shut down, options, the unread queue with message boundaries
// (socket_queue.cc), and which socket is at the other end: the kernel tells its inode through NETLINK_SOCK_DIAG.
//
//   listener                 bound and listening again; connections that wait in it are made again if the client is
//   inside
//   other end inside         rebuilt as a pair with unread data; through the listener if that is inside, so that the
//                            names are right; a pair whose listener is gone loses its names
//   other end closed         a pair whose other end is closed again; unread data first
//   other end outside        the same, and noted: the program reads what is left, then end of file, and writing gives
//                            EPIPE; at 0 to 2 restart's own stdio takes its place
//   datagrams to outside     connected again to the same name (/dev/log); noted if nobody is there
//   descriptors in a queue   refused (socket_queue.cc)
//
// A path is bound again: a socket file nobody uses is removed first, one in use is a problem that preflight reports.
// Paths that were given relative to a working directory of that time are known from the recorder, or tried against the
// present one. Restore: unix_socket_restore.cc. Sources: unix(7), sock_diag(7), net/unix/af_unix.c.
#include <algorithm>

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "modules/descriptor_module.h"
#include "modules/socket_options.h"
#include "modules/socket_queue.h"
#include "modules/unix_diag.h"
#include "modules/unix_socket.h"

namespace vmckpt {
namespace {

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

Result<void> save(SaveContext& context, const TargetFile& file, int fd, pb::OpenFile* saved) {
  pb::UnixSocket* socket = saved->mutable_unix_socket();
  socket->set_type(file.socket_type);
  socket->set_inode(file.status.st_ino);
  socket->set_listening(get_option(fd, SOL_SOCKET, SO_ACCEPTCONN) != 0);
  socket->set_local_address(read_address(fd, local_name));
  socket->set_peer_address(read_address(fd, peer_name));
  VMCKPT_TRY(save_socket_options(context, file, fd, socket->mutable_options()));
  if (!socket->listening()) VMCKPT_TRY(save_socket_queue(file, fd, socket->mutable_queue()));
  return {};
}

// The absolute path a socket is bound to, if it can be told, and whether that still is this socket.
Result<void> save_path(const SaveContext& context, const TargetFile& file, const UnixSocketFacts& facts,
                       pb::UnixSocket* socket) {
  std::string name = path_of(socket->local_address());
  if (name.empty()) return {};
  std::vector<std::string> candidates;
  if (name[0] == '/') candidates.push_back(name);
  else {
    const LedgerNote* note = context.find_ledger_note(NoteKind::kUnixBind, file, -1);
    if (note != nullptr) candidates.push_back(note->text);
    if (auto folder = read_link(fmt::format("/proc/{}/cwd", context.pid())); folder.ok())
      candidates.push_back(*folder + "/" + name);
  }
  for (const std::string& path : candidates) {
    struct stat there;
    if (::stat(path.c_str(), &there) != 0 || !S_ISSOCK(there.st_mode)) continue;
    // The kernel shows 32 bits of the inode number.
    if (facts.bound_inode != 0 && static_cast<uint32_t>(there.st_ino) != static_cast<uint32_t>(facts.bound_inode))
      continue;
    socket->set_bound_path(path);
    socket->set_path_exists(true);
    socket->set_path_mode(there.st_mode & 0777);
    return {};
  }
  if (candidates.empty()) {
    return error(fmt::format("{} is bound to the relative path \"{}\", and it is not known from which folder",
                             file.describe(), name),
                 "launch the program with vmckpt's recorder, or let it use an absolute path");
  }
  socket->set_bound_path(candidates.front());  // removed meanwhile; still a name that the program can see
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
    socket->set_peer_id(static_cast<uint32_t>(peer->id()));
    return;
  }
  uint32_t place = 0;
  if (const Listener* listener = is_connection ? find_waiting_at(listeners, socket->inode(), &place) : nullptr) {
    socket->set_peer(pb::PEER_INSIDE);
    socket->set_pending(true);
    socket->set_pending_order(place);
    socket->set_peer_id(static_cast<uint32_t>(listener->file->id()));
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
    if (!file.saved->has_unix_socket()) continue;
    if (sockets.empty()) diag = VMCKPT_TRY(UnixDiag::open());
    sockets.emplace_back(&file, VMCKPT_TRY(diag.ask(file.status.st_ino)));
    if (file.saved->unix_socket().listening()) listeners.push_back({&file, sockets.back().second});
  }
  for (const auto& [file, facts] : sockets) {
    pb::UnixSocket* socket = file->saved->mutable_unix_socket();
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
    note_lost_connections(context, listener, listener.file->saved->mutable_unix_socket());
  return {};
}

void check_path(CheckContext& context, const pb::OpenFile& file) {
  const pb::UnixSocket& socket = file.unix_socket();
  struct stat there;
  std::string folder = socket.bound_path().substr(0, socket.bound_path().rfind('/') + 1);
  if (::access(folder.c_str(), W_OK | X_OK) != 0) {
    context.problem(
        errno_error(fmt::format("socket \"{}\" ({}) cannot be made again", socket.bound_path(), describe(file)),
                    "make its folder, or permit writing there"));
    return;
  }
  if (::lstat(socket.bound_path().c_str(), &there) != 0) return;
  if (!S_ISSOCK(there.st_mode)) {
    context.problem(
        error(fmt::format("\"{}\" ({}) was a socket and is something else now", socket.bound_path(), describe(file)),
              "move it out of the way"));
  } else if (is_unix_path_in_use(socket.bound_path(), socket.type())) {
    context.problem(
        error(fmt::format("socket \"{}\" ({}) is in use by another process", socket.bound_path(), describe(file)),
              "end that process"));
  }
}

void check_abstract(CheckContext& context, const pb::OpenFile& file) {
  const pb::UnixSocket& socket = file.unix_socket();
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
  for (const pb::OpenFile& file : context.table.files()) {
    if (!file.has_unix_socket() || !is_bound_anew(file.unix_socket())) continue;
    if (file.unix_socket().bound_path().empty()) check_abstract(context, file);
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

bool is_unix_path_in_use(const std::string& path, int type) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  Fd folder;
  std::string name = path;
  if (name.size() >= sizeof address.sun_path) {  // was bound by a relative path; the folder's descriptor makes it short
    size_t slash = path.rfind('/');
    folder = Fd(::open(path.substr(0, slash + 1).c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
    name = fmt::format("/proc/self/fd/{}{}", folder.get(), path.substr(slash));
    if (name.size() >= sizeof address.sun_path) return true;
  }
  std::memcpy(address.sun_path, name.data(), name.size());
  // Connecting with another type never succeeds, so nobody at the other end notices: EPROTOTYPE means in use,
  // ECONNREFUSED that no socket is bound there any more (net/unix/af_unix.c, unix_find_bsd).
  Fd probe(::socket(AF_UNIX, (type == SOCK_DGRAM ? SOCK_STREAM : SOCK_DGRAM) | SOCK_CLOEXEC, 0));
  if (!probe) return true;
  return ::connect(probe.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0 || errno != ECONNREFUSED;
}

const DescriptorModule kUnixSocketModule{"Unix socket", recognise, save, save_links, check, restore_unix_sockets};

}  // namespace vmckpt
