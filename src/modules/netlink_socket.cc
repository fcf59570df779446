// Netlink sockets: connections to the kernel, by which programs ask about networks (NETLINK_ROUTE), sockets (NETLINK_SOCK_DIAG)
// and hear of devices (NETLINK_KOBJECT_UEVENT).
//
// Made by socket, bind (of itself at the first send), connect; groups are joined by bind and NETLINK_ADD_MEMBERSHIP. Saved:
// address, peer, groups, options. With these protocols the kernel keeps nothing else about a socket; others, where it does
// (netfilter's queues, an audit daemon, frames that were registered for through NETLINK_GENERIC), are refused.
//
// What lies in the socket unread came from the kernel, and nobody else can put it back: neither answers nor news, a rest of an
// answer that the kernel has not sent yet, and word of an overrun. So a socket that has any is refused; the program soon reads
// it. News of what happens while the program is away is not heard, as after an overrun, and noted.
//
// Restored: the same address, which libraries compare answers with. Where another socket of the host has it, one that the
// kernel had chosen becomes another one, noted; one that the program had chosen fails the preflight. That a socket was
// connected to the kernel itself (which keeps other programs' messages away) only netlink_diag tells; without it (a kernel
// without CONFIG_NETLINK_DIAG) this is lost. Sources: netlink(7), rtnetlink(7), net/netlink/af_netlink.c
// (netlink_native_seq_show for /proc/net/netlink).
#include <algorithm>
#include <map>

#include <linux/netlink.h>
#include <poll.h>
#include <sys/socket.h>

#include "core/proc.h"
#include "modules/descriptor_module.h"
#include "modules/netlink_diag.h"
#include "modules/netlink_socket.pb.h"
#include "modules/socket_options.h"

namespace vmckpt {
namespace {

constexpr int kSupported[] = {NETLINK_ROUTE, NETLINK_SOCK_DIAG, NETLINK_KOBJECT_UEVENT};
constexpr uint32_t kMaxGroups = 4096;
// An address that nobody asks for is the process's number, or where that is taken one from here on (netlink_autobind).
constexpr uint32_t kFirstRover = 0x80000000;

// NETLINK_GET_STRICT_CHK is Linux 4.20's. The kernel answers each with an int, NETLINK_LISTEN_ALL_NSID since Linux 6.9 only.
constexpr int kOptions[] = {NETLINK_PKTINFO, NETLINK_BROADCAST_ERROR, NETLINK_NO_ENOBUFS, NETLINK_LISTEN_ALL_NSID,
                            NETLINK_CAP_ACK, NETLINK_EXT_ACK,         NETLINK_GET_STRICT_CHK};

bool is_supported(int protocol) {
  return std::find(std::begin(kSupported), std::end(kSupported), protocol) != std::end(kSupported);
}

bool recognise(const TargetFile& file) { return file.socket_domain == AF_NETLINK && is_supported(file.socket_protocol); }

// What save() below could have written: restart has rights that the program may not have had.
bool is_well_formed(const pb::NetlinkSocket& socket) {
  if (!is_supported(socket.protocol()) || (socket.type() != SOCK_RAW && socket.type() != SOCK_DGRAM)) return false;
  uint32_t before = 0;
  for (uint32_t group : socket.groups()) {
    if (group <= before || group > kMaxGroups) return false;
    before = group;
  }
  return std::all_of(socket.netlink_options().begin(), socket.netlink_options().end(), [](const pb::SocketOption& option) {
    const bool known = std::find(std::begin(kOptions), std::end(kOptions), option.name()) != std::end(kOptions);
    return option.level() == SOL_NETLINK && known && option.value().size() == sizeof(int);
  });
}

Error unread(const TargetFile& file, const char* what) {
  return error(fmt::format("{} is a netlink socket with {}, which only the kernel can send", file.describe(), what),
               "checkpoint again when the program has read it");
}

// Nothing here takes anything away: poll tells, where recv would clear the error.
Result<void> refuse_unread(const TargetFile& file, int fd) {
  pollfd poll{fd, POLLIN, 0};
  if (::poll(&poll, 1, 0) < 0) return errno_error("look into " + file.describe());
  if ((poll.revents & POLLERR) != 0) return unread(file, "an error that the program has not seen");
  if ((poll.revents & POLLIN) != 0) return unread(file, "unread messages");
  return {};
}

// One bit for each group, in words of 32.
Result<void> save_groups(const TargetFile& file, int fd, pb::NetlinkSocket* socket) {
  uint32_t words[kMaxGroups / 32] = {};
  socklen_t bytes = sizeof words;
  if (::getsockopt(fd, SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS, words, &bytes) != 0) {
    return errno_error("ask for the groups of " + file.describe());
  }
  if (bytes > sizeof words) return error(file.describe() + " may be in more groups than vmckpt knows", "please report this");
  // All words: kernels before 6.4 fill more of them than they say (net/netlink/af_netlink.c, NETLINK_LIST_MEMBERSHIPS).
  for (uint32_t group = 1; group <= kMaxGroups; ++group) {
    if ((words[(group - 1) / 32] >> ((group - 1) % 32) & 1) != 0) socket->add_groups(group);
  }
  return {};
}

void add_option(int name, int value, pb::NetlinkSocket* socket) {
  pb::SocketOption* option = socket->add_netlink_options();
  option->set_level(SOL_NETLINK);
  option->set_name(name);
  option->set_value(&value, sizeof value);
}

Result<void> save(SaveContext& context, const TargetFile& file, int fd, pb::OpenFile* saved) {
  pb::NetlinkSocket* socket = saved->MutableExtension(pb::netlink_socket);
  socket->set_type(file.socket_type);
  socket->set_protocol(file.socket_protocol);
  sockaddr_nl own{}, peer{};
  socklen_t bytes = sizeof own;
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&own), &bytes) != 0) {
    return errno_error("ask for the address of " + file.describe());
  }
  socket->set_port(own.nl_pid);
  const auto own_number = static_cast<uint32_t>(context.save.world.pid_in_target());
  socket->set_port_of_the_kernel(own.nl_pid == own_number || own.nl_pid >= kFirstRover);
  VMCKPT_TRY(refuse_unread(file, fd));
  bytes = sizeof peer;
  if (::getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &bytes) == 0) {
    socket->set_peer_port(peer.nl_pid);
    socket->set_peer_groups(peer.nl_groups);
  }
  VMCKPT_TRY(save_groups(file, fd, socket));
  for (int name : kOptions) {
    int value = 0;
    bytes = sizeof value;
    if (::getsockopt(fd, SOL_NETLINK, name, &value, &bytes) == 0 && value != 0) add_option(name, value, socket);
  }
  if (socket->groups_size() != 0) {
    context.note(file.describe() +
                 " hears of changes of networks or devices; a restarted program does not hear of those in the meantime");
  }
  return save_socket_options(context, file, fd, socket->mutable_options());
}

