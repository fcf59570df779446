// Where the image of a checkpoint goes.
#pragma once

#include <string>

#include "core/result.h"
#include "image/writer.h"
#include "supervisor/target.h"

namespace vmckpt {

// Decides the final name before anything is stopped, so that a refused name costs nothing. `output`: an absolute path, or empty:
// IMAGE_DIR/NAME-N.ckpt.
Result<ImageDestination> choose_destination(const Target& target, const std::string& output);

}  // namespace vmckpt
