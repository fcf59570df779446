// Restore of Unix sockets. The order, and why:
//
//   1. sockets with a name of their own, bound; listeners listen    connections need them
//   2. connections within the process                              while no stranger's connection can be in between:
//                                                                  bind, connect and accept follow one another
//   3. connections that wait to be accepted, in their order        after 2, which accepts
//   4. ends whose other end is closed or outside
//   5. queues filled                                                from the other end, while nothing is shut down
//   6. datagram sockets connected                                   after 5: from then on they only take what their
//                                                                   peer sends, who may be outside
//   7. what was shut down or closed, shut down and closed; remaining options
#include <algorithm>
#include <optional>

#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "modules/descriptor_module.h"
#include "modules/socket_options.h"
#include "modules/unix_diag.h"
#include "modules/unix_socket.h"
#include "modules/unix_socket.pb.h"

namespace vmckpt {
namespace {

constexpr uint32_t kNoMoreReading = 1, kNoMoreWriting = 2;

// Makes the send buffer large enough for a while: what is put back at once had been sent bit by bit.
class RoomToSend {
 public:
  RoomToSend(int fd, size_t bytes) : fd_(fd), before_(get_option(fd, SOL_SOCKET, SO_SNDBUF)) {
    int wanted = static_cast<int>(std::min<size_t>(bytes * 2 + 4096, size_t{1} << 30));
    if (before_ < wanted) set(wanted);
    else before_ = 0;
  }
  ~RoomToSend() {
    if (before_ != 0) set(before_ / 2);  // the kernel doubles it
  }
  RoomToSend(const RoomToSend&) = delete;
  RoomToSend& operator=(const RoomToSend&) = delete;

 private:
  void set(int bytes) { ::setsockopt(fd_, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes); }

  int fd_;
  int before_;
};

// While it exists this thread has the effective ids that others shall see (SO_PEERCRED) as those of a socket's maker: the kernel
// notes them at listen, connect and socketpair. Only a caller who may choose his ids can have others.
class MakerIds {
 public:
  explicit MakerIds(const pb::UnixSocket& socket) {
    for (const pb::SocketOption& option : socket.options()) {
      if (option.level() != SOL_SOCKET || option.name() != SO_PEERCRED || option.value().size() != sizeof(ucred)) continue;
      ucred maker{};
      std::memcpy(&maker, option.value().data(), sizeof maker);
      take(maker);
    }
  }
  ~MakerIds() {
    if (!taken_) return;
    ::syscall(SYS_setresuid, -1, uid_, -1);
    ::syscall(SYS_setresgid, -1, gid_, -1);
    ::prctl(PR_SET_DUMPABLE, dumpable_);
    ::prctl(PR_SET_PDEATHSIG, death_signal_);
  }
  MakerIds(const MakerIds&) = delete;
  MakerIds& operator=(const MakerIds&) = delete;

 private:
  void take(const ucred& maker) {
    if (uid_ != 0 || (maker.uid == uid_ && maker.gid == gid_)) return;
    dumpable_ = ::prctl(PR_GET_DUMPABLE);
    ::prctl(PR_GET_PDEATHSIG, &death_signal_);
    taken_ = ::syscall(SYS_setresgid, -1, maker.gid, -1) == 0 && ::syscall(SYS_setresuid, -1, maker.uid, -1) == 0;
    if (!taken_) ::syscall(SYS_setresgid, -1, gid_, -1);
  }

  uid_t uid_ = ::geteuid();
  gid_t gid_ = ::getegid();
  int dumpable_ = 1, death_signal_ = 0;
  bool taken_ = false;
};

class UnixRestore {
 public:
  explicit UnixRestore(RestoreContext& context) : context_(context) {
    for (const pb::OpenFile& file : context.image.open_files()) {
      if (file.HasExtension(pb::unix_socket)) files_.push_back(&file);
    }
  }

