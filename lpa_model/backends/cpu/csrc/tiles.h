/* Tiles of bfloat16 (AMX): a tile is 16 rows of 64 bytes, and TILE_DPBF16 adds to a tile [16, 16] of float32 the product
 * of a tile [16, 32] of bfloat16 and one [32, 16] in which rows 2i and 2i + 1 lie side by side, as [16, 16, 2].
 *
 * Tile numbers are literals. Without HAS_TILES configure and release do nothing, and the rest is not there. In the
 * flavour for tests tiles are plain arrays.
 */
#ifndef LPA_TILES_H
#define LPA_TILES_H

#include "vec.h"

#if !HAS_TILES

INLINE void tiles_configure(void) {}
INLINE void tiles_release(void) {}

#elif defined(__AMX_BF16__)

/* Make this thread's tiles whole ones, until it releases them. */
INLINE void tiles_configure(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) config.row_bytes[tile] = 64, config.rows[tile] = 16;
    _tile_loadconfig(&config);
}
INLINE void tiles_release(void) { _tile_release(); }

#define TILE_LOAD(tile, address, stride) _tile_loadd(tile, address, stride)
/* Of what is not needed again soon: it pushes nothing out of the first-level cache. */
#define TILE_STREAM(tile, address, stride) _tile_stream_loadd(tile, address, stride)
#define TILE_STORE(tile, address, stride) _tile_stored(tile, address, stride)
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_DPBF16(total, left, right) _tile_dpbf16ps(total, left, right)

#else

static __thread union {
    float f32[16][16];
    bf16 pairs[16][16][2];
    uint8_t bytes[16][64];
} emulated_tiles[8];

INLINE void tiles_configure(void) {}
INLINE void tiles_release(void) {}

static inline void emulated_load(int tile, const void *address, int64_t stride) {
    for (int r = 0; r < 16; r++) __builtin_memcpy(emulated_tiles[tile].bytes[r], (const char *)address + r * stride, 64);
}

static inline void emulated_store(int tile, void *address, int64_t stride) {
    for (int r = 0; r < 16; r++) __builtin_memcpy((char *)address + r * stride, emulated_tiles[tile].bytes[r], 64);
}

static inline void emulated_dpbf16(int total, int left, int right) {
    for (int r = 0; r < 16; r++) {
        f32x16 sums = load_f32(emulated_tiles[total].f32[r]);
        for (int k = 0; k < 16; k++) {
            uint32_t pair;
            __builtin_memcpy(&pair, emulated_tiles[left].pairs[r][k], sizeof pair);
            u32x16 x = splat_u32(pair), w = load_u32(emulated_tiles[right].bytes[k]);
            sums = fma_f32(low_bf16(x), low_bf16(w), sums);
            sums = fma_f32(high_bf16(x), high_bf16(w), sums);
        }
        store_f32(emulated_tiles[total].f32[r], sums);
    }
}

#define TILE_LOAD(tile, address, stride) emulated_load(tile, address, stride)
#define TILE_STREAM(tile, address, stride) emulated_load(tile, address, stride)
#define TILE_STORE(tile, address, stride) emulated_store(tile, address, stride)
#define TILE_ZERO(tile) __builtin_memset(&emulated_tiles[tile], 0, sizeof emulated_tiles[tile])
#define TILE_DPBF16(total, left, right) emulated_dpbf16(total, left, right)

#endif
#endif
