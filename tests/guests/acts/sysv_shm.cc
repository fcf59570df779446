// System V shared memory, attached twice (once read-only) and marked for removal as is the custom: content,
// permissions, the twins are one memory, children share it, and detaching works.

#include <sys/ipc.h>
#include <sys/shm.h>

#include "act.h"

constexpr size_t kBytes = 256 * 1024;

int main(int argc, char** argv) {
  act::begin(argc, argv);
  uint64_t seed = act::random_u64();
  int id = MUST(shmget(IPC_PRIVATE, kBytes, IPC_CREAT | 0600));
  auto* segment = static_cast<char*>(shmat(id, nullptr, 0));
  auto* read_only = static_cast<char*>(shmat(id, nullptr, SHM_RDONLY));
  MUST(shmctl(id, IPC_RMID, nullptr));
  MUST(segment);
  MUST(read_only);
  act::fill(segment, kBytes, seed);

  act::intermission();

  act::expect_filled("content", segment, kBytes, seed);
  act::expect_filled("content, attached read-only", read_only, kBytes, seed);
  act::expect_equal("permissions", std::string("rw-s"), act::permissions_at(segment));
  act::expect_equal("read-only permissions", std::string("r--s"), act::permissions_at(read_only));
  segment[100] = 'w';
  act::expect_equal("a write is seen in the twin", 'w', read_only[100]);
  act::in_child([&] {
    segment[200] = 'c';
    return 0;
  });
  act::expect_equal("a child's write is seen", 'c', read_only[200]);
  act::expect_equal("detaching", 0, shmdt(read_only));
  act::expect_equal("nothing is mapped there any more", 0u, act::map_line_at(read_only).start);
  return act::finish();
}
