// Options that getsockopt tells are compared with those of a fresh socket; what differs is saved and set again. An
// option that follows the host's own default therefore follows the new host's default after a restart.
//
// Buffer sizes: the kernel doubles what setsockopt gives, so half is set; SO_BUF_LOCK (Linux 5.15) tells whether the
// program has set them, otherwise TCP adapts them and they are left alone. It is put back last, for putting queues back
// takes buffers of a certain size. Classic BPF filters are read with SO_GET_FILTER and attached again; extended ones
// cannot be read and are refused. Multicast memberships: multicast.cc. A value that this host refuses is noted. Sources:
// socket(7), tcp(7), ip(7), ipv6(7), unix(7), raw(7), net/core/sock.c.
#include "modules/socket_options.h"

#include <algorithm>
#include <vector>

#include <linux/filter.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <netinet/udp.h>
#include <sys/socket.h>
#include <unistd.h>

#include "modules/socket.pb.h"

namespace vmckpt {
namespace {

constexpr int kSoNetnsCookie = 71; // SO_NETNS_COOKIE, Linux 5.14: a number that no two network namespaces have
constexpr int kSoBufLock = 72;     // SO_BUF_LOCK: bit 0 send buffer, bit 1 receive buffer set by the program
constexpr int kSoPassPidfd = 76;   // SO_PASSPIDFD
constexpr int kSoPassRights = 83;  // SO_PASSRIGHTS, Linux 6.16: 0 turns descriptors away
constexpr int kMulticastAll = 49;  // IP_MULTICAST_ALL
constexpr size_t kMaxOptionBytes = 64;

// Which sockets have the option. Asking costs a system call within the pause, so nobody is asked what cannot matter.
// kOther: of any other family.
enum Who : unsigned {
  kTcp = 1, kUdp = 2, kUnix = 4, kRaw = 8, kOther = 16,
  kAll = kTcp | kUdp | kUnix | kOther, kInternet = kTcp | kUdp
};

struct Option {
  int level;
  int name;
  unsigned who;
  OptionStage stage;
};

constexpr OptionStage kEarly = OptionStage::kBeforeBind;
constexpr OptionStage kRoute = OptionStage::kRoute;
constexpr OptionStage kLate = OptionStage::kAfterwards;
constexpr int kUdpNoCheck6Tx = 101, kUdpNoCheck6Rx = 102;
constexpr int kIpLocalPortRange = 51, kIpv6MulticastAll = 29, kTcpInq = 36;
constexpr int kIcmpFilter = 1, kIpv6HeaderIncluded = 36;

constexpr Option kOptions[] = {
    {SOL_SOCKET, SO_REUSEADDR, kInternet, kEarly},
    {SOL_SOCKET, SO_REUSEPORT, kInternet, kEarly},
    {SOL_SOCKET, SO_BINDTODEVICE, kInternet, kRoute},
    {SOL_SOCKET, SO_MARK, kInternet, kRoute},
    {SOL_SOCKET, SO_SNDBUF, kAll, kEarly},
    {SOL_SOCKET, SO_RCVBUF, kAll, kEarly},
    {SOL_SOCKET, SO_PASSCRED, kUnix | kOther, kEarly},
    {SOL_SOCKET, kSoPassPidfd, kUnix, kEarly},
    {SOL_SOCKET, kSoPassRights, kUnix, kLate},
    {SOL_SOCKET, SO_PASSSEC, kUnix, kLate},
    {SOL_SOCKET, SO_PEEK_OFF, kUnix | kUdp, kLate},
    {SOL_SOCKET, SO_RCVTIMEO, kAll, kLate},
    {SOL_SOCKET, SO_SNDTIMEO, kAll, kLate},
    {SOL_SOCKET, SO_RCVLOWAT, kAll, kLate},
    {SOL_SOCKET, SO_TIMESTAMP, kUnix | kUdp | kOther, kLate},
    {SOL_SOCKET, SO_TIMESTAMPNS, kUnix | kUdp | kOther, kLate},
    {SOL_SOCKET, SO_TIMESTAMPING, kInternet, kLate},
    {SOL_SOCKET, SO_KEEPALIVE, kTcp, kLate},
    {SOL_SOCKET, SO_OOBINLINE, kTcp, kLate},
    {SOL_SOCKET, SO_LINGER, kTcp, kLate},
    {SOL_SOCKET, SO_PRIORITY, kInternet, kLate},
    {SOL_SOCKET, SO_ZEROCOPY, kInternet, kLate},
    {SOL_SOCKET, SO_BROADCAST, kUdp, kLate},
    {SOL_SOCKET, SO_DONTROUTE, kInternet, kLate},
    {SOL_SOCKET, SO_MAX_PACING_RATE, kInternet, kLate},
    {SOL_SOCKET, SO_RXQ_OVFL, kUdp | kOther, kLate},
    {SOL_SOCKET, SO_NO_CHECK, kUdp, kLate},
    {SOL_SOCKET, SO_LOCK_FILTER, kUdp | kOther, kLate},
    {IPPROTO_IP, IP_FREEBIND, kInternet, kEarly},
    {IPPROTO_IP, IP_TRANSPARENT, kInternet, kEarly},
    {IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, kInternet, kLate},
    {IPPROTO_IP, kIpLocalPortRange, kInternet, kLate},
    {IPPROTO_IP, IP_MINTTL, kInternet, kLate},
    {IPPROTO_IP, IP_UNICAST_IF, kUdp, kLate},
    {IPPROTO_IP, IP_HDRINCL, kRaw, kEarly},
    {SOL_RAW, kIcmpFilter, kRaw, kEarly},
    {IPPROTO_IP, IP_TOS, kInternet, kEarly},
    {IPPROTO_IP, IP_TTL, kInternet, kLate},
    {IPPROTO_IP, IP_MTU_DISCOVER, kInternet, kLate},
    {IPPROTO_IP, IP_RECVERR, kUdp, kLate},
    {IPPROTO_IP, IP_PKTINFO, kUdp, kLate},
    {IPPROTO_IP, IP_RECVTTL, kUdp, kLate},
    {IPPROTO_IP, IP_RECVTOS, kUdp, kLate},
    {IPPROTO_IP, IP_RECVORIGDSTADDR, kUdp, kLate},
    {IPPROTO_IP, IP_RECVOPTS, kUdp, kLate},
    {IPPROTO_IP, IP_RETOPTS, kUdp, kLate},
    {IPPROTO_IP, IP_CHECKSUM, kUdp, kLate},
    {IPPROTO_IP, IP_MULTICAST_IF, kUdp, kLate},
    {IPPROTO_IP, IP_MULTICAST_TTL, kUdp, kLate},
    {IPPROTO_IP, IP_MULTICAST_LOOP, kUdp, kLate},
    {IPPROTO_IP, kMulticastAll, kUdp, kLate},
    {IPPROTO_IPV6, IPV6_V6ONLY, kInternet, kEarly},
    {IPPROTO_IPV6, IPV6_FREEBIND, kInternet, kEarly},
    {IPPROTO_IPV6, IPV6_TRANSPARENT, kInternet, kEarly},
    {IPPROTO_IPV6, IPV6_TCLASS, kInternet, kEarly},
    {IPPROTO_IPV6, IPV6_UNICAST_HOPS, kInternet, kLate},
    {IPPROTO_IPV6, IPV6_MTU_DISCOVER, kInternet, kLate},
    {IPPROTO_IPV6, IPV6_DONTFRAG, kInternet, kLate},
    {IPPROTO_IPV6, IPV6_RECVERR, kUdp, kLate},
    {IPPROTO_IPV6, IPV6_RECVPKTINFO, kUdp, kLate},
    {IPPROTO_IPV6, IPV6_RECVHOPLIMIT, kUdp, kLate},
    {IPPROTO_IPV6, IPV6_RECVTCLASS, kUdp, kLate},
    {IPPROTO_IPV6, IPV6_RECVORIGDSTADDR, kUdp, kLate},
    {IPPROTO_IPV6, IPV6_RECVPATHMTU, kUdp, kLate},
    {IPPROTO_IPV6, IPV6_RECVHOPOPTS, kUdp, kLate},
    {IPPROTO_IPV6, IPV6_RECVRTHDR, kUdp, kLate},
    {IPPROTO_IPV6, IPV6_RECVDSTOPTS, kUdp, kLate},
    {IPPROTO_IPV6, IPV6_MINHOPCOUNT, kInternet, kLate},
    {IPPROTO_IPV6, IPV6_UNICAST_IF, kUdp, kLate},
    {IPPROTO_IPV6, IPV6_AUTOFLOWLABEL, kInternet, kLate},
    {IPPROTO_IPV6, kIpv6HeaderIncluded, kRaw, kEarly},
    {IPPROTO_IPV6, IPV6_CHECKSUM, kRaw, kEarly},
    {IPPROTO_ICMPV6, kIcmpFilter, kRaw, kEarly},
    {IPPROTO_IPV6, kIpv6MulticastAll, kUdp, kLate},
    {IPPROTO_IPV6, IPV6_MULTICAST_IF, kUdp, kLate},
    {IPPROTO_IPV6, IPV6_MULTICAST_HOPS, kUdp, kLate},
    {IPPROTO_IPV6, IPV6_MULTICAST_LOOP, kUdp, kLate},
    {IPPROTO_TCP, TCP_CONGESTION, kTcp, kEarly},
    {IPPROTO_TCP, TCP_DEFER_ACCEPT, kTcp, kEarly},
    {IPPROTO_TCP, TCP_FASTOPEN, kTcp, kEarly},
    {IPPROTO_TCP, TCP_SYNCNT, kTcp, kEarly},
    {IPPROTO_TCP, TCP_NODELAY, kTcp, kLate},
    {IPPROTO_TCP, TCP_CORK, kTcp, kLate},
    {IPPROTO_TCP, TCP_KEEPIDLE, kTcp, kLate},
    {IPPROTO_TCP, TCP_KEEPINTVL, kTcp, kLate},
    {IPPROTO_TCP, TCP_KEEPCNT, kTcp, kLate},
    {IPPROTO_TCP, TCP_LINGER2, kTcp, kLate},
    {IPPROTO_TCP, TCP_USER_TIMEOUT, kTcp, kLate},
    {IPPROTO_TCP, TCP_NOTSENT_LOWAT, kTcp, kLate},
    {IPPROTO_TCP, TCP_SAVE_SYN, kTcp, kLate},
    {IPPROTO_TCP, TCP_FASTOPEN_CONNECT, kTcp, kLate},
    {IPPROTO_TCP, kTcpInq, kTcp, kLate},
    {IPPROTO_UDP, UDP_CORK, kUdp, kLate},
    {IPPROTO_UDP, UDP_SEGMENT, kUdp, kLate},
    {IPPROTO_UDP, UDP_GRO, kUdp, kLate},
    {IPPROTO_UDP, kUdpNoCheck6Tx, kUdp, kLate},
    {IPPROTO_UDP, kUdpNoCheck6Rx, kUdp, kLate},
    {SOL_SOCKET, kSoBufLock, kAll, kLate},  // last: setting a buffer's size locks it
};

bool applies(const Option& option, int domain, int type, int protocol) {
  unsigned who = type == SOCK_STREAM ? kTcp : type == SOCK_RAW ? kUdp | kRaw : kUdp;
  if (domain == AF_UNIX) who = kUnix;
  else if (domain != AF_INET && domain != AF_INET6) who = kOther;
  if ((option.who & who) == 0) return false;
  if (option.level == IPPROTO_IPV6) return domain == AF_INET6;
  if (option.level == SOL_RAW) return domain == AF_INET && protocol == IPPROTO_ICMP;
  if (option.level == IPPROTO_ICMPV6) return domain == AF_INET6 && protocol == IPPROTO_ICMPV6;
  return option.level != IPPROTO_UDP || protocol == IPPROTO_UDP;
}

// Empty where the kernel has no such option.
std::string read_option(int fd, const Option& option) {
  char value[kMaxOptionBytes];
  socklen_t bytes = sizeof value;
  if (::getsockopt(fd, option.level, option.name, value, &bytes) != 0) return {};
  return std::string(value, bytes);
}

const std::vector<std::string>& fresh_options(SaveContext& context, const TargetFile& file) {
  std::array<int, 3> kind{file.socket_domain, file.socket_type, file.socket_protocol};
  auto [entry, added] = context.socket_defaults.try_emplace(kind);
  if (!added) return entry->second;
  Fd fresh(::socket(file.socket_domain, file.socket_type | SOCK_CLOEXEC, file.socket_protocol));
  for (const Option& option : kOptions) {
    bool ask = fresh && applies(option, file.socket_domain, file.socket_type, file.socket_protocol);
    entry->second.push_back(ask ? read_option(fresh.get(), option) : std::string());
  }
  return entry->second;
}

// A socket stays in the network namespace that it was made in, wherever its program goes and whoever gets it.
Result<void> check_network_namespace(const TargetFile& file, int fd) {
  auto namespace_of = [](int socket) {
    uint64_t cookie = 0;  // what is known of it before Linux 5.14
    socklen_t bytes = sizeof cookie;
    return ::getsockopt(socket, SOL_SOCKET, kSoNetnsCookie, &cookie, &bytes) == 0 ? cookie : 0;
  };
  static const uint64_t own = namespace_of(Fd(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0)).get());
  const uint64_t cookie = namespace_of(fd);
  if (own == 0 || cookie == 0 || cookie == own) return {};
  return error(
      file.describe() + " is a socket of another network namespace than the program's, where restart cannot make it again",
      "let the program close it before the checkpoint, or start the program there (`ip netns exec ... vmckpt launch ...`)");
}

bool is_buffer(const pb::SocketOption& option) {
  return option.level() == SOL_SOCKET && (option.name() == SO_SNDBUF || option.name() == SO_RCVBUF);
}

// TCP adapts the buffers of a socket whose program leaves them alone.
bool set_by_program(int name, int locked) {
  if (name == SO_SNDBUF) return (locked & 1) != 0;
  if (name == SO_RCVBUF) return (locked & 2) != 0;
  return true;
}

Result<void> save_filter(const TargetFile& file, int fd, SocketOptions* options) {
  socklen_t instructions = 0;
  if (::getsockopt(fd, SOL_SOCKET, SO_GET_FILTER, nullptr, &instructions) != 0) {
    if (errno != EACCES) return {};
    return error(file.describe() + " has an extended BPF filter, which cannot be read",
                 "let the program detach it before the checkpoint");
  }
  if (instructions == 0) return {};
  std::string program(instructions * sizeof(sock_filter), '\0');
  if (::getsockopt(fd, SOL_SOCKET, SO_GET_FILTER, program.data(), &instructions) != 0) {
    return errno_error("read the filter of " + file.describe());
  }
  pb::SocketOption* option = options->Add();
  option->set_level(SOL_SOCKET);
  option->set_name(SO_ATTACH_FILTER);
  option->set_value(program);
  return {};
}

bool attach_filter(const pb::SocketOption& option, int fd) {
  std::vector<sock_filter> instructions(option.value().size() / sizeof(sock_filter));
  std::memcpy(instructions.data(), option.value().data(), instructions.size() * sizeof(sock_filter));
  sock_fprog program{static_cast<unsigned short>(instructions.size()), instructions.data()};
  return ::setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program) == 0;
}

