// Shared by the two halves of the Unix socket module: unix_socket.cc (save, check) and unix_socket_restore.cc.
#pragma once

#include <string>

#include <linux/sockios.h>
#include <sys/ioctl.h>
#include <sys/un.h>

#include "modules/descriptor_module.h"
#include "modules/unix_socket.pb.h"

namespace vmckpt {

inline const pb::UnixSocket& unix_state(const pb::OpenFile& file) { return file.GetExtension(pb::unix_socket); }

constexpr unsigned long kSiocOutq = SIOCOUTQ;
// SIOCUNIXFILE: linux/un.h does not go together with sys/un.h.
constexpr unsigned long kSiocUnixFile = SIOCPROTOPRIVATE + 0;

// The path in a sockaddr_un, empty for abstract and unnamed ones.
std::string path_of(const std::string& address);

// Whether restart binds this socket itself.
bool is_bound_anew(const pb::UnixSocket& socket);

// Whether any socket is bound to the file at `path`, whose own type is `type`.
bool is_unix_path_in_use(const std::string& path, int type);

// Where the socket file is: at the name it was bound to, unless it has been renamed since.
const std::string& file_path_of(const pb::UnixSocket& socket);

// unix_names.cc: a folder that nobody else knows, for socket files; removed with all that is in it.
class PrivateFolder {
 public:
  static Result<PrivateFolder> make(const std::string& within);  // empty: wherever there is room
  PrivateFolder(PrivateFolder&& other) noexcept : path_(std::move(other.path_)) { other.path_.clear(); }
  PrivateFolder& operator=(PrivateFolder&&) = delete;
  ~PrivateFolder();
  // Binds to the name in `address`, word for word, with the file in here. Returns the file's path.
  Result<std::string> bind(int fd, const std::string& address) const;

 private:
  PrivateFolder() = default;
  std::string path_;
};

// unix_names.cc: whether nobody but root can change where this folder's name leads, or what is in it. `or_sticky`: others may
// make files there, and exchange their own.
bool is_roots_alone(const std::string& folder, bool or_sticky = false);

// unix_names.cc: the address of a socket file, however long its path is.
class PathAddress {
 public:
  explicit PathAddress(const std::string& path);
  std::string bytes() const;

 private:
  sockaddr_un address_{};
  Fd folder_;
};

Result<void> restore_unix_sockets(RestoreContext& context);

}  // namespace vmckpt
