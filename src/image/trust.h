// An image is code: whoever restarts it lets it run with his own rights. So the file must be one that only its user, or root,
// could have written. (Checksums find damage, not malice: they are no signature.)
#pragma once

#include <string>

#include "core/result.h"

namespace vmckpt {

// Whether the caller may restart the image open as `fd`: owned by him or by root, and writable by nobody else.
Result<void> check_image_trusted(int fd, const std::string& path);

}  // namespace vmckpt
