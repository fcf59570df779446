// Memory of another process, by address there.
#pragma once

#include <cstddef>

#include <sys/types.h>

#include "core/remote_addr.h"
#include "core/result.h"

namespace vmckpt {

Result<void> read_memory(pid_t pid, RemoteAddr address, void* to, size_t bytes);
Result<void> write_memory(pid_t pid, RemoteAddr address, const void* from, size_t bytes);

}  // namespace vmckpt
