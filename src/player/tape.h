// A tape is a flat list of system calls with arguments and result slots; the player (player.cc) plays it inside a
// process. The supervisor writes tapes, also into another process, and reads the results back: plain data only.
//
//   checkpoint: a tape of "get" calls plays in each stopped thread, then the thread goes back to where it was;
//   restart:    a tape of "make" calls plays in the new process, up to the point where the supervisor sets registers.
//
// A tape ends with a signal to the playing thread itself. While the supervisor traces the thread it sees the signal and
// takes it away. If the supervisor has been killed nobody sees it (the checkpoint's tapes use a signal that the program
// ignores), and the player returns by itself to the interrupted context with rt_sigreturn: the target runs on.
#pragma once

#include <stdint.h>

namespace vmckpt {

constexpr uint32_t kTapeMagic = 0x45504154;
constexpr uint32_t kPlayerStackBytes = 4096;  // what whoever lets a tape be played gives the player at least

// Operations beyond plain system calls; numbers no system call has.
enum TapeOp : int64_t {
  kOpFirst = 0x10000,
  kOpSnapshot = kOpFirst,  // fork a copy that becomes the caller's sibling and waits; args: {expected parent pid}
  kOpThread,               // clone3 with args {clone_args*, its size, stack top, Tape*}: the new thread plays that tape
  kOpCopyBytes,            // {to, from, bytes} within the process
  kOpReadList,             // the runs of a list that several threads share: arguments as in ReadListArgument
  kOpJoin,                 // {word, Tape*}: waits until the kernel has cleared the word of a thread; answers what its tape did
  kOpAdd,                  // {address of an 8-byte word, what is added to it}
  kOpMakeDescriptor,       // ioctl {fd, request, argument} that returns a descriptor, which goes to {number, O_CLOEXEC or 0}
  kOpFirstOfModules = kOpFirst + 0x100,  // what these are is in modules/played/operations.h
};

enum TapeFlag : uint32_t {
  kTapeMustSucceed = 1,  // a negative result ends the tape: `failed` names the call
};

// kOpReadList: pread64 until all bytes of an item came; end of file is EIO. Groups of items are taken by counting `next` up;
// group i is items[starts[i]] to items[starts[i + 1]].
struct ReadItem {
  uint64_t address;
  uint64_t bytes;
  uint64_t file_offset;
};
enum ReadListArgument : uint32_t {
  kReadListFd, kReadListItems, kReadListStarts, kReadListGroups, kReadListNext, kReadListArguments
};

struct TapeCall {
  int64_t number;  // system call number, TapeOp or an operation of a module
  uint64_t args[6];
  int64_t result;  // as the kernel returns it: -errno on failure
  uint32_t flags;
  uint32_t text;  // where in the tape what the call is for stands, for messages; 0: nowhere. The player does not read it.
};
constexpr uint32_t kTapeTextBytes = 400;  // at most, with the NUL

struct Tape {
  uint32_t magic;
  uint32_t calls;
  uint32_t failed;  // index + 1 of the call that ended the tape, 0 when all were played
  uint32_t done;    // 1 when the tape has come to its end
  int32_t end_signal;  // 0: the thread that plays it ends
  int32_t process_id;  // as the playing thread's own PID namespace numbers it
  int32_t thread_id;
  uint32_t reserved;
  uint64_t return_frame;  // rt_sigreturn frame to go back to when nobody traces; 0: exit the process instead
  TapeCall call[];
};

}  // namespace vmckpt
