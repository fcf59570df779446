// Questions about sockets to the kernel (sock_diag(7)): how they are sent, and how the answer about many is read. What is asked
// and told is each family's: inet_diag.cc, netlink_diag.cc, unix_diag.cc.
#pragma once

#include <cerrno>

#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <sys/socket.h>

#include "core/fd.h"

namespace vmckpt {

// Empty, and errno, where the kernel has no such thing.
inline Fd open_sock_diag() { return Fd(::socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG)); }

// False, and errno, when it could not be sent. `flags`: NLM_F_... beside NLM_F_REQUEST.
template <class Request>
bool send_sock_diag(const Fd& netlink, uint16_t type, uint16_t flags, const Request& request) {
  struct {
    nlmsghdr header;
    Request request;
  } message{};
  message.header.nlmsg_len = sizeof message;
  message.header.nlmsg_type = type;
  message.header.nlmsg_flags = static_cast<uint16_t>(NLM_F_REQUEST | flags);
  message.request = request;
  return ::send(netlink.get(), &message, sizeof message, 0) >= 0;
}

// The error that a message of the type NLMSG_ERROR tells.
inline int sock_diag_errno(nlmsghdr* header) {
  return header->nlmsg_len >= NLMSG_LENGTH(sizeof(nlmsgerr)) ? -static_cast<nlmsgerr*>(NLMSG_DATA(header))->error : EIO;
}

// The answer to NLM_F_DUMP: `take` gets each message, which has at least an `Info`. False, and errno, when it ended early.
template <class Info, class Take>
bool read_sock_diag_dump(const Fd& netlink, Take take) {
  alignas(nlmsghdr) char answer[32768];
  for (;;) {
    const ssize_t got = ::recv(netlink.get(), answer, sizeof answer, 0);
    if (got == 0) errno = EIO;
    if (got <= 0) return false;
    auto left = static_cast<unsigned>(got);
    for (auto* header = reinterpret_cast<nlmsghdr*>(answer); NLMSG_OK(header, left); header = NLMSG_NEXT(header, left)) {
      if (header->nlmsg_type == NLMSG_DONE) return true;
      const bool is_error = header->nlmsg_type == NLMSG_ERROR;
      if (is_error || header->nlmsg_len < NLMSG_LENGTH(sizeof(Info))) {
        errno = is_error ? sock_diag_errno(header) : EIO;
        return false;
      }
      take(header);
    }
  }
}

}  // namespace vmckpt
