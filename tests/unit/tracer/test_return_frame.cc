// A supervisor is killed while a thread plays a tape: the thread goes back through its frame with every vector register that it
// had. What the kernel demands of a frame depends on whether the thread was allowed AMX, and has ever used it.
#include "tracer/remote_tape.h"

#include <cstring>
#include <random>

#include <asm/prctl.h>
#include "catch.h"
#include <cpuid.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "player/player.h"
#include "tracer/interrupted_calls.h"
#include "tracer/thread_state.h"

using namespace vmckpt;

namespace {

enum class Vectors { kYmm, kZmm };
enum class Amx { kNotAsked, kPermitted, kReleased, kInUse };

constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
constexpr size_t kTileBytes = 1024;

bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 24 & 1);
}

struct alignas(64) State {
  uint8_t vectors[32][64];
  uint64_t masks[8];
  uint8_t tile[kTileBytes];
};

struct Shared {
  State in, out;
  volatile uint64_t ready, go, done, in_tape[2];
};

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64};
  uint8_t rows[16] = {16};
};

// Nothing but assembly between loading and storing: no compiler's code may use the registers.
void hold(Shared* shared, Vectors vectors, bool tiles) {
  TileConfig config;
  const uint64_t wide = vectors == Vectors::kZmm, use_tiles = tiles;
  asm volatile(R"(
    test %[tiles], %[tiles]
    jz 1f
    ldtilecfg (%[config])
    tileloadd (%[in_tile], %[stride], 1), %%tmm0
  1:
    test %[wide], %[wide]
    jnz 2f
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    vmovdqu 64*\n(%[in]), %%ymm\n
    .endr
    jmp 3f
  2:
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    vmovdqu64 64*\n(%[in]), %%zmm\n
    .endr
    .irp n, 0,1,2,3,4,5,6,7
    kmovq 2048+8*\n(%[in]), %%k\n
    .endr
  3:
    movq $1, %[ready]
  4:
    pause
    cmpq $0, %[go]
    je 4b
    test %[wide], %[wide]
    jnz 5f
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    vmovdqu %%ymm\n, 64*\n(%[out])
    .endr
    jmp 6f
  5:
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    vmovdqu64 %%zmm\n, 64*\n(%[out])
    .endr
    .irp n, 0,1,2,3,4,5,6,7
    kmovq %%k\n, 2048+8*\n(%[out])
    .endr
  6:
    test %[tiles], %[tiles]
    jz 7f
    tilestored %%tmm0, (%[out_tile], %[stride], 1)
    tilerelease
  7:
    vzeroupper
  )"
               : [ready] "=m"(shared->ready)
               : [go] "m"(shared->go), [in] "r"(&shared->in), [out] "r"(&shared->out), [in_tile] "r"(shared->in.tile),
                 [out_tile] "r"(shared->out.tile), [wide] "r"(wide), [tiles] "r"(use_tiles), [config] "r"(&config),
                 [stride] "r"(uint64_t{64})
               : "memory", "cc");
}

void use_and_release_tiles() {
  TileConfig config;
  asm volatile("ldtilecfg (%0)\n\ttilezero %%tmm0\n\ttilerelease" : : "r"(&config) : "memory");
}

