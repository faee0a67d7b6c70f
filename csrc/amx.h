// Products of bfloat16 pairs on AMX: eight tile registers of 16 rows of 64 bytes. A left operand is
// 16 rows of 32 values wherever they lie at equal distances, a right one 16 rows of 16 units (as
// pack.h packs keys and values), a result 16 rows of 16 floats.
#pragma once
#include "pack.h"

namespace hipserve {
namespace HIPSERVE_TIER {

constexpr int kStep = 32;       // values that one instruction sums over
constexpr int kBlockRows = 32;  // rows of a block of results: two registers high, two wide

// Units of a row that products read: whole steps where they are on tile registers.
template <class Unit> static inline int64_t depth_of(int64_t values) {
  return (kTiled<Unit> ? round_up(values, (int64_t)kStep) : values) / Unit::kValues;
}

// Rows of units or of results, `stride` of them apart.
struct UnitRows {
  float* data;
  int64_t stride;
  // The same rows from column c on.
  UnitRows from(int64_t c) const { return {data + c, stride}; }
};

#if defined(__AMX_BF16__)
// The tile registers of this thread, all of full size, for as long as this lives.
struct TileRegisters {
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } shape = {};
    shape.palette = 1;
    for (int i = 0; i < 8; ++i) {
      shape.bytes[i] = 64;
      shape.rows[i] = kLanes;
    }
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~TileRegisters() { _tile_release(); }
};

// Rows of a left operand, `stride` bytes apart.
struct TallRows {
  const void* data;
  int64_t stride;
};

// c (+)= a b: 16 kTall rows, 16 kWide columns, `steps` steps of 32 values. The intrinsics of gcc do
// not say that they read memory: the first statement makes what was stored before be there.
template <int kTall, int kWide, bool kAdd>
static inline void multiply_tiles(const TallRows (&a)[2], UnitRows b, int steps, UnitRows c) {
  const int64_t right = b.stride * 4, out = c.stride * 4;
  float* low = c.data + kLanes * c.stride;
  asm volatile("" : : : "memory");
  if (kAdd) {
    _tile_loadd(0, c.data, out);
    if (kWide > 1) _tile_loadd(1, c.data + kLanes, out);
    if (kTall > 1) _tile_loadd(2, low, out);
    if (kTall > 1 && kWide > 1) _tile_loadd(3, low + kLanes, out);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int k = 0; k < steps; ++k) {
    _tile_loadd(4, (const char*)a[0].data + k * 64, a[0].stride);
    _tile_loadd(6, b.data, right);
    _tile_dpbf16ps(0, 4, 6);
    if (kWide > 1) {
      _tile_loadd(7, b.data + kLanes, right);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kTall > 1) {
      _tile_loadd(5, (const char*)a[1].data + k * 64, a[1].stride);
      _tile_dpbf16ps(2, 5, 6);
      if (kWide > 1) _tile_dpbf16ps(3, 5, 7);
    }
    b.data += kLanes * b.stride;
  }
  _tile_stored(0, c.data, out);
  if (kWide > 1) _tile_stored(1, c.data + kLanes, out);
  if (kTall > 1) _tile_stored(2, low, out);
  if (kTall > 1 && kWide > 1) _tile_stored(3, low + kLanes, out);
}

// c[rows][columns] (+)= a b for up to 32 rows, and columns in sixteens.
template <bool kAdd>
static inline void multiply_block(UnitRows a, int64_t rows, UnitRows b, int64_t columns, int steps,
                                  UnitRows c) {
  const TallRows tall[2] = {{a.data, a.stride * 4}, {a.data + kLanes * a.stride, a.stride * 4}};
  int64_t i = 0;
  if (rows > kLanes) {
    for (; i + 2 * kLanes <= columns; i += 2 * kLanes)
      multiply_tiles<2, 2, kAdd>(tall, b.from(i), steps, c.from(i));
    if (i < columns) multiply_tiles<2, 1, kAdd>(tall, b.from(i), steps, c.from(i));
  } else {
    for (; i + 2 * kLanes <= columns; i += 2 * kLanes)
      multiply_tiles<1, 2, kAdd>(tall, b.from(i), steps, c.from(i));
    if (i < columns) multiply_tiles<1, 1, kAdd>(tall, b.from(i), steps, c.from(i));
  }
}
#else
struct TileRegisters {
  TileRegisters() {}  // without it gcc calls the variable unused
};
template <bool kAdd>
static inline void multiply_block(UnitRows, int64_t, UnitRows, int64_t, int, UnitRows) {}
#endif

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
