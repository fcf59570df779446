// What this host can do for checkpoint and restart. Every probe tries the thing itself, since version numbers say little
// about hardened kernels, containers and security modules; whatever could do harm is tried in a forked child.
#pragma once

#include <string>
#include <vector>

namespace vmckpt {

enum class ProbeState {
  kOk,
  kLimited,  // works with a restriction that the reason names
  kMissing,
};

struct Probe {
  std::string name;
  ProbeState state = ProbeState::kOk;
  bool required = false;  // missing means that checkpoint or restart cannot work at all
  std::string reason;
  std::string cure;  // empty when nothing needs to be done
};

const char* probe_state_name(ProbeState state);

// Tries everything; takes well under a second. `image_dir` is where images would go.
std::vector<Probe> run_probes(const std::string& image_dir);

// No required probe is missing.
bool host_is_usable(const std::vector<Probe>& probes);

}  // namespace vmckpt
