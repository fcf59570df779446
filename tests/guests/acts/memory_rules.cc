// Rules about memory that come late in a program's life: what was mapped before stays as it was, what is mapped later obeys them.

#include <sys/personality.h>
#include <sys/prctl.h>

#include "act.h"

constexpr int kPrSetMdwe = 65, kPrGetMdwe = 66;  // newer than some libc's headers
constexpr unsigned kRefuseExecGain = 1, kNoInherit = 2;
constexpr size_t kPageBytes = 4096;

static char* map(int protection) {
  return static_cast<char*>(MUST(mmap(nullptr, kPageBytes, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
}


// personality(2): from now on, readable memory is executable.
static void read_implies_exec() {
  char* writable = map(PROT_READ | PROT_WRITE);
  char* readable = map(PROT_READ);
  MUST(personality(personality(0xffffffff) | READ_IMPLIES_EXEC));

  act::intermission();

  act::expect_equal("writable memory from before", std::string("rw-p"), act::permissions_at(writable));
  act::expect_equal("readable memory from before", std::string("r--p"), act::permissions_at(readable));
  act::expect_equal("the stack", std::string("rw-p"), act::permissions_at(&writable));
  act::expect_equal("new memory", std::string("rwxp"), act::permissions_at(map(PROT_READ | PROT_WRITE)));
}

// PR_SET_MDWE: from now on, no memory becomes executable that was not.
static void deny_write_execute() {
  char* plain = map(PROT_READ | PROT_WRITE);
  auto* code = reinterpret_cast<unsigned char*>(map(PROT_READ | PROT_WRITE | PROT_EXEC));
  const unsigned char answer_42[] = {0xb8, 42, 0, 0, 0, 0xc3};  // mov $42, %eax; ret
  memcpy(code, answer_42, sizeof answer_42);
  if (prctl(kPrSetMdwe, kRefuseExecGain | kNoInherit, 0, 0, 0) != 0) act::skip("PR_SET_MDWE is not to be had here");

  act::intermission();

  act::expect_equal("PR_GET_MDWE", kRefuseExecGain | kNoInherit, prctl(kPrGetMdwe, 0, 0, 0, 0));
  act::expect_errno("taking it back", EPERM, prctl(kPrSetMdwe, 0, 0, 0, 0));
  act::expect_errno("making memory executable", EACCES, mprotect(plain, kPageBytes, PROT_READ | PROT_EXEC));
  void* both = mmap(nullptr, kPageBytes, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  act::expect_errno("mapping writable and executable memory", EACCES, both == MAP_FAILED ? -1 : 0);
  code[1] = 43;
  act::expect_equal("memory that was both", 43, reinterpret_cast<int (*)()>(code)());
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  if (!act::args.empty() && act::args[0] == "read-implies-exec") read_implies_exec();
  else deny_write_execute();
  return act::finish();
}
