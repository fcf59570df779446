// Multicast groups that UDP and raw sockets have joined (IP_ADD_MEMBERSHIP and its relatives).
//
// No call lists the groups of a socket. /proc/net/igmp and igmp6 list those of every interface, whoever joined them, and
// MCAST_MSFILTER tells of one group on one interface whether this socket is a member, and of which sources: so every group
// that the host has joined is asked about. An interface is kept by its name. A group that cannot be joined again is noted.
// Sources: ip(7), RFC 3678, net/ipv4/igmp.c (ip_mc_gsfget), net/ipv6/mcast.c (ip6_mc_msfget).
#include "modules/multicast.h"

#include <net/if.h>
#include <netinet/in.h>

#include "core/proc.h"
#include "modules/inet_socket.h"
#include "modules/inet_socket.pb.h"

namespace vmckpt {
namespace {

constexpr uint32_t kMaxSources = 256;

int level_of(int family) { return family == AF_INET ? IPPROTO_IP : IPPROTO_IPV6; }

void put_address(const std::string& bytes, sockaddr_storage* to) {
  std::memcpy(to, bytes.data(), std::min(bytes.size(), sizeof *to));
}

std::string group_address(const in_addr& group) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr = group;
  return std::string(reinterpret_cast<char*>(&address), sizeof address);
}

// "1\tlo        :     1      V3", then for each group "\t\t\t\t010000E0     1 0:00000000\t\t0".
void read_igmp(const std::string& text, std::vector<MulticastGroup>* groups) {
  std::string interface;
  for (std::string_view line : split_lines(text)) {
    auto words = split_words(line);
    if (words.size() < 2) continue;
    if (line[0] != '\t') {
      interface = words[1];
      continue;
    }
    in_addr group{static_cast<in_addr_t>(parse_hex(words[0]))};  // shown as the number that lies in memory
    groups->push_back({AF_INET, interface, group_address(group)});
  }
}

// "1    lo              ff020000000000000000000000000001     1 0000000C 0"
void read_igmp6(const std::string& text, std::vector<MulticastGroup>* groups) {
  for (std::string_view line : split_lines(text)) {
    auto words = split_words(line);
    if (words.size() < 3 || words[2].size() != 32) continue;
    sockaddr_in6 address{};
    address.sin6_family = AF_INET6;
    for (size_t i = 0; i < 16; ++i) address.sin6_addr.s6_addr[i] = static_cast<uint8_t>(parse_hex(words[2].substr(i * 2, 2)));
    groups->push_back({AF_INET6, std::string(words[1]), std::string(reinterpret_cast<char*>(&address), sizeof address)});
  }
}

// A group_filter with room for sources behind it, as the kernel wants it.
struct Filter {
  explicit Filter(uint32_t sources) : bytes(GROUP_FILTER_SIZE(std::max(sources, 1u)), '\0') {}
  group_filter* get() { return reinterpret_cast<group_filter*>(bytes.data()); }
  std::string bytes;
};

int join(int fd, int level, unsigned interface, const pb::MulticastMembership& membership) {
  if (membership.mode() == MCAST_INCLUDE) {
    for (const std::string& source : membership.sources()) {
      group_source_req request{};
      request.gsr_interface = interface;
      put_address(membership.group(), &request.gsr_group);
      put_address(source, &request.gsr_source);
      if (::setsockopt(fd, level, MCAST_JOIN_SOURCE_GROUP, &request, sizeof request) != 0) return -1;
    }
    return 0;
  }
  group_req request{};
  request.gr_interface = interface;
  put_address(membership.group(), &request.gr_group);
  if (::setsockopt(fd, level, MCAST_JOIN_GROUP, &request, sizeof request) != 0) return -1;
  for (const std::string& source : membership.sources()) {
    group_source_req blocked{};
    blocked.gsr_interface = interface;
    put_address(membership.group(), &blocked.gsr_group);
    put_address(source, &blocked.gsr_source);
    if (::setsockopt(fd, level, MCAST_BLOCK_SOURCE, &blocked, sizeof blocked) != 0) return -1;
  }
  return 0;
}

}  // namespace

std::vector<MulticastGroup> list_multicast_groups(pid_t pid) {
  std::vector<MulticastGroup> groups;
  if (auto text = read_whole_file(fmt::format("/proc/{}/net/igmp", pid)); text.ok()) read_igmp(*text, &groups);
  if (auto text = read_whole_file(fmt::format("/proc/{}/net/igmp6", pid)); text.ok()) read_igmp6(*text, &groups);
  return groups;
}

void save_memberships(const std::vector<MulticastGroup>& groups, int fd, pb::InetSocket* socket) {
  for (const MulticastGroup& group : groups) {
    if (group.family != socket->family()) continue;
    Filter filter(kMaxSources);
    filter.get()->gf_interface = ::if_nametoindex(group.interface.c_str());
    filter.get()->gf_numsrc = kMaxSources;
    put_address(group.address, &filter.get()->gf_group);
    auto bytes = static_cast<socklen_t>(filter.bytes.size());
    if (filter.get()->gf_interface == 0 ||
        ::getsockopt(fd, level_of(group.family), MCAST_MSFILTER, filter.bytes.data(), &bytes) != 0) {
      continue;  // EADDRNOTAVAIL: not a member
    }
    pb::MulticastMembership* membership = socket->add_memberships();
    membership->set_group(group.address);
    membership->set_interface(group.interface);
    membership->set_mode(filter.get()->gf_fmode);
    size_t source_bytes = group.family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
    for (uint32_t i = 0; i < std::min(filter.get()->gf_numsrc, kMaxSources); ++i) {
      membership->add_sources(reinterpret_cast<const char*>(&filter.get()->gf_slist[i]), source_bytes);
    }
  }
}

void restore_memberships(RestoreContext& context, const pb::OpenFile& file, int fd) {
  const pb::InetSocket& socket = inet_state(file);
  for (const pb::MulticastMembership& membership : socket.memberships()) {
    unsigned interface = ::if_nametoindex(membership.interface().c_str());
    if (interface != 0 && join(fd, level_of(socket.family()), interface, membership) == 0) continue;
    context.note(fmt::format("{} is no longer a member of multicast group {} on interface {}: {}", describe(file),
                             address_text(membership.group()), membership.interface(), std::strerror(errno)));
  }
}

}  // namespace vmckpt
