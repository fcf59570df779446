// Registrations of membarrier(2): without them its expedited commands answer EPERM. Runtimes with just-in-time compilers register
// once, at their start.

#include <linux/membarrier.h>

#include "act.h"

static long membarrier(int command) { return syscall(SYS_membarrier, command, 0, 0); }

int main(int argc, char** argv) {
  act::begin(argc, argv);
  constexpr int kGetRegistrations = 1 << 9;  // Linux 6.3
  if (membarrier(MEMBARRIER_CMD_QUERY) < 0) act::skip("the kernel has no membarrier");
  MUST_ZERO(membarrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED));
  MUST_ZERO(membarrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE));
  const long before = membarrier(kGetRegistrations);

  act::intermission();

  act::expect_equal("an expedited barrier", 0L, membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED));
  act::expect_equal("one that synchronises cores", 0L, membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE));
  act::expect_equal("registrations", before, membarrier(kGetRegistrations));
  return act::finish();
}
