#include "modules/unix_diag.h"

#include <cstring>

#include <linux/rtnetlink.h>
#include <linux/unix_diag.h>

#include "modules/sock_diag.h"

namespace vmckpt {
namespace {

constexpr const char* kNoDiag = "the kernel needs CONFIG_UNIX_DIAG (module unix_diag)";

template <class T>
T payload(const rtattr* attribute) {
  T value{};
  if (RTA_PAYLOAD(attribute) >= sizeof value) std::memcpy(&value, RTA_DATA(attribute), sizeof value);
  return value;
}

void read_attribute(const rtattr* attribute, UnixSocketFacts* facts) {
  switch (attribute->rta_type) {
    case UNIX_DIAG_PEER:
      facts->has_peer = true;
      facts->peer_inode = payload<uint32_t>(attribute);
      break;
    case UNIX_DIAG_SHUTDOWN: facts->shutdown = payload<uint8_t>(attribute); break;
    case UNIX_DIAG_RQLEN: facts->backlog = payload<unix_diag_rqlen>(attribute).udiag_wqueue; break;
    case UNIX_DIAG_VFS: facts->bound_inode = payload<unix_diag_vfs>(attribute).udiag_vfs_ino; break;
    case UNIX_DIAG_ICONS: {
      const auto* inodes = static_cast<const uint32_t*>(RTA_DATA(attribute));
      facts->pending.assign(inodes, inodes + RTA_PAYLOAD(attribute) / sizeof *inodes);
      break;
    }
    default: break;
  }
}

}  // namespace

Result<UnixDiag> UnixDiag::open() {
  UnixDiag diag;
  diag.netlink_ = open_sock_diag();
  if (!diag.netlink_) return errno_error("open a socket to ask about Unix sockets", kNoDiag);
  return diag;
}

Result<UnixSocketFacts> UnixDiag::ask(uint64_t inode) const {
  unix_diag_req request{};
  request.sdiag_family = AF_UNIX;
  request.udiag_states = ~0u;
  request.udiag_ino = static_cast<uint32_t>(inode);
  request.udiag_show = UDIAG_SHOW_PEER | UDIAG_SHOW_ICONS | UDIAG_SHOW_RQLEN | UDIAG_SHOW_VFS;
  request.udiag_cookie[0] = request.udiag_cookie[1] = ~0u;  // any
  if (!send_sock_diag(netlink_, SOCK_DIAG_BY_FAMILY, 0, request)) {
    return errno_error(fmt::format("ask about Unix socket {}", inode), kNoDiag);
  }
  alignas(nlmsghdr) char answer[32768];  // a listener's list of waiting connections is the longest part
  ssize_t got = ::recv(netlink_.get(), answer, sizeof answer, 0);
  if (got < 0) return errno_error(fmt::format("ask about Unix socket {}", inode), kNoDiag);
  auto* header = reinterpret_cast<nlmsghdr*>(answer);
  if (!NLMSG_OK(header, static_cast<size_t>(got)))
    return error(fmt::format("the answer about Unix socket {} is cut off", inode));
  if (header->nlmsg_type == NLMSG_ERROR) {
    errno = sock_diag_errno(header);
    return errno_error(
        fmt::format("ask about Unix socket {}", inode),
        errno == ENOENT ? "it may belong to another network namespace or kernel support is missing" : kNoDiag);
  }
  UnixSocketFacts facts;
  auto* info = static_cast<unix_diag_msg*>(NLMSG_DATA(header));
  auto left = static_cast<int>(header->nlmsg_len - NLMSG_LENGTH(sizeof *info));
  auto* attribute = reinterpret_cast<rtattr*>(info + 1);
  for (; RTA_OK(attribute, left); attribute = RTA_NEXT(attribute, left)) read_attribute(attribute, &facts);
  return facts;
}

}  // namespace vmckpt
