// Linux AIO: contexts keep their names and rings; ended requests that were not taken yet are taken later, in their order, once; a
// thread that waits for events goes on waiting; requests name an eventfd. The argument "load" keeps requests of a disk in flight
// all the time; "poll" leaves one in flight that waits for ever: that cannot be checkpointed.

#include <linux/aio_abi.h>
#include <poll.h>
#include <sys/eventfd.h>

#include <atomic>
#include <thread>

#include "act.h"

constexpr size_t kBlock = 4096, kBlocks = 64;

struct Ring {  // struct aio_ring of the kernel
  uint32_t id, slots, head, tail, magic;
};

static long setup(unsigned requests, aio_context_t* context) { return syscall(SYS_io_setup, requests, context); }

static long get_events(aio_context_t context, long least, long most, io_event* events) {
  timespec second{30, 0};
  long got;
  while ((got = syscall(SYS_io_getevents, context, least, most, events, &second)) < 0 && errno == EINTR) {
  }
  return got;
}

static iocb read_of(int fd, void* to, size_t bytes, size_t offset, uint64_t data, int event_fd = -1) {
  iocb request{};
  request.aio_data = data;
  request.aio_lio_opcode = IOCB_CMD_PREAD;
  request.aio_fildes = static_cast<uint32_t>(fd);
  request.aio_buf = reinterpret_cast<uint64_t>(to);
  request.aio_nbytes = bytes;
  request.aio_offset = static_cast<int64_t>(offset);
  if (event_fd >= 0) {
    request.aio_flags = IOCB_FLAG_RESFD;
    request.aio_resfd = static_cast<uint32_t>(event_fd);
  }
  return request;
}

static void submit(aio_context_t context, iocb& request) {
  iocb* list[] = {&request};
  act::expect_equal("a request is submitted", 1, syscall(SYS_io_submit, context, 1, list));
}

static uint64_t seed;
static int file, direct;

struct Waiting {  // requests that have ended, and are not taken yet
  aio_context_t context;
  unsigned first, count;
  std::vector<std::vector<char>> buffers;
  std::vector<iocb> requests;
};

static Waiting leave_untaken(unsigned wanted, unsigned taken_first, unsigned count, int event_fd) {
  Waiting waiting{0, taken_first, count, {}, {}};
  MUST(setup(wanted, &waiting.context));
  waiting.buffers.resize(taken_first + count, std::vector<char>(kBlock));
  waiting.requests.resize(taken_first + count);
  for (unsigned i = 0; i < taken_first + count; i++) {
    waiting.requests[i] = read_of(file, waiting.buffers[i].data(), kBlock, i % kBlocks * kBlock, 1000 + i, event_fd);
    submit(waiting.context, waiting.requests[i]);
    io_event event;
    if (i < taken_first) act::expect_equal("an early event", 1, get_events(waiting.context, 1, 1, &event));
  }
  return waiting;
}

static void take(Waiting& waiting, const std::string& name) {
  auto* ring = reinterpret_cast<const volatile Ring*>(waiting.context);
  act::expect_equal(name + ": ring position", waiting.first % ring->slots, ring->head);
  for (unsigned i = waiting.first; i < waiting.first + waiting.count; i++) {
    io_event event{};
    act::expect_equal(name + ": an event is there", 1, get_events(waiting.context, 1, 1, &event));
    act::expect_equal(name + ": its data", 1000 + i, event.data);
    act::expect_equal(name + ": its request", reinterpret_cast<uint64_t>(&waiting.requests[i]), event.obj);
    act::expect_equal(name + ": its result", kBlock, event.res);
  }
  act::expect_equal(name + ": ring is empty", ring->head, ring->tail);
  // More than the ring has slots: each is given back when its event is taken.
  std::vector<char> buffer(kBlock);
  for (unsigned i = 0; i < 2 * ring->slots; i++) {
    iocb request = read_of(file, buffer.data(), kBlock, i % kBlocks * kBlock, i);
    submit(waiting.context, request);
    io_event event{};
    act::expect_equal(name + ": a later event", 1, get_events(waiting.context, 1, 1, &event));
    if (!act::expect_equal(name + ": later data", i, event.data)) break;
  }
  MUST(syscall(SYS_io_destroy, waiting.context));
}