template <class Condition>
bool within_seconds(Condition holds) {
  for (int i = 0; i < 3000 && !holds(); ++i) ::usleep(10'000);
  return holds();
}

class Holder {
 public:
  Holder(Vectors vectors, Amx amx) : vectors_(vectors), amx_(amx) {
    constexpr size_t kArenaBytes = 1u << 20;
    shared = static_cast<Shared*>(::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    void* arena = ::mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ledger.player_entry = reinterpret_cast<uint64_t>(&vmckpt_player_entry);
    ledger.arena = reinterpret_cast<uint64_t>(arena);
    ledger.arena_slots = 16;
    ledger.arena_slot_bytes = kArenaBytes / 16;
    uint32_t seed = 1;
    auto* bytes = reinterpret_cast<uint8_t*>(&shared->in);
    for (size_t i = 0; i < sizeof shared->in; ++i) bytes[i] = static_cast<uint8_t>((seed = seed * 1664525 + 1013904223) >> 24);
    pid = ::fork();
    if (pid != 0) return;
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (amx != Amx::kNotAsked && ::syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) ::_exit(1);
    if (amx == Amx::kReleased) use_and_release_tiles();
    hold(shared, vectors, amx == Amx::kInUse);
    shared->done = 1;
    for (;;) ::pause();
  }
  ~Holder() {
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
    ::munmap(reinterpret_cast<void*>(ledger.arena), size_t{ledger.arena_slots} * ledger.arena_slot_bytes);
    ::munmap(shared, sizeof *shared);
  }
  // What came out, after the holder was told to look.
  bool kept_everything() {
    shared->go = 1;
    if (!within_seconds([&] { return shared->done != 0; })) return false;
    const size_t registers = vectors_ == Vectors::kZmm ? 32 : 16, bytes = vectors_ == Vectors::kZmm ? 64 : 32;
    for (size_t i = 0; i < registers; ++i) {
      if (std::memcmp(shared->in.vectors[i], shared->out.vectors[i], bytes) != 0) return false;
    }
    if (vectors_ == Vectors::kZmm && std::memcmp(shared->in.masks, shared->out.masks, sizeof shared->in.masks) != 0) return false;
    return amx_ != Amx::kInUse || std::memcmp(shared->in.tile, shared->out.tile, kTileBytes) == 0;
  }

  Shared* shared;
  Ledger ledger{};
  pid_t pid = 0;

 private:
  Vectors vectors_;
  Amx amx_;
};

void kill_inside_a_tape(Holder& holder) {
  pid_t supervisor = ::fork();
  if (supervisor == 0) {
    InterruptedCalls interrupted;
    auto world = freeze(holder.pid, Waiting::up_to(20'000'000), interrupted);
    if (!world.ok()) ::_exit(1);
    TapeDraft tape;
    const timespec while_we_die{0, 100'000'000};
    tape.call(SYS_clock_gettime, {CLOCK_MONOTONIC, reinterpret_cast<uint64_t>(holder.shared->in_tape)});
    tape.call(SYS_nanosleep, {tape.data_of(while_we_die), 0});
    (void)play_tapes(*world, holder.ledger, {{&world->threads()[0], &tape}});
    ::pause();  // the world's end would repair everything
  }
  REQUIRE(within_seconds([&] { return holder.shared->in_tape[0] != 0; }));
  ::kill(supervisor, SIGKILL);
  ::waitpid(supervisor, nullptr, 0);
}

// One supervisor that checkpoints without pause is killed at some moment: as a rule inside a tape, or at its edges.
void kill_at_any_time(Holder& holder, std::mt19937& chance) {
  pid_t supervisor = ::fork();
  if (supervisor == 0) {
    for (;;) {
      InterruptedCalls interrupted;
      auto world = freeze(holder.pid, Waiting::up_to(20'000'000), interrupted);
      if (!world.ok()) ::_exit(1);
      TapeDraft tape;
      for (int i = 0; i < 200; ++i)
        tape.call(SYS_clock_gettime, {CLOCK_MONOTONIC, reinterpret_cast<uint64_t>(holder.shared->in_tape)});
      (void)play_tapes(*world, holder.ledger, {{&world->threads()[0], &tape}});
    }
  }
  REQUIRE(within_seconds([&] { return holder.shared->in_tape[0] != 0; }));
  ::usleep(std::uniform_int_distribution<useconds_t>(0, 2000)(chance));
  ::kill(supervisor, SIGKILL);
  ::waitpid(supervisor, nullptr, 0);
}

void check_all(Vectors vectors) {
  const uint32_t seed = std::random_device()();
  std::mt19937 chance(seed);
  std::vector<Amx> kinds = {Amx::kNotAsked};
  if (has_amx()) kinds.insert(kinds.end(), {Amx::kPermitted, Amx::kReleased, Amx::kInUse});
  else WARN("this processor has no AMX");
  for (Amx amx : kinds) {
    INFO("AMX: " << static_cast<int>(amx));
    Holder holder(vectors, amx);
    REQUIRE(within_seconds([&] { return holder.shared->ready != 0; }));
    kill_inside_a_tape(holder);
    CHECK(holder.kept_everything());
    for (int i = 0; i < 10; ++i) {
      INFO("random kill " << i << " with seed " << seed);
      Holder another(vectors, amx);
      REQUIRE(within_seconds([&] { return another.shared->ready != 0; }));
      kill_at_any_time(another, chance);
      CHECK(another.kept_everything());
    }
  }
}

}  // namespace

TEST_CASE("a supervisor killed in the middle of a tape leaves all vector registers and tiles as they were (AVX)") {
  if (!__builtin_cpu_supports("avx")) {
    WARN("this processor has no AVX");
    return;
  }
  check_all(Vectors::kYmm);
}

TEST_CASE("a supervisor killed in the middle of a tape leaves all vector registers and tiles as they were (AVX-512)") {
  if (!__builtin_cpu_supports("avx512bw")) {
    WARN("this processor has no AVX-512");
    return;
  }
  check_all(Vectors::kZmm);
}

TEST_CASE("extended state that was saved on a processor with less of it can be put in") {
  if (!__builtin_cpu_supports("avx")) {
    WARN("this processor has no AVX");
    return;
  }
  Holder holder(Vectors::kYmm, Amx::kNotAsked);
  REQUIRE(within_seconds([&] { return holder.shared->ready != 0; }));
  constexpr size_t kBytesWithAvx = 832;  // Intel SDM volume 1, 13.5.2
  constexpr size_t kInUse = 512;
  {
    InterruptedCalls interrupted;
    auto world = freeze(holder.pid, Waiting::up_to(20'000'000), interrupted);
    REQUIRE(world.ok());
    StoppedThread thread = world->threads()[0];
    thread.xstate.resize(kBytesWithAvx);
    thread.xstate[kInUse] &= 7;  // x87, SSE, AVX
    thread.xstate[kInUse + 1] = thread.xstate[kInUse + 2] = 0;
    auto written = write_thread_state(thread);
    CHECK(written.ok());
  }
  CHECK(holder.kept_everything());
}