bool set_buffer(const pb::SocketOption& option, int fd) {
  int doubled = 0;
  if (option.value().size() != sizeof doubled) return false;
  std::memcpy(&doubled, option.value().data(), sizeof doubled);
  int half = doubled / 2;
  if (::setsockopt(fd, SOL_SOCKET, option.name(), &half, sizeof half) != 0) return false;
  if (get_option(fd, SOL_SOCKET, option.name()) >= doubled) return true;
  // Larger than net.core.rmem_max or wmem_max allow an ordinary user.
  int force = option.name() == SO_SNDBUF ? SO_SNDBUFFORCE : SO_RCVBUFFORCE;
  return ::setsockopt(fd, SOL_SOCKET, force, &half, sizeof half) == 0;
}

bool set_saved(const pb::SocketOption& option, int fd) {
  if (is_buffer(option)) return set_buffer(option, fd);
  if (option.level() == SOL_SOCKET && option.name() == SO_ATTACH_FILTER) return attach_filter(option, fd);
  return ::setsockopt(fd, option.level(), option.name(), option.value().data(),
                      static_cast<socklen_t>(option.value().size())) == 0;
}

// Belongs to how a Unix socket is made (unix_socket_restore.cc).
bool is_about_peer(const pb::SocketOption& option) {
  return option.level() == SOL_SOCKET && option.name() == SO_PEERCRED;
}

