// Netlink: address, groups, options and the connection to the kernel; the sockets go on asking and hearing.

#include <linux/filter.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <sys/socket.h>

#include <set>

#include "act.h"

static sockaddr_nl own_address(int fd) {
  sockaddr_nl address{};
  socklen_t bytes = sizeof address;
  MUST(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &bytes));
  return address;
}

static int option(int fd, int name) {
  int value = -1;
  socklen_t bytes = sizeof value;
  MUST(getsockopt(fd, SOL_NETLINK, name, &value, &bytes));
  return value;
}

static std::set<unsigned> groups(int fd) {
  uint32_t words[16] = {};
  socklen_t bytes = sizeof words;
  MUST(getsockopt(fd, SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS, words, &bytes));
  std::set<unsigned> all;
  for (unsigned group = 1; group <= 512; group++) {
    if (words[(group - 1) / 32] >> ((group - 1) % 32) & 1) all.insert(group);
  }
  return all;
}

// Whether the list of the host's interfaces comes, with the loopback interface in it, addressed to this socket.
static bool lists_interfaces(int fd, uint32_t sequence) {
  struct {
    nlmsghdr head;
    ifinfomsg body;
  } request{};
  request.head.nlmsg_len = sizeof request;
  request.head.nlmsg_type = RTM_GETLINK;
  request.head.nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP;
  request.head.nlmsg_seq = sequence;
  MUST(send(fd, &request, sizeof request, 0));
  const uint32_t port = own_address(fd).nl_pid;
  static char answer[1 << 16];
  for (bool found = false;;) {
    int bytes = static_cast<int>(MUST(recv(fd, answer, sizeof answer, 0)));
    for (auto* head = reinterpret_cast<nlmsghdr*>(answer); NLMSG_OK(head, static_cast<unsigned>(bytes));
         head = NLMSG_NEXT(head, bytes)) {
      if (head->nlmsg_seq != sequence || head->nlmsg_pid != port) return false;
      if (head->nlmsg_type == NLMSG_DONE) return found;
      if (head->nlmsg_type != RTM_NEWLINK) return false;
      found |= (static_cast<ifinfomsg*>(NLMSG_DATA(head))->ifi_flags & IFF_LOOPBACK) != 0;
    }
  }
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  const int asking = MUST(socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE));
  sockaddr_nl any{};
  any.nl_family = AF_NETLINK;
  MUST(bind(asking, reinterpret_cast<sockaddr*>(&any), sizeof any));
  const uint32_t port = own_address(asking).nl_pid;
  int on = 1;
  MUST(setsockopt(asking, SOL_NETLINK, NETLINK_EXT_ACK, &on, sizeof on));
  MUST(setsockopt(asking, SOL_NETLINK, NETLINK_GET_STRICT_CHK, &on, sizeof on));
  timeval limit{5, 0};
  MUST(setsockopt(asking, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit));
  act::expect("the kernel answers", lists_interfaces(asking, 1));

  const int listening = MUST(socket(AF_NETLINK, SOCK_DGRAM | SOCK_NONBLOCK, NETLINK_ROUTE));
  sockaddr_nl in_groups{};
  in_groups.nl_family = AF_NETLINK;
  in_groups.nl_groups = RTMGRP_LINK | RTMGRP_IPV4_IFADDR;
  MUST(bind(listening, reinterpret_cast<sockaddr*>(&in_groups), sizeof in_groups));
  int high_group = RTNLGRP_NSID;  // beyond the 27 that have a bit by name
  MUST(setsockopt(listening, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &high_group, sizeof high_group));
  const std::set<unsigned> joined = groups(listening);
  const uint32_t listening_port = own_address(listening).nl_pid;
  // The host has news at any time, and unread news are a reason to refuse the checkpoint: nothing passes.
  sock_filter nothing[] = {{BPF_RET | BPF_K, 0, 0, 0}};
  sock_fprog program{1, nothing};
  MUST(setsockopt(listening, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program));
  char early[1 << 14];
  while (recv(listening, early, sizeof early, 0) >= 0) continue;

  const int devices = MUST(socket(AF_NETLINK, SOCK_RAW | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT));
  sockaddr_nl events{};
  events.nl_family = AF_NETLINK;
  events.nl_groups = 1;
  MUST(setsockopt(devices, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program));
  MUST(bind(devices, reinterpret_cast<sockaddr*>(&events), sizeof events));
  const int unbound = MUST(socket(AF_NETLINK, SOCK_RAW, NETLINK_SOCK_DIAG));
  const int connected = MUST(socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE));
  MUST(connect(connected, reinterpret_cast<sockaddr*>(&any), sizeof any));
  const uint32_t connected_port = own_address(connected).nl_pid;

  act::intermission();

  act::expect_equal("address", port, own_address(asking).nl_pid);
  act::expect_equal("close-on-exec", FD_CLOEXEC, fcntl(asking, F_GETFD));
  act::expect_equal("extended acknowledgements", 1, option(asking, NETLINK_EXT_ACK));
  act::expect_equal("strict checks", 1, option(asking, NETLINK_GET_STRICT_CHK));
  act::expect_equal("packet information", 0, option(asking, NETLINK_PKTINFO));
  timeval kept{};
  socklen_t bytes = sizeof kept;
  MUST(getsockopt(asking, SOL_SOCKET, SO_RCVTIMEO, &kept, &bytes));
  act::expect_equal("receive timeout", 5L, kept.tv_sec);
  act::expect("the kernel answers again", lists_interfaces(asking, 2));
  act::expect_equal("address of the listening one", listening_port, own_address(listening).nl_pid);
  act::expect("groups", groups(listening) == joined);
  act::expect_equal("number of groups", size_t{3}, joined.size());
  act::expect_equal("flags", O_RDWR | O_NONBLOCK, fcntl(listening, F_GETFL));
  socklen_t instructions = 0;
  MUST(getsockopt(listening, SOL_SOCKET, SO_GET_FILTER, nullptr, &instructions));
  act::expect_equal("instructions of the filter", socklen_t{1}, instructions);
  act::expect("groups of the one for devices", groups(devices) == std::set<unsigned>{1});
  act::expect_equal("the unbound one", 0u, own_address(unbound).nl_pid);
  act::expect_equal("address of the connected one", connected_port, own_address(connected).nl_pid);
  act::expect("the connected one asks, too", lists_interfaces(connected, 3));
  return act::finish();
}
