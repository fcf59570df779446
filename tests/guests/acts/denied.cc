// Tries the kernel interfaces that vmckpt denies at launch so that programs fall back, and prints what each said:
// "io_uring_setup: Function not implemented". Linux AIO is denied to calls that pass by libc and libaio.

#include <linux/aio_abi.h>
#include <linux/io_uring.h>

#include "act.h"

static void report(const char* name, long result) {
  std::printf("%s: %s\n", name, result < 0 ? strerror(errno) : "allowed");
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  io_uring_params parameters{};
  report("io_uring_setup", syscall(SYS_io_uring_setup, 4, &parameters));
  aio_context_t context = 0;
  long result;
  register long unlikely asm("r9") = 0;
  asm volatile("syscall" : "=a"(result) : "a"(SYS_io_setup), "D"(4), "S"(&context), "r"(unlikely) : "rcx", "r11", "memory");
  errno = static_cast<int>(-result);
  report("raw io_setup", result);
  report("io_setup", syscall(SYS_io_setup, 4, &context));

  act::intermission();

  return act::finish();
}
