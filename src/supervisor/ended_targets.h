// What is kept of targets that have ended: their status, their log and their last image, for a day.
#pragma once

#include <string>
#include <vector>

#include "supervisor/control.pb.h"

namespace vmckpt {

// Written by the supervisor when its target has ended; takes the place of an earlier one of the same name. What cannot be
// written is not kept: nobody is left who could be told.
void remember_ended(const pb::EndedTarget& target);

// The caller's, of the last day, the latest first. Older ones are removed.
std::vector<pb::EndedTarget> list_ended();

// "ended 3 min ago with status 1", "was killed by signal 9 (Killed) 2 h ago".
std::string how_it_ended(const pb::EndedTarget& target);

}  // namespace vmckpt
