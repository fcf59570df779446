#include "modules/netlink_diag.h"

#include <cstring>

#include <linux/netlink_diag.h>
#include <linux/rtnetlink.h>

#include "modules/sock_diag.h"

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
  const Fd netlink = open_sock_diag();
  netlink_diag_req request{};
  request.sdiag_family = AF_NETLINK;
  request.sdiag_protocol = NDIAG_PROTO_ALL;
  request.ndiag_show = NDIAG_SHOW_FLAGS;
  if (!netlink || !send_sock_diag(netlink, SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, request)) return {};
  std::map<uint64_t, NetlinkSocketFacts> sockets;
  const bool whole = read_sock_diag_dump<netlink_diag_msg>(netlink, [&](nlmsghdr* header) {
    sockets[static_cast<netlink_diag_msg*>(NLMSG_DATA(header))->ndiag_ino] = read_facts(header);
  });
  return whole ? sockets : std::map<uint64_t, NetlinkSocketFacts>();
}

}  // namespace vmckpt
