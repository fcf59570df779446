#include "tracer/remote_memory.h"

#include <sys/uio.h>

namespace vmckpt {

Result<void> read_memory(pid_t pid, RemoteAddr address, void* to, size_t bytes) {
  char* next = static_cast<char*>(to);
  while (bytes > 0) {
    iovec local{next, bytes}, remote{reinterpret_cast<void*>(address.value()), bytes};
    ssize_t got = ::process_vm_readv(pid, &local, 1, &remote, 1, 0);
    if (got <= 0) return errno_error(fmt::format("read {} bytes at {} of process {}", bytes, address, pid));
    next += got;
    address += static_cast<uint64_t>(got);
    bytes -= static_cast<size_t>(got);
  }
  return {};
}

Result<void> write_memory(pid_t pid, RemoteAddr address, const void* from, size_t bytes) {
  const char* next = static_cast<const char*>(from);
  while (bytes > 0) {
    iovec local{const_cast<char*>(next), bytes}, remote{reinterpret_cast<void*>(address.value()), bytes};
    ssize_t put = ::process_vm_writev(pid, &local, 1, &remote, 1, 0);
    if (put <= 0) return errno_error(fmt::format("write {} bytes at {} of process {}", bytes, address, pid));
    next += put;
    address += static_cast<uint64_t>(put);
    bytes -= static_cast<size_t>(put);
  }
  return {};
}

}  // namespace vmckpt