  Result<void> run() {
    for (const pb::OpenFile* file : files_) {
      if (is_bound_anew(unix_state(*file))) VMCKPT_TRY(make_bound(*file));
    }
    for (const pb::OpenFile* file : files_) VMCKPT_TRY(make_connection(*file));
    VMCKPT_TRY(make_waiting_connections());
    for (const pb::OpenFile* file : files_) VMCKPT_TRY(make_end(*file));
    for (const pb::OpenFile* file : files_) VMCKPT_TRY(fill(*file));
    for (const pb::OpenFile* file : files_) VMCKPT_TRY(connect_datagrams(*file));
    for (const pb::OpenFile* file : files_) VMCKPT_TRY(finish(*file));
    return {};
  }

 private:
  const pb::OpenFile* find(uint32_t id) const {
    for (const pb::OpenFile* file : files_) {
      if (file->id() == id) return file;
    }
    return nullptr;
  }

  Result<Fd> make_socket(const pb::OpenFile& file) {
    Fd fd(::socket(AF_UNIX, unix_state(file).type() | SOCK_CLOEXEC, 0));
    if (!fd) return errno_error("make the socket of " + describe(file));
    restore_socket_options(context_, file, unix_state(file).options(), fd.get(), OptionStage::kBeforeBind);
    return fd;
  }

  // Calls bind or connect with the address as it was given, from the folder that a relative one was meant from.
  Result<void> with_address(const pb::OpenFile& file, const std::string& address, const std::string& absolute, int fd,
                            int (*call)(int, const sockaddr*, socklen_t), const char* what) {
    std::string given = path_of(address);
    Fd here;
    if (!given.empty() && given[0] != '/') {
      std::string folder = absolute.ends_with("/" + given) ? absolute.substr(0, absolute.size() - given.size()) : "";
      here = VMCKPT_TRY(open_file(".", O_PATH | O_DIRECTORY));
      if (folder.empty()) return error(fmt::format("{}: the directory of \"{}\" is not known", describe(file), given));
      if (::chdir(folder.c_str()) != 0) return errno_error(fmt::format("{}: go to \"{}\"", describe(file), folder));
    }
    int result = call(fd, reinterpret_cast<const sockaddr*>(address.data()), static_cast<socklen_t>(address.size()));
    int failed = errno;
    if (here && ::fchdir(here.get()) != 0) return errno_error("go back to the working directory");
    if (result == 0) return {};
    errno = failed;
    return errno_error(
        fmt::format("{}: {} \"{}\"", describe(file), what, given.empty() ? "its abstract name" : absolute));
  }

  // A call that makes, finds or removes the file of a socket: with the target's rights, since who may change its folder could
  // have put a link to another's there. With the caller's own only where nobody but root could.
  template <class Call>
  int as_permitted(const std::string& path, Call call, bool or_sticky = false) const {
    const FileAccess& access = context_.restore.access;
    if (access.as_target(call) == 0) return 0;
    return access.is_foreign() && is_roots_alone(path.substr(0, path.rfind('/') + 1), or_sticky) ? call() : -1;
  }

  Fd find_file(const std::string& path) const {
    Fd found;
    as_permitted(path, [&] {
      found = Fd(::open(path.c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC));
      return found ? 0 : -1;
    });
    struct stat there;
    return found && ::fstat(found.get(), &there) == 0 && S_ISSOCK(there.st_mode) ? std::move(found) : Fd();
  }

  // The very file that a socket has been bound to, whatever its name leads to by now; none where nobody can tell.
  Fd file_of_bound(int fd, const std::string& path) const {
    Fd file(::ioctl(fd, kSiocUnixFile));
    struct stat own, there;
    if (file || ::fstat(fd, &own) != 0) return file;
    // That needs CAP_NET_ADMIN. What is found by name must have the inode number that the kernel tells.
    file = find_file(path);
    auto diag = UnixDiag::open();
    auto facts = diag.ok() ? diag->ask(own.st_ino) : Result<UnixSocketFacts>(diag.error());
    bool same = file && ::fstat(file.get(), &there) == 0 && facts.ok() &&
                static_cast<uint32_t>(facts->bound_inode) == static_cast<uint32_t>(there.st_ino);
    return same ? std::move(file) : Fd();
  }

