// SPDX-License-Identifier: Apache-2.0
//
// All state of a paused VM that KVM tells, as JSON: what must be the same again after a restart.

#pragma once

#include <string>
#include <vector>

#include "machine.h"

namespace tiny {

// An ioctl that this KVM lacks is left out.
std::string dump_state(const Machine& machine, const std::vector<int>& vcpus);

}  // namespace tiny
