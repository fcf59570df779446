// Shared by the two halves of the Unix socket module: unix_socket.cc (save, check) and unix_socket_restore.cc.
#pragma once

#include <string>

#include <linux/sockios.h>
#include <sys/ioctl.h>

#include "modules/descriptor_module.h"

namespace vmckpt {

constexpr unsigned long kSiocOutq = SIOCOUTQ;

// The path in a sockaddr_un, empty for abstract and unnamed ones.
std::string path_of(const std::string& address);

// Whether restart binds this socket itself.
bool is_bound_anew(const pb::UnixSocket& socket);

// Whether any socket is bound to the file at `path`, whose own type is `type`.
bool is_unix_path_in_use(const std::string& path, int type);

Result<void> restore_unix_sockets(RestoreContext& context);

}  // namespace vmckpt
