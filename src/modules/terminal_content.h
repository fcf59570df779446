// Bytes on their way through a pseudo terminal whose both sides are in the target.
#pragma once

#include "modules/descriptor_module.h"

namespace vmckpt {

// Copies what waits on both sides, if that can be done without risk; otherwise notes that it is not in the image.
// `master` and `slave` are duplicates of the target's descriptors.
Result<void> save_terminal_content(SaveContext& context, int master, int slave, pb::Terminal* terminal);

// The terminal has its settings already; `master` and `slave` do not block.
Result<void> restore_terminal_content(const pb::Terminal& terminal, int master, int slave);

}  // namespace vmckpt