  // Whoever connects to a socket from in here goes to where its file is for now.
  Result<void> note_place(const pb::OpenFile& file, const std::string& path, int fd) {
    Fd bound = file_of_bound(fd, path);
    if (bound) bound = VMCKPT_TRY(context_.lift(std::move(bound)));
    places_[file.id()] = Place{path, std::move(bound)};
    return {};
  }

  // The name without a file, or with the file at another place.
  Result<void> bind_name_alone(const pb::OpenFile& file, int fd) {
    const pb::UnixSocket& socket = unix_state(file);
    std::string within;
    if (socket.path_exists()) within = file_path_of(socket).substr(0, file_path_of(socket).rfind('/') + 1);
    auto folder = PrivateFolder::make(within);
    auto bound = folder.ok() ? folder->bind(fd, socket.local_address()) : Result<std::string>(folder.error());
    if (bound.ok() && socket.path_exists()) {
      if (::rename(bound->c_str(), file_path_of(socket).c_str()) == 0) return {};
      return errno_error(fmt::format("{}: move its file to \"{}\"", describe(file), file_path_of(socket)));
    }
    if (bound.ok()) {
      VMCKPT_TRY(note_place(file, *bound, fd));
      folders_.push_back(std::move(*folder));
      return {};
    }
    // A listener needs a name, whatever it is.
    sa_family_t nameless = AF_UNIX;
    if (::bind(fd, reinterpret_cast<const sockaddr*>(&nameless), sizeof nameless) != 0) {
      return errno_error(fmt::format("{}: bind the socket to any name", describe(file)));
    }
    places_[file.id()] = Place{};
    context_.note(fmt::format("{} was bound to \"{}\", whose file is gone, and has another name now ({})", describe(file),
                              socket.bound_path(), bound.error().message()));
    return {};
  }

  // Only on the very file that has just been made: whoever may change its folder could have put another one there.
  void restore_owner(const pb::OpenFile& file, const std::string& path) {
    const pb::UnixSocket& socket = unix_state(file);
    struct stat there;
    const Fd& place = places_[file.id()].file;
    if (!place || ::fstat(place.get(), &there) != 0) return;
    bool other_owner = there.st_uid != socket.path_owner() || there.st_gid != socket.path_group();
    if (other_owner && ::fchownat(place.get(), "", socket.path_owner(), socket.path_group(), AT_EMPTY_PATH) != 0) {
      context_.note(fmt::format("socket \"{}\" ({}) belonged to user {} and group {} and belongs to {} and {} now: {}", path,
                                describe(file), socket.path_owner(), socket.path_group(), there.st_uid, there.st_gid,
                                std::strerror(errno)));
    }
    if ((there.st_mode & 07777) == socket.path_mode()) return;
    ::chmod(fmt::format("/proc/self/fd/{}", place.get()).c_str(), socket.path_mode());
  }

  Result<void> bind_name(const pb::OpenFile& file, int fd) {
    const pb::UnixSocket& socket = unix_state(file);
    const std::string& path = file_path_of(socket);
    if (socket.bound_path().empty()) return with_address(file, socket.local_address(), path, fd, ::bind, "bind the socket to");
    if (!socket.path_exists()) return bind_name_alone(file, fd);
    Result<void> bound = error(fmt::format("{}: take on the program's rights to make \"{}\"", describe(file), path));
    // Whether it is in use only somebody can tell who may connect: the caller, to the very file that was found.
    if (Fd left = find_file(path); left && !is_unix_path_in_use(fmt::format("/proc/self/fd/{}", left.get()), socket.type())) {
      // In /tmp the program cannot remove what root made for it; what its user can put there instead is its own.
      as_permitted(path, [&] { return ::unlink(path.c_str()); }, true);
    }
    auto make_file = [&] {
      // bind makes the file with mode 0777 less umask.
      mode_t before = ::umask(0777 & ~socket.path_mode());
      bound = socket.file_path().empty()
                  ? with_address(file, socket.local_address(), path, fd, ::bind, "bind the socket to")
                  : bind_name_alone(file, fd);
      ::umask(before);
      return bound.ok() ? 0 : -1;
    };
    as_permitted(path, make_file);
    VMCKPT_TRY(std::move(bound));
    VMCKPT_TRY(note_place(file, path, fd));
    restore_owner(file, path);
    return {};
  }

