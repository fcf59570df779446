// Unread data of a socket, copied without taking it out.
#pragma once

#include "image/descriptors.pb.h"
#include "modules/descriptor_module.h"
#include "modules/socket.pb.h"

namespace vmckpt {

using SocketMessages = google::protobuf::RepeatedPtrField<pb::SocketMessage>;

// A stream gives one message with all bytes, a packet socket one for each. File descriptors on their way (SCM_RIGHTS)
// are refused: what they refer to may be anything.
Result<void> save_socket_queue(const TargetFile& file, int fd, SocketMessages* messages);

// TCP: all unread bytes.
Result<std::string> peek_stream(const TargetFile& file, int fd);

}  // namespace vmckpt
