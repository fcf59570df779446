// AMX: the tile registers and their configuration keep their values, the permission to use them stays (a thread made
// after restart uses them too). Most processors have none; then the program skips.

#include <asm/prctl.h>
#include <cpuid.h>
#include <immintrin.h>

#include <thread>

#include "act.h"

constexpr int kGetPermission = 0x1022, kRequestPermission = 0x1023;  // ARCH_GET_XCOMP_PERM, ARCH_REQ_XCOMP_PERM
constexpr int kTileData = 18;                                        // its number in XCR0
constexpr size_t kRows = 16, kRowBytes = 64;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

struct alignas(64) Tile {
  uint8_t bytes[kRows * kRowBytes];
};

[[gnu::target("amx-tile")]] static void load(const TileConfig* config, const Tile* tiles) {
  _tile_loadconfig(config);
  _tile_loadd(0, tiles[0].bytes, kRowBytes);
  _tile_loadd(7, tiles[1].bytes, kRowBytes);
}

[[gnu::target("amx-tile")]] static void store(TileConfig* config, Tile* tiles) {
  _tile_storeconfig(config);
  _tile_stored(0, tiles[0].bytes, kRowBytes);
  _tile_stored(7, tiles[1].bytes, kRowBytes);
  _tile_release();
}

static void run(bool with_intermission) {
  TileConfig config, config_after;
  Tile tiles[2], after[2];
  for (int tile : {0, 7}) {
    config.row_bytes[tile] = kRowBytes;
    config.rows[tile] = kRows;
  }
  act::fill(tiles, sizeof tiles, act::random_u64());
  load(&config, tiles);
  if (with_intermission) act::intermission();
  store(&config_after, after);
  act::expect("configuration", memcmp(&config, &config_after, sizeof config) == 0);
  act::expect("tiles", memcmp(tiles, after, sizeof tiles) == 0);
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d >> 24 & 1) == 0) act::skip("this processor has no AMX");
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) act::skip("this kernel does not permit AMX");
  run(true);
  uint64_t permitted = 0;
  MUST(syscall(SYS_arch_prctl, kGetPermission, &permitted));
  act::expect("permission", (permitted >> kTileData & 1) != 0);
  std::thread(run, false).join();
  return act::finish();
}