  static int listen_as_maker(const pb::UnixSocket& socket, int fd, uint32_t backlog) {
    MakerIds as(socket);
    return ::listen(fd, static_cast<int>(backlog));
  }

  Result<void> make_bound(const pb::OpenFile& file) {
    const pb::UnixSocket& socket = unix_state(file);
    Fd fd = VMCKPT_TRY(make_socket(file));
    VMCKPT_TRY(bind_name(file, fd.get()));
    if (socket.listening() && listen_as_maker(socket, fd.get(), std::max(socket.backlog(), 1u)) != 0) {
      return errno_error("listen on the socket of " + describe(file));
    }
    return context_.put(file, std::move(fd));
  }

  // The listener inside that the accepted end of this pair has its name from.
  const pb::OpenFile* find_listener(const pb::UnixSocket& accepted) const {
    for (const pb::OpenFile* file : files_) {
      const pb::UnixSocket& socket = unix_state(*file);
      if (socket.listening() && !socket.local_address().empty() && socket.local_address() == accepted.local_address() &&
          socket.type() == accepted.type()) {
        return file;
      }
    }
    return nullptr;
  }

  // The address that leads to a socket in here, from any working directory: through the descriptor of its file, so that the
  // caller's rights reach this socket and no other.
  Result<std::string> address_of(const pb::OpenFile& file) {
    auto place = places_.find(file.id());
    if (place == places_.end()) return unix_state(file).local_address();
    const auto& [path, bound] = place->second;
    if (bound) return PathAddress(fmt::format("/proc/self/fd/{}", bound.get())).bytes();
    if (!path.empty()) {
      if (!context_.restore.access.is_foreign()) return PathAddress(path).bytes();
      return error(fmt::format("{}: whether \"{}\" is still its file cannot be told, and the program had other rights than you",
                               describe(file), path),
                   "restart it with CAP_NET_ADMIN");
    }
    sockaddr_un address{};
    socklen_t bytes = sizeof address;
    if (::getsockname(context_.fd(file.id()), reinterpret_cast<sockaddr*>(&address), &bytes) != 0) {
      return errno_error("ask for the new name of " + describe(file));
    }
    return std::string(reinterpret_cast<char*>(&address), bytes);
  }

  Result<void> connect_to(const pb::OpenFile& client, int fd, const pb::OpenFile& listener) {
    return connect_at(client, fd, VMCKPT_TRY(address_of(listener)));
  }

  Result<void> connect_at(const pb::OpenFile& client, int fd, const std::string& address) {
    if (::connect(fd, reinterpret_cast<const sockaddr*>(address.data()), static_cast<socklen_t>(address.size())) == 0) return {};
    return errno_error(describe(client) + ": connect it again");
  }