// The kernel's list of all sockets is read once. One that was never bound has never asked for anything, and is not in it.
Result<void> refuse_answers_under_way(SaveContext& context) {
  std::map<uint64_t, bool> under_way;  // by inode
  std::string path;
  for (const TargetFile& file : context.files) {
    if (file.saved->GetExtension(pb::netlink_socket).port() == 0) continue;
    if (path.empty()) {
      path = fmt::format("/proc/{}/net/netlink", context.pid());
      const std::string text = VMCKPT_TRY(read_whole_file(path));
      for (std::string_view line : split_lines(text)) {
        // sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode
        const auto words = split_words(line);
        if (words.size() >= 10) under_way[static_cast<uint64_t>(parse_number(words[9]))] = words[6] != "0";
      }
    }
    const auto socket = under_way.find(file.status.st_ino);
    if (socket == under_way.end()) {
      return error(fmt::format("{} is not in {}", file.describe(), path), "let the program close it before the checkpoint");
    }
    if (socket->second) return unread(file, "the rest of an answer under way");
  }
  return {};
}

void add_facts(const NetlinkSocketFacts& facts, pb::NetlinkSocket* socket) {
  if (facts.connected) socket->set_connected(true);
  const bool is_known = std::any_of(socket->netlink_options().begin(), socket->netlink_options().end(),
                                    [](const pb::SocketOption& option) { return option.name() == NETLINK_LISTEN_ALL_NSID; });
  if (facts.listens_everywhere && !is_known) add_option(NETLINK_LISTEN_ALL_NSID, 1, socket);
}