OptionStage stage_of(const pb::SocketOption& saved) {
  for (const Option& option : kOptions) {
    if (option.level == saved.level() && option.name == saved.name()) return option.stage;
  }
  return kLate;
}

}  // namespace

Result<void> save_socket_options(SaveContext& context, const TargetFile& file, int fd, SocketOptions* options) {
  VMCKPT_TRY(check_network_namespace(file, fd));
  const std::vector<std::string>& fresh = fresh_options(context, file);
  int locked = 3;  // kernels that do not tell: taken as set by the program when different from a fresh socket's
  socklen_t bytes = sizeof locked;
  const bool locked_by_option = ::getsockopt(fd, SOL_SOCKET, kSoBufLock, &locked, &bytes) == 0;
  if (!locked_by_option) locked = file.socket_type == SOCK_STREAM ? 0 : 3;
  // Other sockets than TCP's keep the size they have, whether it is locked or not.
  if (file.socket_type != SOCK_STREAM || file.socket_domain == AF_UNIX) locked = 3;
  VMCKPT_TRY(save_filter(file, fd, options));
  for (size_t i = 0; i < std::size(kOptions); ++i) {
    const Option& option = kOptions[i];
    if (!applies(option, file.socket_domain, file.socket_type, file.socket_protocol)) continue;
    std::string value = read_option(fd, option);
    bool is_size = option.level == SOL_SOCKET && (option.name == SO_SNDBUF || option.name == SO_RCVBUF);
    if (value.empty() || (is_size && !set_by_program(option.name, locked))) continue;
    bool keep_anyway = is_size && file.socket_type == SOCK_STREAM && file.socket_domain != AF_UNIX && locked_by_option;
    if (value == fresh[i] && !keep_anyway) continue;
    pb::SocketOption* saved = options->Add();
    saved->set_level(option.level);
    saved->set_name(option.name);
    saved->set_value(value);
  }
  return {};
}

