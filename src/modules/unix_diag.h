// What the kernel knows about one Unix socket beyond getsockopt: NETLINK_SOCK_DIAG, asked by exact inode
// (sock_diag(7)).
#pragma once

#include <cstdint>
#include <vector>

#include "core/fd.h"
#include "core/result.h"

namespace vmckpt {

struct UnixSocketFacts {
  bool has_peer = false;
  uint64_t peer_inode = 0;        // 0 with has_peer: closed, or a connection that has not been accepted yet
  uint32_t shutdown = 0;          // bit 0: no more reading, bit 1: no more writing
  uint32_t backlog = 0;           // listener: its limit
  std::vector<uint64_t> pending;  // listener: inodes of the sockets that wait to be accepted, 0 for unknown
  uint64_t bound_inode = 0;       // socket file bound to; 0: none
};

class UnixDiag {
 public:
  static Result<UnixDiag> open();
  Result<UnixSocketFacts> ask(uint64_t inode) const;

 private:
  Fd netlink_;
};

}  // namespace vmckpt
