// What the kernel knows about netlink sockets beyond getsockopt: NETLINK_SOCK_DIAG (sock_diag(7), net/netlink/diag.c).
#pragma once

#include <cstdint>
#include <map>

namespace vmckpt {

struct NetlinkSocketFacts {
  bool connected = false;  // also to address 0, the kernel's, which getpeername() shows of one that is not connected, too
  bool listens_everywhere = false;  // NETLINK_LISTEN_ALL_NSID, which getsockopt tells since Linux 6.9; since Linux 4.12
};

// By inode: all sockets of this network namespace that have an address. Empty where the kernel cannot tell (CONFIG_NETLINK_DIAG).
std::map<uint64_t, NetlinkSocketFacts> list_netlink_sockets();

}  // namespace vmckpt
