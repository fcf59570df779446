// Private anonymous memory: written, read-only, executable and inaccessible pages, guards and holes between them,
// regions never touched. What was data stays data, what was zero stays zero, what faulted still faults.

#include <csetjmp>

#include "act.h"

constexpr size_t kPage = 4096;

static sigjmp_buf fault_return;
static void on_fault(int) { siglongjmp(fault_return, 1); }

static bool faults(volatile char* address, bool write) {
  if (sigsetjmp(fault_return, 1) != 0) return true;
  if (write) {
    *address = 1;
  } else {
    (void)*address;
  }
  return false;
}

static char* map_pages(size_t pages, int protection = PROT_READ | PROT_WRITE) {
  return static_cast<char*>(
      MUST(mmap(nullptr, pages * kPage, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
}

// mov $value, %eax; ret
static void write_function(char* page, int value) {
  page[0] = '\xb8';
  memcpy(page + 1, &value, 4);
  page[5] = '\xc3';
}
static int call(char* page) { return reinterpret_cast<int (*)()>(page)(); }

int main(int argc, char** argv) {
  act::begin(argc, argv);
  signal(SIGSEGV, on_fault);
  signal(SIGBUS, on_fault);
  uint64_t seed = act::random_u64();

  // | data | guard | read-only data | hole | inaccessible data | data, every other page | untouched |
  char* region = map_pages(64);
  char *data = region, *guard = region + 8 * kPage, *read_only = region + 10 * kPage, *hole = region + 18 * kPage;
  char *hidden = region + 20 * kPage, *sparse = region + 28 * kPage, *untouched = region + 44 * kPage;
  act::fill(data, 8 * kPage, seed);
  act::fill(read_only, 8 * kPage, seed + 1);
  act::fill(hidden, 8 * kPage, seed + 2);
  for (size_t page = 0; page < 16; page += 2) act::fill(sparse + page * kPage, kPage, seed + 100 + page);
  MUST(mprotect(guard, 2 * kPage, PROT_NONE));
  MUST(mprotect(read_only, 8 * kPage, PROT_READ));
  MUST(munmap(hole, 2 * kPage));
  MUST(mprotect(hidden, 8 * kPage, PROT_NONE));

  char* code = map_pages(1);
  write_function(code, 1234);
  MUST(mprotect(code, kPage, PROT_READ | PROT_EXEC));
  char* rewritable_code = map_pages(1, PROT_READ | PROT_WRITE | PROT_EXEC);
  write_function(rewritable_code, 5678);
  char* reserve = static_cast<char*>(MUST(
      mmap(nullptr, 1UL << 40, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));  // as sanitizers do
  char* moved = static_cast<char*>(MUST(mremap(map_pages(4), 4 * kPage, 4 * kPage, MREMAP_MAYMOVE)));
  act::fill(moved, 4 * kPage, seed + 3);

  act::intermission();

  act::expect_filled("data", data, 8 * kPage, seed);
  act::expect("guard faults on reading", faults(guard, false));
  act::expect_equal("guard's permissions", std::string("---p"), act::permissions_at(guard));
  act::expect_filled("read-only data", read_only, 8 * kPage, seed + 1);
  act::expect("read-only data faults on writing", faults(read_only, true));
  act::expect("hole faults", faults(hole, false));
  act::expect_equal("nothing is mapped in the hole", 0u, act::map_line_at(hole).start);
  act::expect("hidden data faults", faults(hidden, false));
  MUST(mprotect(hidden, 8 * kPage, PROT_READ));
  act::expect_filled("hidden data", hidden, 8 * kPage, seed + 2);
  for (size_t page = 0; page < 16; page += 2) {
    act::expect_filled("sparse page", sparse + page * kPage, kPage, seed + 100 + page);
    act::expect_zero("page between", sparse + (page + 1) * kPage, kPage);
  }
  act::expect_zero("untouched pages", untouched, 20 * kPage);
  MUST(mprotect(read_only, 8 * kPage, PROT_READ | PROT_WRITE));
  act::expect("read-only data made writable", !faults(read_only, true));

  act::expect_equal("function in memory", 1234, call(code));
  act::expect_equal("code permissions", std::string("r-xp"), act::permissions_at(code));
  act::expect_equal("function in writable memory", 5678, call(rewritable_code));
  write_function(rewritable_code, 8765);
  act::expect_equal("function rewritten", 8765, call(rewritable_code));
  act::expect_equal("one TiB reserved", 1UL << 40, act::map_line_at(reserve).end - act::map_line_at(reserve).start);
  MUST(mprotect(reserve + (1UL << 39), kPage, PROT_READ | PROT_WRITE));
  act::expect("a page of the reserve made usable", !faults(reserve + (1UL << 39), true));
  act::expect_filled("moved region", moved, 4 * kPage, seed + 3);
  return act::finish();
}
