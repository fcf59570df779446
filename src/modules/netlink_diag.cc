#include "modules/netlink_diag.h"

#include <cstring>

#include <linux/netlink.h>
#include <linux/netlink_diag.h>
#include <linux/rtnetlink.h>
#include <linux/sock_diag.h>
#include <sys/socket.h>

#include "core/fd.h"

namespace vmckpt {
namespace {

constexpr uint8_t kConnected = 1;  // NETLINK_CONNECTED of net/netlink/af_netlink.c: not a TCP_ state

NetlinkSocketFacts read_facts(nlmsghdr* header) {
  auto* info = static_cast<netlink_diag_msg*>(NLMSG_DATA(header));
  NetlinkSocketFacts facts;
  facts.connected = info->ndiag_state == kConnected;
  auto left = static_cast<int>(header->nlmsg_len - NLMSG_LENGTH(sizeof *info));
  auto* attribute = reinterpret_cast<rtattr*>(info + 1);
  for (; RTA_OK(attribute, left); attribute = RTA_NEXT(attribute, left)) {
    uint32_t flags = 0;
    if (attribute->rta_type != NETLINK_DIAG_FLAGS || RTA_PAYLOAD(attribute) < sizeof flags) continue;
    std::memcpy(&flags, RTA_DATA(attribute), sizeof flags);
    facts.listens_everywhere = (flags & NDIAG_FLAG_LISTEN_ALL_NSID) != 0;
  }
  return facts;
}

}  // namespace

std::map<uint64_t, NetlinkSocketFacts> list_netlink_sockets() {
  const Fd netlink(::socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG));
  struct {
    nlmsghdr header;
    netlink_diag_req request;
  } message{};
  message.header.nlmsg_len = sizeof message;
  message.header.nlmsg_type = SOCK_DIAG_BY_FAMILY;
  message.header.nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP;
  message.request.sdiag_family = AF_NETLINK;
  message.request.sdiag_protocol = NDIAG_PROTO_ALL;
  message.request.ndiag_show = NDIAG_SHOW_FLAGS;
  if (!netlink || ::send(netlink.get(), &message, sizeof message, 0) < 0) return {};
  std::map<uint64_t, NetlinkSocketFacts> sockets;
  alignas(nlmsghdr) char answer[32768];
  for (;;) {
    const ssize_t got = ::recv(netlink.get(), answer, sizeof answer, 0);
    if (got <= 0) return {};
    auto left = static_cast<unsigned>(got);
    for (auto* header = reinterpret_cast<nlmsghdr*>(answer); NLMSG_OK(header, left); header = NLMSG_NEXT(header, left)) {
      if (header->nlmsg_type == NLMSG_DONE) return sockets;
      if (header->nlmsg_type == NLMSG_ERROR || header->nlmsg_len < NLMSG_LENGTH(sizeof(netlink_diag_msg))) return {};
      sockets[static_cast<netlink_diag_msg*>(NLMSG_DATA(header))->ndiag_ino] = read_facts(header);
    }
  }
}

}  // namespace vmckpt
