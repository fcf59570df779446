// Socket options: what getsockopt tells and setsockopt takes, for every kind of socket.
#pragma once

#include "modules/descriptor_module.h"
#include "modules/socket.pb.h"

namespace vmckpt {

using SocketOptions = google::protobuf::RepeatedPtrField<pb::SocketOption>;

// All options that differ from those of a fresh socket of the same kind. A socket of another network namespace is refused.
Result<void> save_socket_options(SaveContext& context, const TargetFile& file, int fd, SocketOptions* options);

enum class OptionStage {
  kBeforeBind,  // what bind, listen and connect act on: address reuse, buffers, IPV6_V6ONLY ...
  kRoute,       // before bind too, but after a connection over the loopback interface, which it would lead astray
  kAfterwards,  // the rest, when queues are filled: some would hold data back
};
void restore_socket_options(RestoreContext& context, const pb::OpenFile& file, const SocketOptions& options, int fd,
                            OptionStage stage);

// The int value of a saved option, 0 when it has its default.
int saved_option(const SocketOptions& options, int level, int name);
Result<void> set_option(int fd, int level, int name, int value, const std::string& what);
int get_option(int fd, int level, int name);  // 0 when it cannot be read

}  // namespace vmckpt
