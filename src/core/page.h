// Pages and the end of the addresses that they can have, x86-64's. Plain: the recorder sees it as well.
#pragma once

#include <stdint.h>

namespace vmckpt {

inline constexpr uint64_t kPageBytes = 4096;

// User space ends one page below what page tables span, lest a system call at its very end return to a non-canonical address
// (TASK_SIZE_MAX, arch/x86/include/asm/page_64.h). [vsyscall] is beyond it. With four levels that is here; with five the kernel
// still maps nothing beyond it for whoever does not ask for an address there (DEFAULT_MAP_WINDOW). So this is the limit for what
// restart places itself, on any machine: munmap of a range that reaches further answers EINVAL with four levels.
inline constexpr uint64_t kUserSpaceEnd = (uint64_t{1} << 47) - kPageBytes;
// With five levels: the limit for what an image may say that a program had, since it may have asked.
inline constexpr uint64_t kLargestUserSpaceEnd = (uint64_t{1} << 56) - kPageBytes;

}  // namespace vmckpt