// What the kernel tells of all sockets at once.
Result<void> complete(SaveContext& context) {
  VMCKPT_TRY(refuse_answers_under_way(context));
  std::map<uint64_t, NetlinkSocketFacts> facts;
  bool asked = false;
  for (const TargetFile& file : context.files) {
    if (!file.saved->HasExtension(pb::netlink_socket)) continue;
    pb::NetlinkSocket* socket = file.saved->MutableExtension(pb::netlink_socket);
    if (socket->port() == 0) continue;
    if (!asked) facts = list_netlink_sockets();
    asked = true;
    // The kernel shows 32 bits of the inode number.
    if (auto found = facts.find(static_cast<uint32_t>(file.status.st_ino)); found != facts.end())
      add_facts(found->second, socket);
  }
  return {};
}

// Address and groups. `moved`: it has another address than it had.
Result<void> take_place(const pb::OpenFile& file, int fd, bool& moved) {
  const pb::NetlinkSocket& socket = file.GetExtension(pb::netlink_socket);
  const std::string what = describe(file);
  if (socket.port() != 0) {
    sockaddr_nl own{};
    own.nl_family = AF_NETLINK;
    own.nl_pid = socket.port();
    int bound = ::bind(fd, reinterpret_cast<const sockaddr*>(&own), sizeof own);
    if (bound != 0 && errno == EADDRINUSE && socket.port_of_the_kernel()) {
      own.nl_pid = 0;  // the kernel's choice again
      bound = ::bind(fd, reinterpret_cast<const sockaddr*>(&own), sizeof own);
      moved = true;
    }
    if (bound != 0) {
      return errno_error(fmt::format("give {} its netlink address {} again", what, socket.port()),
                         "end the program that has it now (/proc/net/netlink shows its sockets)");
    }
  }
  for (uint32_t group : socket.groups()) {
    const int number = static_cast<int>(group);
    if (::setsockopt(fd, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &number, sizeof number) == 0) continue;
    return errno_error(fmt::format("let {} hear netlink group {} again", what, group),
                       "restart it with the rights it was launched with (CAP_NET_ADMIN, for some groups)");
  }
  return {};
}

Result<Fd> make(const pb::OpenFile& file) {
  const pb::NetlinkSocket& socket = file.GetExtension(pb::netlink_socket);
  if (!is_well_formed(socket)) return error(describe(file) + " is no netlink socket that vmckpt saves");
  Fd fd(::socket(AF_NETLINK, socket.type() | SOCK_CLOEXEC, socket.protocol()));
  if (!fd) return errno_error(fmt::format("make a netlink socket of protocol {} for {}", socket.protocol(), describe(file)));
  return fd;
}

void check(CheckContext& context) {
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (!file.HasExtension(pb::netlink_socket)) continue;
    auto fd = make(file);
    bool moved = false;  // said at the restart
    auto placed = fd.ok() ? take_place(file, fd->get(), moved) : Result<void>(fd.error());
    if (!placed.ok()) context.problem(placed.error());
  }
}

Result<void> restore(RestoreContext& context) {
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (!file.HasExtension(pb::netlink_socket)) continue;
    const pb::NetlinkSocket& socket = file.GetExtension(pb::netlink_socket);
    Fd fd = VMCKPT_TRY(make(file));
    // Before it hears anything: what comes before its filter is in force would be what the program does not expect.
    for (OptionStage stage : {OptionStage::kBeforeBind, OptionStage::kRoute, OptionStage::kAfterwards}) {
      restore_socket_options(context, file, socket.options(), fd.get(), stage);
    }
    for (const pb::SocketOption& option : socket.netlink_options()) {
      if (::setsockopt(fd.get(), option.level(), option.name(), option.value().data(), sizeof(int)) == 0) continue;
      context.note(fmt::format("{}: netlink option {} cannot be set here: {}", describe(file), option.name(),
                               std::strerror(errno)));
    }
    bool moved = false;
    VMCKPT_TRY(take_place(file, fd.get(), moved));
    if (moved) context.note(describe(file) + ": another socket has its netlink address, so it has got another one");
    if (socket.connected() || socket.peer_port() != 0 || socket.peer_groups() != 0) {
      sockaddr_nl peer{};
      peer.nl_family = AF_NETLINK;
      peer.nl_pid = socket.peer_port();
      peer.nl_groups = socket.peer_groups();
      if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&peer), sizeof peer) != 0) {
        return errno_error(fmt::format("connect {} to netlink address {}", describe(file), peer.nl_pid));
      }
    }
    VMCKPT_TRY(context.put(file, std::move(fd)));
  }
  return {};
}

}  // namespace

const DescriptorModule kNetlinkSocketModule{"netlink socket", recognise, save, complete, check, restore};

}  // namespace vmckpt