// Reads of a disk, over and over, several at once.
static std::atomic<bool> over{false};
static std::atomic<uint64_t> rounds{0};
static void load() {
  constexpr unsigned kAtOnce = 8;
  aio_context_t context = 0;
  MUST(setup(kAtOnce, &context));
  auto* buffers = static_cast<char*>(
      MUST(mmap(nullptr, kAtOnce * kBlock, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
  std::vector<char> expected(kBlock * kBlocks);
  act::fill(expected.data(), expected.size(), seed);
  while (!over) {
    iocb requests[kAtOnce];
    iocb* list[kAtOnce];
    memset(buffers, 0, kAtOnce * kBlock);
    for (unsigned i = 0; i < kAtOnce; i++) {
      requests[i] = read_of(direct, buffers + i * kBlock, kBlock, (rounds + i) % kBlocks * kBlock, i);
      list[i] = &requests[i];
    }
    act::expect_equal("requests are submitted", kAtOnce, syscall(SYS_io_submit, context, kAtOnce, list));
    io_event events[kAtOnce];
    unsigned got = 0;
    while (got < kAtOnce) {
      long more = get_events(context, 1, kAtOnce - got, events + got);
      if (more <= 0) return act::fail("events", "some", std::to_string(more) + " " + strerror(errno));
      got += static_cast<unsigned>(more);
    }
    for (unsigned i = 0; i < kAtOnce; i++) {
      bool same = memcmp(buffers + i * kBlock, expected.data() + (rounds + i) % kBlocks * kBlock, kBlock) == 0;
      if (!act::expect("content read under load", same)) return;
    }
    ++rounds;
  }
}

static int poll_for_ever() {
  int ends[2];
  MUST(pipe(ends));
  aio_context_t context = 0;
  MUST(setup(4, &context));
  iocb request{};
  request.aio_lio_opcode = IOCB_CMD_POLL;
  request.aio_fildes = static_cast<uint32_t>(ends[0]);
  request.aio_buf = POLLIN;
  submit(context, request);
  act::intermission();
  act::expect_equal("written", 1, write(ends[1], "x", 1));
  io_event event{};
  act::expect_equal("the event of a poll", 1, get_events(context, 1, 1, &event));
  return act::finish();
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  aio_context_t probe = 0;
  if (setup(1, &probe) != 0) act::skip(std::string("io_setup: ") + strerror(errno));
  MUST(syscall(SYS_io_destroy, probe));
  if (!act::args.empty() && act::args[0] == "poll") return poll_for_ever();

  std::vector<char> content(kBlock * kBlocks);
  seed = act::random_u64();
  act::fill(content.data(), content.size(), seed);
  act::make_file("blocks", std::string(content.begin(), content.end()));
  file = MUST(open("blocks", O_RDONLY));
  direct = open("blocks", O_RDONLY | O_DIRECT);
  if (direct < 0) direct = file;

  const int event_fd = MUST(eventfd(0, EFD_NONBLOCK));
  Waiting at_start = leave_untaken(64, 0, 5, event_fd);
  Waiting in_the_middle = leave_untaken(600, 33, 40, -1);
  Waiting around_the_end = leave_untaken(1, 120, 20, -1);  // 127 slots on machines with few processors
  aio_context_t blocked = 0;
  MUST(setup(16, &blocked));
  std::thread waiter([&] {
    io_event event{};
    act::expect_equal("the event that was waited for", 1, get_events(blocked, 1, 1, &event));
    act::expect_equal("its data", 4711u, event.data);
  });
  const bool with_load = !act::args.empty() && act::args[0] == "load";
  std::thread loader;
  if (with_load) {
    loader = std::thread(load);
    act::eventually("the first requests have ended", [] { return rounds > 3; });
  }

  act::intermission();

  if (with_load) {
    const uint64_t before = rounds;
    act::eventually("requests go on", [&] { return rounds > before + 3 || act::failures != 0; });
    over = true;
    loader.join();
  }
  uint64_t signalled = 0;
  act::expect_equal("the eventfd is read", 8, read(event_fd, &signalled, sizeof signalled));
  act::expect_equal("the eventfd's count", 5u, signalled);
  std::vector<char> buffer(kBlock);
  iocb request = read_of(file, buffer.data(), kBlock, kBlock, 4711, event_fd);
  submit(blocked, request);  // of which the waiter learns first
  act::expect_equal("the eventfd is read again", 8, read(event_fd, &signalled, sizeof signalled));
  act::expect("content", memcmp(buffer.data(), content.data() + kBlock, kBlock) == 0);
  waiter.join();
  take(at_start, "at the start");
  take(in_the_middle, "in the middle");
  take(around_the_end, "around the end");
  io_event event;
  act::expect_errno("a destroyed context", EINVAL, syscall(SYS_io_getevents, at_start.context, 0, 1, &event, nullptr));
  return act::finish();
}
