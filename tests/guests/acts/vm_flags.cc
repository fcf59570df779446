// Advice given with madvise(2) stays with its region, together with the content: the flags that /proc/self/smaps shows
// are the same before and after.

#include "act.h"

constexpr size_t kBytes = 256 * 1024;

struct Advice {
  const char* name;
  int advice;
  const char* flag;
};
constexpr Advice kAdvice[] = {
    {"MADV_DONTFORK", MADV_DONTFORK, "dc"},
    {"MADV_WIPEONFORK", MADV_WIPEONFORK, "wf"},
    {"MADV_DONTDUMP", MADV_DONTDUMP, "dd"},
    {"MADV_SEQUENTIAL", MADV_SEQUENTIAL, "sr"},
    {"MADV_RANDOM", MADV_RANDOM, "rr"},
    {"MADV_HUGEPAGE", MADV_HUGEPAGE, "hg"},
    {"MADV_NOHUGEPAGE", MADV_NOHUGEPAGE, "nh"},
    {"MADV_MERGEABLE", MADV_MERGEABLE, "mg"},
};

int main(int argc, char** argv) {
  act::begin(argc, argv);
  struct Region {
    void* start;
    bool taken;
  };
  std::vector<Region> regions;
  uint64_t seed = act::random_u64();
  for (const Advice& a : kAdvice) {
    // A guard on each side keeps the kernel from merging neighbours.
    auto* block = static_cast<char*>(
        MUST(mmap(nullptr, kBytes + 8192, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
    void* start = block + 4096;
    MUST(mprotect(start, kBytes, PROT_READ | PROT_WRITE));
    bool taken = madvise(start, kBytes, a.advice) == 0;  // a kernel may be built without KSM or huge pages
    act::fill(start, kBytes, seed++);
    regions.push_back({start, taken && act::has_vm_flag(start, a.flag)});
  }
  void* no_reserve =
      MUST(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  bool has_no_reserve = act::has_vm_flag(no_reserve, "nr");

  act::intermission();

  seed -= regions.size();
  for (size_t i = 0; i < regions.size(); i++) {
    act::expect_equal(kAdvice[i].name, regions[i].taken, act::has_vm_flag(regions[i].start, kAdvice[i].flag));
    act::expect_filled(kAdvice[i].name, regions[i].start, kBytes, seed++);
    act::expect_equal(std::string(kAdvice[i].name) + ": permissions", std::string("rw-p"),
                      act::permissions_at(regions[i].start));
  }
  act::expect_equal("MAP_NORESERVE", has_no_reserve, act::has_vm_flag(no_reserve, "nr"));
  return act::finish();
}
