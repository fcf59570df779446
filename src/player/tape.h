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
  kOpSetMsrs,              // KVM_SET_MSRS {fd, kvm_msrs*, 0, 0, 0, index of the MSR that was refused}; `reserved` is an MsrLoss
  kOpMakeAioRing,          // {AioRingOrder*}: a context of Linux AIO with its ring where it was
  kOpUseTiles,             // touch AMX: the kernel makes room for the thread's tile registers; {tile configuration, 64 bytes}
  kOpReadList,             // the runs of a list that several threads share: arguments as in ReadListArgument
  kOpJoin,                 // {word, Tape*}: waits until the kernel has cleared the word of a thread; answers what its tape did
  kOpSubtractTsc,          // takes the processor's time stamp counter, read once, from {array of 8-byte words, how many}
  kOpAdd,                  // {address of an 8-byte word, what is added to it}
  kOpMakeDescriptor,       // ioctl {fd, request, argument} that returns a descriptor, which goes to {number, O_CLOEXEC or 0}
};

// When an MSR that KVM does not take is no loss.
enum MsrLoss : uint32_t {
  kMsrFresh = 1,   // where it cannot be read either: it had the value that a new vCPU has
  kMsrHidden = 2,  // always: the guest does not know of it
};

enum TapeFlag : uint32_t {
  kTapeMustSucceed = 1,  // a negative result ends the tape: `failed` names the call
};

// kOpReadList: pread64 until all bytes of an item came; end of file is EIO. Groups of items are taken by counting `next` up; group i is items[starts[i]] to items[starts[i + 1]].
struct ReadItem {
  uint64_t address;
  uint64_t bytes;
  uint64_t file_offset;
};
enum ReadListArgument : uint32_t { kReadListFd, kReadListItems, kReadListStarts, kReadListGroups, kReadListNext, kReadListArguments };

struct TapeCall {
  int64_t number;  // system call number or TapeOp
  uint64_t args[6];
  int64_t result;  // as the kernel returns it: -errno on failure
  uint32_t flags;
  uint32_t text;  // where in the tape what the call is for stands, for messages; 0: nowhere. The player does not read it.
};
constexpr uint32_t kTapeTextBytes = 400;  // at most, with the NUL

// A context of Linux AIO, to be made again. Ring positions count events; an event is 32 bytes (struct io_event, linux/aio_abi.h).
struct AioRingOrder {
  uint64_t address;  // of the ring, which is also the context's name
  uint64_t bytes;
  uint32_t wanted;   // what io_setup must be asked for, to get `slots`
  uint32_t slots;    // the ring's own count (`nr`)
  uint32_t head;     // the next event that the program will take
  uint32_t pending;  // events from there on, which it has not taken yet
  uint64_t events;   // address of these
  uint64_t context;  // room for io_setup's answer
  uint64_t request[8];     // struct iocb of a request that ends at once
  uint64_t requests[16];   // addresses, all of that one
  uint64_t scratch[16 * 4];  // room for as many events
};
constexpr uint32_t kAioBatch = 16;
constexpr uint64_t kAioRingHeaderBytes = 32, kAioEventBytes = 32;

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