void restore_socket_options(RestoreContext& context, const pb::OpenFile& file, const SocketOptions& options, int fd,
                            OptionStage stage) {
  for (const pb::SocketOption& option : options) {
    if (stage_of(option) != stage || is_about_peer(option) || set_saved(option, fd)) continue;
    context.note(fmt::format("{}: socket option {} of level {} cannot be set here: {}", describe(file), option.name(),
                             option.level(), std::strerror(errno)));
  }
  if (stage != kLate || saved_option(options, SOL_SOCKET, kSoBufLock) != 0) return;
  int unlocked = 0;  // may have been locked on the way here; older kernels have no such option
  ::setsockopt(fd, SOL_SOCKET, kSoBufLock, &unlocked, sizeof unlocked);
}

int saved_option(const SocketOptions& options, int level, int name) {
  for (const pb::SocketOption& option : options) {
    int value = 0;
    if (option.level() != level || option.name() != name || option.value().size() < sizeof value) continue;
    std::memcpy(&value, option.value().data(), sizeof value);
    return value;
  }
  return 0;
}

Result<void> set_option(int fd, int level, int name, int value, const std::string& what) {
  if (::setsockopt(fd, level, name, &value, sizeof value) == 0) return {};
  return errno_error(fmt::format("set option {} of {}", name, what));
}

int get_option(int fd, int level, int name) {
  int value = 0;
  socklen_t bytes = sizeof value;
  return ::getsockopt(fd, level, name, &value, &bytes) == 0 ? value : 0;
}

}  // namespace vmckpt
