// Linux AIO: which contexts there are, and how many requests were submitted to each. The kernel tells neither whether requests
// are in flight nor how many there have been; with their number and the ring's tail the checkpoint knows (modules/aio.h).
//
// The number must be exact, so launch's filter lets only those calls of io_setup and io_submit through that carry a mark in an
// argument which the kernel does not look at (kAioMark, ledger.h): the ones made here. To all others io_setup is not implemented.
// Programs call libaio's functions, or syscall(2)'s wrapper.
#include <dlfcn.h>
#include <linux/aio_abi.h>
#include <sys/syscall.h>

#include "recorder/recorder.h"

namespace vmckpt {

// A thread that is in the kernel to submit: the freeze waits until it has come back and counted.
class AioSubmission {
 public:
  AioSubmission() { __atomic_add_fetch(&g_ledger.aio_submitters, 1, __ATOMIC_ACQ_REL); }
  ~AioSubmission() { __atomic_sub_fetch(&g_ledger.aio_submitters, 1, __ATOMIC_ACQ_REL); }
};

static LedgerAioContext* find_context(uint64_t id) {
  for (LedgerAioContext& context : g_ledger.aio_contexts) {
    if (__atomic_load_n(&context.id, __ATOMIC_ACQUIRE) == id) return &context;
  }
  return nullptr;
}

static void note_context(uint64_t id) {
  LedgerUpdate update;
  // The same address again: the old one was destroyed by a call that was not seen.
  LedgerAioContext* context = find_context(id);
  if (context != nullptr) {
    __atomic_store_n(&context->submitted, 0, __ATOMIC_RELEASE);
    return;
  }
  constexpr uint64_t kBeingMade = 1;
  for (LedgerAioContext& free : g_ledger.aio_contexts) {
    uint64_t expected = 0;
    if (!__atomic_compare_exchange_n(&free.id, &expected, kBeingMade, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) continue;
    free.submitted = 0;
    __atomic_store_n(&free.id, id, __ATOMIC_RELEASE);
    return;
  }
}

long aio_setup(long events, aio_context_t* context) {
  const long result = raw_call(SYS_io_setup, events, reinterpret_cast<long>(context), 0, 0, 0, kAioMark);
  if (result == 0) note_context(*context);
  return result;
}

// Forgotten before it goes: afterwards another thread may be given the same address.
long aio_destroy(long id) {
  if (id != 0) {
    LedgerUpdate update;
    if (LedgerAioContext* context = find_context(static_cast<uint64_t>(id))) __atomic_store_n(&context->id, 0, __ATOMIC_RELEASE);
  }
  return raw_call(SYS_io_destroy, id);
}

long aio_submit(long id, long count, long requests) {
  AioSubmission submission;
  const long result = raw_call(SYS_io_submit, id, count, requests, 0, 0, kAioMark);
  if (result > 0) {
    if (LedgerAioContext* context = find_context(static_cast<uint64_t>(id))) {
      __atomic_add_fetch(&context->submitted, static_cast<uint64_t>(result), __ATOMIC_ACQ_REL);
    }
  }
  return result;
}

// The names are libaio's, but they are short: a library that means something else by them goes on with its own.
static void* not_libaio(const char* name) {
  void* real = real_function(name);
  Dl_info info;
  if (real == nullptr || dladdr(real, &info) == 0 || info.dli_fname == nullptr) return real;
  const char* file = info.dli_fname;
  for (const char* at = file; *at != '\0'; ++at) {
    if (*at == '/') file = at + 1;
  }
  constexpr char kPrefix[] = "libaio.so";
  for (size_t i = 0; i + 1 < sizeof kPrefix; ++i) {
    if (file[i] != kPrefix[i]) return real;
  }
  return nullptr;
}

}  // namespace vmckpt

using namespace vmckpt;

#define EXPORT extern "C" __attribute__((visibility("default")))
// libaio's functions return the negative error. Others are called with all that may be in registers.
#define WRAP_AIO(name, call)                                                                 \
  EXPORT long name(long a0, long a1, long a2, long a3, long a4, long a5) {                   \
    using Other = long (*)(long, long, long, long, long, long);                              \
    static Other other;                                                                      \
    static bool known;                                                                       \
    if (!__atomic_load_n(&known, __ATOMIC_ACQUIRE)) {                                        \
      other = reinterpret_cast<Other>(not_libaio(#name));                                    \
      __atomic_store_n(&known, true, __ATOMIC_RELEASE);                                      \
    }                                                                                        \
    if (other != nullptr) return other(a0, a1, a2, a3, a4, a5);                              \
    return call;                                                                             \
  }
WRAP_AIO(io_setup, aio_setup(a0, reinterpret_cast<aio_context_t*>(a1)))
WRAP_AIO(io_destroy, aio_destroy(a0))
WRAP_AIO(io_submit, aio_submit(a0, a1, a2))

// libaio calls its own io_setup in here, out of sight.
static long queue_init(long events, aio_context_t* context) {
  if (static_cast<int>(events) <= 0) return -EINVAL;
  *context = 0;
  return aio_setup(events, context);
}
WRAP_AIO(io_queue_init, queue_init(a0, reinterpret_cast<aio_context_t*>(a1)))
