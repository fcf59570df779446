// Before anything is started: can this host, this caller, restart this image? All problems at once.
#pragma once

#include <string>
#include <vector>

#include "core/result.h"
#include "image/reader.h"
#include "memory/file_access.h"
#include "modules/host.h"

namespace vmckpt {

Result<void> preflight(const ImageReader& image, CpuCheck cpu_check, GuestClock guest_clock, FilePolicy files,
                       std::vector<std::string>& notes);

}  // namespace vmckpt
