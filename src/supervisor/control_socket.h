// Where supervisors listen: one socket per target, NAME.sock, in a folder that only its owner may enter. Whoever reaches the
// socket is asked for his user id by the kernel (SO_PEERCRED): only the same user and root may control a target.
#pragma once

#include <string>
#include <vector>

#include "core/fd.h"
#include "core/result.h"
#include "supervisor/control.pb.h"

namespace vmckpt {

constexpr size_t kMaxControlBytes = 64 * 1024;

// $VMCKPT_RUNTIME_DIR, $XDG_RUNTIME_DIR/vmckpt or /tmp/vmckpt-UID; made (0700) when missing, refused when somebody else's.
Result<std::string> runtime_directory();

// A name that can be a file name: letters, digits, '.', '_', '-', at most 100, not starting with '.'.
Result<void> check_name(const std::string& name);
// The default name of a target: its command's file name, with a number behind it while that is taken.
std::string free_name(const std::string& directory, const std::string& command);

class ControlListener {
 public:
  static Result<ControlListener> create(const std::string& name);
  ControlListener(ControlListener&& other) noexcept;
  ControlListener& operator=(ControlListener&&) = delete;
  ~ControlListener();
  void close();  // removes the socket's file: the name is free

  int fd() const { return fd_.get(); }
  // A connection of somebody who may control the target; an Error is a reason to close it.
  Result<Fd> accept() const;

 private:
  ControlListener() = default;
  std::string path_;
  pid_t owner_ = 0;  // only the process that made it removes it, not its children
  Fd fd_;
};

Result<void> send_reply(int fd, const pb::ControlReply& reply);

// The command's side.
Result<Fd> connect_to(const std::string& socket_path);
std::vector<std::string> list_sockets();
// Removes a socket of ours that nobody listens to any more.
void remove_if_stale(const std::string& socket_path);
Result<void> send_request(int fd, const pb::ControlRequest& request);
Result<pb::ControlReply> receive_reply(int fd);
Result<pb::Status> ask_status(const std::string& socket_path);
// The target that `name_or_pid` means; empty: the only one there is.
Result<Fd> find_target(const std::string& name_or_pid);

}  // namespace vmckpt
