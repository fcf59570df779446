// Locked memory stays locked: mlock, mlock2 with MLOCK_ONFAULT, and the total that the kernel accounts.

#include "act.h"

constexpr size_t kBytes = 64 * 1024;

static std::string locked_total() { return act::status_field("/proc/self/status", "VmLck"); }

int main(int argc, char** argv) {
  act::begin(argc, argv);
  auto* block =
      static_cast<char*>(MUST(mmap(nullptr, 5 * kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
  char *at_once = block + kBytes, *on_fault = block + 3 * kBytes;
  for (char* part : {at_once, on_fault}) MUST(mprotect(part, kBytes, PROT_READ | PROT_WRITE));
  uint64_t seed = act::random_u64();
  act::fill(at_once, kBytes, seed);
  act::fill(on_fault, kBytes / 2, seed + 1);
  MUST(mlock(at_once, kBytes));
  MUST(mlock2(on_fault, kBytes, MLOCK_ONFAULT));
  std::string total = locked_total();

  act::intermission();

  act::expect_equal("VmLck", total, locked_total());
  act::expect("mlock", act::has_vm_flag(at_once, "lo"));
  act::expect("mlock2", act::has_vm_flag(on_fault, "lo"));
  act::expect_filled("locked data", at_once, kBytes, seed);
  act::expect_filled("data locked on fault", on_fault, kBytes / 2, seed + 1);
  act::expect_zero("rest of it", on_fault + kBytes / 2, kBytes / 2);
  std::vector<unsigned char> resident(kBytes / 4096);
  MUST(mincore(at_once, kBytes, resident.data()));
  for (unsigned char page : resident) {
    if (!act::expect_equal("page is resident", 1, page & 1)) break;
  }
  MUST(munlock(at_once, kBytes));
  act::expect("munlock", !act::has_vm_flag(at_once, "lo"));
  return act::finish();
}
