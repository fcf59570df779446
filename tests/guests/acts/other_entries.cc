// System calls by the 32-bit entry (int $0x80) of a 64-bit program: threads that block in them go on, and a thread whose call
// ends is not ended itself. Kernels without CONFIG_IA32_EMULATION answer SIGSEGV; then there is nothing to see.

#include <sys/mman.h>

#include <atomic>
#include <thread>

#include "act.h"

constexpr long kRead32 = 3, kGetpid32 = 20, kNanosleep32 = 162;

static long call_32(long number, long a, long b, long c) {
  long result;
  asm volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c) : "memory", "r8", "r9", "r10", "r11");
  return static_cast<int>(result);
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  struct sigaction action {};
  action.sa_handler = [](int) { act::skip("int $0x80 (the kernel has no 32-bit entry)"); };
  MUST(sigaction(SIGSEGV, &action, nullptr));
  act::expect_equal("getpid", getpid(), call_32(kGetpid32, 0, 0, 0));

  int* low = MUST(static_cast<int*>(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0)));
  low[0] = 2;  // struct timespec of 32-bit programs
  int ends[2];
  MUST(pipe2(ends, O_CLOEXEC));
  std::atomic<long> slept{-99}, got{-99};
  std::thread sleeper([&] { slept = call_32(kNanosleep32, reinterpret_cast<long>(low), 0, 0); });
  std::thread reader([&] { got = call_32(kRead32, ends[0], reinterpret_cast<long>(low + 4), 2); });
  act::sleep_ms(100);
  act::intermission();
  act::expect_equal("read still blocks", -99, got.load());
  MUST(write(ends[1], "ab", 2));
  if (act::eventually("read ends", [&] { return got != -99; })) reader.join();
  else reader.detach();
  if (act::eventually("nanosleep ends", [&] { return slept != -99; })) sleeper.join();
  else sleeper.detach();
  act::expect_equal("read", 2, got.load());
  act::expect_equal("nanosleep", 0, slept.load());
  act::expect_equal("getpid", getpid(), call_32(kGetpid32, 0, 0, 0));
  return act::finish();
}
