// The target as its supervisor knows it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <sys/types.h>

#include "core/remote_addr.h"
#include "image/writer.h"
#include "memory/address_space.h"
#include "modules/namespaces.h"
#include "tracer/interrupted_calls.h"

namespace vmckpt {

struct KvmHost;

struct Target {
  std::string name;
  std::string image_dir;
  std::string log;               // where a detached target's output goes; empty: where the caller had it
  uint64_t images_numbered = 0;  // highest number ever given to an image of its own
  std::vector<std::string> command;
  Id128 target_id{};       // made at launch, kept by every restart
  Id128 parent_image_id{};  // image it was restarted from, or zeros
  uint32_t generation = 0;  // restarts behind it
  bool launch_filter = true;  // launch's system call filter is in force
  pid_t pid = 0;              // its first process, as the supervisor sees it
  pid_t namespace_init = 0;   // PID 1 of its own PID namespace, when restart made one
  Namespaces namespaces;      // that it was started in; empty: the supervisor's
  BackingImage backing;       // where its memory lies after a restart
  InterruptedCalls interrupted;  // calls that earlier checkpoints made threads begin anew
  std::shared_ptr<KvmHost> kvm;  // this host's KVM, once the target has used it
  RemoteAddr ledger_address;  // where the recorder's ledger was last time, if that is known
};

}  // namespace vmckpt
