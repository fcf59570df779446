#include "modules/aio.h"

#include <algorithm>
#include <cstddef>

#include <linux/aio_abi.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/fd.h"
#include "core/page.h"
#include "core/proc.h"
#include "image/one_process.h"
#include "modules/module.h"
#include "modules/played/aio.h"
#include "modules/played/operations.h"
#include "tracer/remote_memory.h"

namespace vmckpt {
namespace {

constexpr uint32_t kMagic = 0xa10a10a1;

uint64_t ring_bytes(uint32_t slots) {
  return (kAioRingHeaderBytes + slots * kAioEventBytes + kPageBytes - 1) / kPageBytes * kPageBytes;
}

// The kernel fills whole pages with slots.
bool is_ring_size(uint32_t slots) { return slots != 0 && ring_bytes(slots) == kAioRingHeaderBytes + slots * kAioEventBytes; }

// The least that io_setup can be asked for to get so many slots: it doubles the number, adds 2, and rounds up to whole pages.
uint32_t wanted_for(uint32_t slots) {
  constexpr uint64_t kSlotsPerPage = kPageBytes / kAioEventBytes;
  const uint64_t pages = ring_bytes(slots) / kPageBytes;
  return pages == 1 ? 1 : static_cast<uint32_t>((pages - 1) * kSlotsPerPage / 2 - 1);
}

// ... but it makes room for four requests of each processor that the machine may have.
uint64_t least_slots() {
  auto text = read_whole_file("/sys/devices/system/cpu/possible");
  if (!text.ok()) return 0;
  const size_t last = text->find_last_of("-,");
  const auto processors = static_cast<uint64_t>(parse_number(text->substr(last == std::string::npos ? 0 : last + 1))) + 1;
  const uint64_t bytes = kAioRingHeaderBytes + (processors * 4 * 2 + 2) * kAioEventBytes;
  return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes / kAioEventBytes - 1;
}

Result<AioRingHeader> read_header(pid_t pid, RemoteAddr address) {
  AioRingHeader header{};
  VMCKPT_TRY(read_memory(pid, address, &header, sizeof header));
  const bool sound = header.magic == kMagic && header.header_bytes == sizeof header && is_ring_size(header.slots) &&
                     header.head < header.slots && header.tail < header.slots;
  if (!sound) return error(fmt::format("the memory at {} is no AIO ring that vmckpt knows", address));
  return header;
}

uint64_t in_flight(const LedgerAioContext& context, const AioRingHeader& header) {
  return (context.submitted + header.slots - header.tail) % header.slots;
}

const LedgerAioContext* find_context(const Ledger& ledger, RemoteAddr ring) {
  auto found = std::find_if(std::begin(ledger.aio_contexts), std::end(ledger.aio_contexts),
                            [&](const LedgerAioContext& context) { return RemoteAddr(context.id) == ring; });
  return found == std::end(ledger.aio_contexts) ? nullptr : &*found;
}

// In all contexts that the recorder knows. What cannot be read as a ring has been destroyed behind its back.
uint64_t all_in_flight(pid_t pid, const Ledger& ledger) {
  uint64_t requests = 0;
  for (const LedgerAioContext& context : ledger.aio_contexts) {
    if (context.id == 0) continue;
    auto header = read_header(pid, RemoteAddr(context.id));
    if (header.ok()) requests += in_flight(context, *header);
  }
  return requests;
}

Error refuse(RemoteAddr address, const std::string& why, const char* cure) {
  return error(fmt::format("the AIO ring at {} {}", address, why), cure);
}

constexpr const char* kUseSomethingElse = "tell the program to use something else, for instance threads (QEMU: aio=threads)";

}  // namespace

Result<void> wait_for_aio(const StoppedWorld& world, const Ledger& ledger, const Waiting& waiting) {
  constexpr useconds_t kLookAgainUs = 100;
  // The kernel moves the tail first and signals the request's eventfd right after it, in the same breath but not in the same
  // instant.
  constexpr useconds_t kBreathUs = 1000;
  for (bool waited = false;; waited = true) {
    const uint64_t requests = all_in_flight(world.pid(), ledger);
    if (requests == 0) {
      if (waited) ::usleep(kBreathUs);
      return {};
    }
    if (waiting.is_over()) {
      return error(fmt::format("process {} has {} asynchronous I/O requests in flight that do not end", world.pid(), requests),
                   "try again when its disks are less busy; requests that wait for an event (IOCB_CMD_POLL) must be cancelled "
                   "first");
    }
    VMCKPT_TRY(waiting.check());
    ::usleep(kLookAgainUs);
  }
}

Result<void> save_aio(const StoppedWorld& world, const Ledger& ledger, bool counted, pb::AddressSpace* saved) {
  for (const pb::Mapping& mapping : saved->mappings()) {
    if (mapping.kind() != pb::Mapping::AIO_RING) continue;
    const RemoteAddr address(mapping.start());
    if (!counted) {
      return refuse(address, "may have requests in flight: without launch's filter nobody counts them",
                    "launch the program without --allow-io-uring");
    }
    const LedgerAioContext* context = find_context(ledger, address);
    if (context == nullptr) return refuse(address, "is not known to the recorder", kUseSomethingElse);
    AioRingHeader header = VMCKPT_TRY(read_header(world.pid(), address));
    if (ring_bytes(header.slots) != mapping.end() - mapping.start() || mapping.file_offset() != 0) {
      return refuse(address, "is mapped in part only", kUseSomethingElse);
    }
    if (in_flight(*context, header) != 0) return refuse(address, "has requests in flight", "try again");
    pb::AioRing* ring = saved->AddExtension(pb::aio_rings);
    ring->set_address(address.value());
    ring->set_slots(header.slots);
    ring->set_head(header.head);
    std::string& pending = *ring->mutable_pending();
    pending.resize((header.tail + header.slots - header.head) % header.slots * kAioEventBytes);
    // In two pieces when they reach beyond the ring's end.
    const size_t first = std::min<size_t>(pending.size(), (header.slots - header.head) * kAioEventBytes);
    const RemoteAddr events = address + kAioRingHeaderBytes;
    VMCKPT_TRY(read_memory(world.pid(), events + header.head * kAioEventBytes, pending.data(), first));
    VMCKPT_TRY(read_memory(world.pid(), events, pending.data() + first, pending.size() - first));
  }
  return {};
}

Result<void> check_aio_rings(const pb::AddressSpace& space) {
  const auto& rings = space.GetRepeatedExtension(pb::aio_rings);
  auto ring = rings.begin();
  for (const pb::Mapping& mapping : space.mappings()) {
    if (mapping.kind() != pb::Mapping::AIO_RING) continue;
    const bool fits = ring != rings.end() && ring->address() == mapping.start() &&
                      kAioRingHeaderBytes + ring->slots() * kAioEventBytes == mapping.end() - mapping.start() &&
                      ring->head() < ring->slots() &&
                      ring->pending().size() % kAioEventBytes == 0 && ring->pending().size() / kAioEventBytes < ring->slots();
    if (!fits) return error(fmt::format("the AIO ring at {:#x} is not what its mapping says", mapping.start()));
    ++ring;
  }
  if (ring != rings.end()) return error(fmt::format("the AIO ring at {:#x} is not mapped", ring->address()));
  return {};
}

namespace {

void check_aio(const pb::AddressSpace& space, std::vector<Error>& problems) {
  if (auto fit = check_aio_rings(space); !fit.ok()) return problems.push_back(fit.error());
  if (space.ExtensionSize(pb::aio_rings) == 0) return;
  aio_context_t none = 0;
  if (::syscall(SYS_io_setup, 0, &none) != 0 && errno != EINVAL) {
    problems.push_back(
        errno_error("Linux AIO cannot be used here (io_setup)", "restart it where a kernel and a container allow it"));
    return;
  }
  const uint64_t least = least_slots();
  int64_t wanted = 0;
  for (const pb::AioRing& ring : space.GetRepeatedExtension(pb::aio_rings)) {
    wanted += wanted_for(ring.slots());
    if (ring.slots() >= least) continue;
    const std::string what = fmt::format("has {} slots; this kernel makes none below {}, for its processors", ring.slots(),
                                         least);
    problems.push_back(refuse(RemoteAddr(ring.address()), what,
                              "restart it on a machine with fewer processors"));
  }
  auto used = read_whole_file("/proc/sys/fs/aio-nr"), most = read_whole_file("/proc/sys/fs/aio-max-nr");
  if (!used.ok() || !most.ok() || parse_number(*used) + wanted <= parse_number(*most)) return;
  problems.push_back(error(fmt::format("the target's AIO contexts need {} requests, {} of {} are in use", wanted,
                                       parse_number(*used), parse_number(*most)),
                           "raise fs.aio-max-nr (sysctl)"));
}

void plan_aio(const pb::AddressSpace& space, int image_fd, TapeDraft& tape) {
  for (const pb::AioRing& ring : space.GetRepeatedExtension(pb::aio_rings)) {
    AioRingOrder order{};
    order.address = ring.address();
    order.bytes = ring_bytes(ring.slots());
    order.wanted = wanted_for(ring.slots());
    order.slots = ring.slots();
    order.head = ring.head();
    order.pending = static_cast<uint32_t>(ring.pending().size() / kAioEventBytes);
    // Reads nothing of a regular file: the kernel ends such a request while it is submitted.
    order.request.aio_lio_opcode = IOCB_CMD_PREAD;
    order.request.aio_fildes = static_cast<uint32_t>(image_fd);
    order.request.aio_buf = ring.address();
    const TapeWord argument = tape.data_of(order);
    for (size_t i = 0; i < kAioBatch; ++i) {
      tape.point(argument, offsetof(AioRingOrder, requests) + i * sizeof(uint64_t), argument + offsetof(AioRingOrder, request));
    }
    tape.point(argument, offsetof(AioRingOrder, events), tape.data(ring.pending().data(), ring.pending().size()));
    tape.call(kOpMakeAioRing, {argument}, true, fmt::format("make the AIO context {:#x} again", ring.address()));
  }
}

Result<void> drain(StateSave& state, const Waiting& waiting) {
  constexpr int64_t kPatienceUs = 2'000'000;  // the target stands still meanwhile
  return wait_for_aio(*state.world, *state.ledger, waiting.no_longer_than(kPatienceUs));
}

Result<void> save(StateSave& state) {
  return save_aio(*state.world, *state.ledger, state.launch_filter, &one_process(&state.image).memory);
}

void check(Preflight& preflight) { check_aio(one_process(preflight.image).memory, preflight.problems); }

Result<void> plan(ProcessPlan& process) {
  plan_aio(one_process(process.image).memory, process.image_fd, process.tape);
  return {};
}

}  // namespace

extern const StateModule kAioModule{.name = "Linux AIO", .drain = drain, .save = save, .check = check, .plan = plan};

}  // namespace vmckpt