  // Strangers may have connected as soon as the name was there; they are turned away and may try again.
  Result<Fd> accept_own(const pb::OpenFile& file, int listener) {
    for (;;) {
      Fd fd(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
      if (!fd) return errno_error("accept a connection for " + describe(file));
      ucred peer{};
      socklen_t bytes = sizeof peer;
      if (::getsockopt(fd.get(), SOL_SOCKET, SO_PEERCRED, &peer, &bytes) == 0 && peer.pid == ::getpid()) return fd;
    }
  }

  Result<void> make_by_accept(const pb::OpenFile& client, const pb::OpenFile& accepted, const pb::OpenFile& listener) {
    return make_by_accept(client, accepted, context_.fd(listener.id()), VMCKPT_TRY(address_of(listener)));
  }

  Result<void> make_by_accept(const pb::OpenFile& client, const pb::OpenFile& accepted, int listener,
                              const std::string& listener_address) {
    Fd client_fd = VMCKPT_TRY(make_socket(client));
    if (!unix_state(client).local_address().empty()) VMCKPT_TRY(bind_name(client, client_fd.get()));
    // What one end has shut down the other one feels, unless it was shut down before it was connected.
    uint32_t shut = unix_state(client).shutdown(), felt = unix_state(accepted).shutdown();
    if ((shut & kNoMoreReading) != 0 && (felt & kNoMoreWriting) == 0) ::shutdown(client_fd.get(), SHUT_RD);
    if ((shut & kNoMoreWriting) != 0 && (felt & kNoMoreReading) == 0) ::shutdown(client_fd.get(), SHUT_WR);
    auto connect_as_maker = [&]() -> Result<void> {
      MakerIds as(unix_state(accepted));
      return connect_at(client, client_fd.get(), listener_address);
    };
    // The maker may have lost the right to connect since.
    if (!connect_as_maker().ok()) VMCKPT_TRY(connect_at(client, client_fd.get(), listener_address));
    Fd accepted_fd = VMCKPT_TRY(accept_own(accepted, listener));
    restore_socket_options(context_, accepted, unix_state(accepted).options(), accepted_fd.get(),
                           OptionStage::kBeforeBind);
    VMCKPT_TRY(context_.put(client, std::move(client_fd)));
    return context_.put(accepted, std::move(accepted_fd));
  }

  // Ends whose listener is gone have their names from another one that exists for this connection only.
  Result<void> make_by_own_listener(const pb::OpenFile& client, const pb::OpenFile& accepted) {
    const std::string& name = unix_state(accepted).local_address();
    Fd listener(::socket(AF_UNIX, unix_state(accepted).type() | SOCK_CLOEXEC, 0));
    if (!listener) return errno_error("make a socket");
    std::string address = name;
    std::optional<PrivateFolder> folder;
    if (!path_of(name).empty()) {
      folder.emplace(VMCKPT_TRY(PrivateFolder::make("")));
      address = PathAddress(VMCKPT_TRY(folder->bind(listener.get(), name))).bytes();
    } else if (::bind(listener.get(), reinterpret_cast<const sockaddr*>(name.data()), static_cast<socklen_t>(name.size())) != 0) {
      return errno_error("bind to an abstract name");
    }
    if (::listen(listener.get(), 1) != 0) return errno_error("listen on a socket");
    return make_by_accept(client, accepted, listener.get(), address);
  }

  Result<std::pair<Fd, Fd>> make_pair_like(const pb::OpenFile& file) {
    int ends[2];
    MakerIds as(unix_state(file));
    if (::socketpair(AF_UNIX, unix_state(file).type() | SOCK_CLOEXEC, 0, ends) != 0) {
      return errno_error("make the socket pair of " + describe(file));
    }
    return std::pair<Fd, Fd>(Fd(ends[0]), Fd(ends[1]));
  }

  bool is_mutual(const pb::OpenFile& file, const pb::OpenFile* peer) const {
    return peer != nullptr && peer->id() != file.id() && unix_state(*peer).peer() == pb::PEER_INSIDE &&
           unix_state(*peer).peer_id() == file.id() && !unix_state(*peer).pending();
  }

  Result<void> make_connection(const pb::OpenFile& file) {
    const pb::UnixSocket& socket = unix_state(file);
    if (context_.has(file.id()) || socket.peer() != pb::PEER_INSIDE || socket.pending()) return {};
    const pb::OpenFile* peer = find(socket.peer_id());
    if (!is_mutual(file, peer)) {
      if (socket.type() == SOCK_DGRAM) return {};
      return error(fmt::format("{} is connected to descriptor {}, which is not connected to it", describe(file),
                               socket.peer_id()));
    }
    bool named = !socket.local_address().empty() || !unix_state(*peer).local_address().empty();
    if (socket.type() == SOCK_DGRAM && named) return {};  // connected by name later
    if (socket.type() != SOCK_DGRAM) {
      if (const pb::OpenFile* listener = find_listener(socket)) return make_by_accept(*peer, file, *listener);
      if (const pb::OpenFile* listener = find_listener(unix_state(*peer)))
        return make_by_accept(file, *peer, *listener);
      if (named) {
        // The accepted end came last, and has a name in any case.
        bool peer_accepted = socket.local_address().empty() || (!unix_state(*peer).local_address().empty() &&
                                                                unix_state(*peer).inode() > socket.inode());
        auto made = peer_accepted ? make_by_own_listener(file, *peer) : make_by_own_listener(*peer, file);
        if (made.ok()) return {};
        context_.note(fmt::format("{} and {} are connected without their names ({})", describe(file), describe(*peer),
                                  made.error().message()));
      }
    }
    auto [first, second] = VMCKPT_TRY(make_pair_like(file));
    restore_socket_options(context_, file, socket.options(), first.get(), OptionStage::kBeforeBind);
    restore_socket_options(context_, *peer, unix_state(*peer).options(), second.get(), OptionStage::kBeforeBind);
    VMCKPT_TRY(context_.put(file, std::move(first)));
    return context_.put(*peer, std::move(second));
  }

  Result<void> make_waiting_connections() {
    std::vector<const pb::OpenFile*> waiting;
    for (const pb::OpenFile* file : files_) {
      if (unix_state(*file).pending()) waiting.push_back(file);
    }
    std::sort(waiting.begin(), waiting.end(), [](const auto* a, const auto* b) {
      return unix_state(*a).pending_order() < unix_state(*b).pending_order();
    });
    for (const pb::OpenFile* file : waiting) {
      const pb::OpenFile* listener = find(unix_state(*file).peer_id());
      if (listener == nullptr) return error(describe(*file) + " waits at a listener that the image does not have");
      Fd fd = VMCKPT_TRY(make_socket(*file));
      if (!unix_state(*file).local_address().empty()) VMCKPT_TRY(bind_name(*file, fd.get()));
      VMCKPT_TRY(connect_to(*file, fd.get(), *listener));
      VMCKPT_TRY(context_.put(*file, std::move(fd)));
    }
    return {};
  }

  Result<void> make_end(const pb::OpenFile& file) {
    const pb::UnixSocket& socket = unix_state(file);
    if (context_.has(file.id())) return {};
    if (socket.peer() == pb::PEER_STDIO) {
      return context_.put(file, VMCKPT_TRY(attach_stdio(context_, file, context_.descriptors.stdio(file))));
    }
    bool by_name = socket.type() == SOCK_DGRAM && !socket.peer_address().empty();
    if (socket.peer() == pb::PEER_NONE || by_name || socket.peer() == pb::PEER_INSIDE) {
      return context_.put(file, VMCKPT_TRY(make_socket(file)));
    }
    auto [end, other] = VMCKPT_TRY(make_pair_like(file));
    restore_socket_options(context_, file, socket.options(), end.get(), OptionStage::kBeforeBind);
    VMCKPT_TRY(context_.put(file, std::move(end)));
    closing_[file.id()] = VMCKPT_TRY(context_.lift(std::move(other)));
    return {};
  }

  Result<void> connect_datagrams(const pb::OpenFile& file) {
    const pb::UnixSocket& socket = unix_state(file);
    bool connected = socket.peer() == pb::PEER_INSIDE || socket.peer() == pb::PEER_OUTSIDE;
    if (socket.type() != SOCK_DGRAM || !connected) return {};
    if (socket.peer_address().empty()) {
      const std::string& own = socket.local_address();
      if (!own.empty()) context_.note(describe(file) + " was connected to a socket without a name and is not any more");
      return {};
    }
    const pb::OpenFile* peer = socket.peer() == pb::PEER_INSIDE ? find(socket.peer_id()) : nullptr;
    std::string address = peer != nullptr ? VMCKPT_TRY(address_of(*peer)) : socket.peer_address();
    Result<void> done = error(describe(file) + ": take on the program's rights to connect it again");
    auto connect_now = [&] {
      done = connect_at(file, context_.fd(file.id()), address);
      return done.ok() ? 0 : -1;
    };
    if (peer != nullptr) connect_now();
    else context_.restore.access.as_target(connect_now);
    if (!done.ok()) context_.note(done.error().message() + "; it is not connected now");
    return {};
  }

  // Who may send to `file`: the socket it is connected to, or for a named one anybody.
  int sender_for(const pb::OpenFile& file, const pb::SocketMessage& message, Fd* temporary) {
    const pb::UnixSocket& socket = unix_state(file);
    if (auto closing = closing_.find(file.id()); closing != closing_.end()) return closing->second.get();
    if (socket.peer() == pb::PEER_INSIDE && !socket.pending()) return context_.fd(socket.peer_id());
    for (const pb::OpenFile* other : files_) {
      if (!message.sender().empty() && unix_state(*other).local_address() == message.sender())
        return context_.fd(other->id());
    }
    *temporary = Fd(::socket(AF_UNIX, socket.type() | SOCK_CLOEXEC, 0));
    return temporary->get();
  }

  Result<void> fill(const pb::OpenFile& file) {
    const pb::UnixSocket& socket = unix_state(file);
    if (socket.peer() == pb::PEER_STDIO) return {};
    bool lost_sender = false;
    for (const pb::SocketMessage& message : socket.queue()) {
      Fd temporary;
      int sender = sender_for(file, message, &temporary);
      lost_sender |= temporary.valid() && !message.sender().empty();
      bool by_name = socket.type() == SOCK_DGRAM && !socket.local_address().empty();
      VMCKPT_TRY(send_whole(file, sender, message.data(), by_name));
    }
    if (lost_sender) context_.note(describe(file) + ": unread datagrams from outside no longer tell who sent them");
    return {};
  }

  // `by_name`: to the address of `file`; otherwise over the connection.
  Result<void> send_whole(const pb::OpenFile& file, int sender, const std::string& data, bool by_name) {
    RoomToSend room(sender, data.size());
    std::string name = by_name ? VMCKPT_TRY(address_of(file)) : std::string();
    size_t sent = 0;
    do {
      ssize_t put = ::sendto(sender, data.data() + sent, data.size() - sent, MSG_DONTWAIT | MSG_NOSIGNAL,
                             name.empty() ? nullptr : reinterpret_cast<const sockaddr*>(name.data()),
                             static_cast<socklen_t>(name.size()));
      if (put < 0)
        return errno_error(fmt::format("put {} unread bytes back into {}", data.size() - sent, describe(file)));
      sent += static_cast<size_t>(put);
    } while (sent < data.size());
    return {};
  }

  Result<void> finish(const pb::OpenFile& file) {
    const pb::UnixSocket& socket = unix_state(file);
    if (socket.peer() == pb::PEER_STDIO) return {};
    int fd = context_.fd(file.id());
    closing_.erase(file.id());
    if (socket.peer() == pb::PEER_INSIDE && !socket.pending()) {
      if ((socket.shutdown() & kNoMoreWriting) != 0) ::shutdown(fd, SHUT_WR);
      if ((socket.shutdown() & kNoMoreReading) != 0 && socket.type() == SOCK_DGRAM) ::shutdown(fd, SHUT_RD);
    } else if (socket.type() == SOCK_DGRAM || socket.pending() || (socket.peer() == pb::PEER_NONE && !socket.listening())) {
      if ((socket.shutdown() & kNoMoreWriting) != 0) ::shutdown(fd, SHUT_WR);
      if ((socket.shutdown() & kNoMoreReading) != 0) ::shutdown(fd, SHUT_RD);
    }
    if (socket.listening() && listen_as_maker(socket, fd, socket.backlog()) != 0) {
      return errno_error("listen on the socket of " + describe(file));
    }
    if (socket.listening() && (socket.shutdown() & kNoMoreWriting) != 0) ::shutdown(fd, SHUT_WR);
    if (socket.listening() && (socket.shutdown() & kNoMoreReading) != 0) ::shutdown(fd, SHUT_RD);
    restore_socket_options(context_, file, socket.options(), fd, OptionStage::kAfterwards);
    return {};
  }

  struct Place {
    std::string path;  // where the file is; empty: bound to any name
    Fd file;           // the file itself, where it can be told
  };

  RestoreContext& context_;
  std::vector<const pb::OpenFile*> files_;
  std::map<uint32_t, Place> places_;    // of bound sockets, by id
  std::vector<PrivateFolder> folders_;  // until all connections are made
  std::map<uint32_t, Fd> closing_;  // other ends that were closed or outside, kept until unread data is back
};

}  // namespace

Result<void> restore_unix_sockets(RestoreContext& context) { return UnixRestore(context).run(); }

}  // namespace vmckpt
