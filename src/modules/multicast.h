// Memberships in multicast groups, of UDP and raw sockets.
#pragma once

#include "modules/descriptor_module.h"
#include "modules/inet_socket.pb.h"

namespace vmckpt {

struct MulticastGroup {
  int family;
  std::string interface;
  std::string address;  // sockaddr
};

// All groups that the interfaces of the process's network have joined.
std::vector<MulticastGroup> list_multicast_groups(pid_t pid);
// Those of them that the socket is a member of.
void save_memberships(const std::vector<MulticastGroup>& groups, int fd, pb::InetSocket* socket);
void restore_memberships(RestoreContext& context, const pb::OpenFile& file, int fd);

}  // namespace vmckpt
