/* The bfloat16 GEMM in tiles (AMX): 32 rows and a pair of panels, a square of four tiles, at a time.
 *
 * Tiles 0 to 3 hold the square's sums, 4 and 7 rows of x, 5 and 6 weights. Tiles are loaded whole, so that the rows of
 * a last square that is not full are copied to scratch: behind them may be no memory.
 */
#ifndef LPA_GEMM_TILES_H
#define LPA_GEMM_TILES_H

#include "gemm.h"
#include "tiles.h"

#if HAS_TILES

enum {
    SQUARE = 32,        /* rows, and outputs of a pair of panels */
    TILE_BYTES = 1024,
    TILED_CHUNK = 256,  /* rows of an item: what stays in the second-level cache with the panels */
    TILED_GROUP = 8,    /* pairs of an item, where there are many: threads that write side by side hinder each other */
    AHEAD = 4096,       /* bytes of a panel that are prefetched */
};

/* A thread's scratch: a line that says whether the last rows are there, sums float32 [2, SQUARE, PAIR], and the last
 * rows, bfloat16 [SQUARE, groups * width]. */
enum { SUMS_AT = CACHE_LINE, ROWS_AT = SUMS_AT + 2 * SQUARE * PAIR * 4 };

static int64_t tiled_row_bytes(const struct op *op) { return 2 * op->width * (op->panels / op->group_panels); }

static int64_t tiled_scratch(const struct op *op) { return ROWS_AT + SQUARE * tiled_row_bytes(op); }

/* Pairs of an item: so few that there are items enough for all threads. */
static int64_t tiled_group(const struct op *op, int64_t rows) {
    int64_t pairs = op->panels / 2;
    return rows <= SQUARE ? 1 : min_i64(TILED_GROUP, max_i64(1, pairs * ceil_div(rows, TILED_CHUNK) / 8));
}

/* A square whose sums are known, and wait for their epilogue. */
struct square {
    int64_t row;
    int64_t pair;
    const float *sums; /* 0: none */
};

/* x [32, 32 * depth] times the pair of panels at `weight` -> sums [32, 32]; meanwhile the epilogue of `before`: tiles
 * and vectors are worked on side by side. With each tile of weights `lines` lines at `next` are prefetched, if that is
 * not 0. The panels stay in the first-level cache if the rows do not pass through it. */
static void multiply_square(const struct op *op, const char *x, int64_t stride, const char *weight, int64_t depth,
                            float *sums, const struct square *before, const char *next, int64_t lines) {
    const char *other = weight + TILE_BYTES * depth;
    int64_t share = ceil_div(SQUARE, depth);
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int64_t i = 0; i < depth; i++) {
        if (next) prefetch_bytes(next + i * lines * CACHE_LINE, lines * CACHE_LINE);
        TILE_STREAM(4, x + 64 * i, stride);
        TILE_LOAD(5, weight + TILE_BYTES * i, 64);
        TILE_DPBF16(0, 4, 5);
        TILE_LOAD(6, other + TILE_BYTES * i, 64);
        TILE_DPBF16(1, 4, 6);
        TILE_STREAM(7, x + 64 * i + 16 * stride, stride);
        TILE_DPBF16(2, 7, 5);
        TILE_DPBF16(3, 7, 6);
        int64_t start = i * share;
        if (before->sums && start < SQUARE)
            finish_pair(1, op, before->row + start, min_i64(share, SQUARE - start), before->pair,
                        before->sums + start * PAIR);
    }
    TILE_STORE(0, sums, 4 * PAIR);
    TILE_STORE(1, sums + LANES, 4 * PAIR);
    TILE_STORE(2, sums + 16 * PAIR, 4 * PAIR);
    TILE_STORE(3, sums + 16 * PAIR + LANES, 4 * PAIR);
}

/* The same of `count` rows. `cold`: the panels have not been read a moment ago. */
static void multiply_part(const char *x, int64_t stride, const char *weight, int64_t depth, int64_t count, int cold,
                          float *sums) {
    const char *other = weight + TILE_BYTES * depth;
    int both = count > 16;
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int64_t i = 0; i < depth; i++) {
        if (cold) {
            prefetch_bytes(weight + TILE_BYTES * i + AHEAD, TILE_BYTES);
            prefetch_bytes(other + TILE_BYTES * i + AHEAD, TILE_BYTES);
        }
        TILE_LOAD(4, x + 64 * i, stride);
        TILE_LOAD(5, weight + TILE_BYTES * i, 64);
        TILE_DPBF16(0, 4, 5);
        if (both) {
            TILE_LOAD(7, x + 64 * i + 16 * stride, stride);
            TILE_DPBF16(2, 7, 5);
        }
        TILE_LOAD(6, other + TILE_BYTES * i, 64);
        TILE_DPBF16(1, 4, 6);
        if (both) TILE_DPBF16(3, 7, 6);
    }
    TILE_STORE(0, sums, 4 * PAIR);
    TILE_STORE(1, sums + LANES, 4 * PAIR);
    if (both) {
        TILE_STORE(2, sums + 16 * PAIR, 4 * PAIR);
        TILE_STORE(3, sums + 16 * PAIR + LANES, 4 * PAIR);
    }
}

static void tiled_item(const struct op *op, int64_t rows, int64_t item, char *scratch) {
    int64_t *copied = (int64_t *)scratch, copy_stride = tiled_row_bytes(op);
    char *copy = scratch + ROWS_AT;
    if (*copied < 0) {
        int64_t first = rows / SQUARE * SQUARE;
        for (int64_t r = first; r < rows; r++)
            __builtin_memcpy(copy + (r - first) * copy_stride, (const char *)op->x + r * op->x_stride,
                             (uint64_t)copy_stride);
        *copied = 1;
    }
    int64_t pairs = op->panels / 2, group = tiled_group(op, rows), groups = ceil_div(pairs, group);
    int64_t chunk = item / groups * TILED_CHUNK, end = min_i64(chunk + TILED_CHUNK, rows);
    int64_t first = item % groups * group, last = min_i64(first + group, pairs);
    int64_t depth = op->width / 32, pair_bytes = 2 * depth * TILE_BYTES;
    int64_t lines = ceil_div(2 * 16, max_i64(1, (end - chunk) / SQUARE)); /* of the next panels, with each tile */
    float *sums = (float *)(scratch + SUMS_AT), *other = sums + SQUARE * PAIR;
    struct square before = {0, 0, 0};
    for (int64_t pair = first; pair < last; pair++) {
        int64_t part = 2 * (2 * pair / op->group_panels) * op->width;
        const char *weight = (const char *)op->weight + pair * pair_bytes;
        for (int64_t row = chunk; row < end; row += SQUARE) {
            int64_t count = min_i64(SQUARE, rows - row);
            const char *x = (const char *)op->x + row * op->x_stride + part;
            if (count < SQUARE || rows == SQUARE) { /* part of a square, or panels that are read only once */
                int whole = count == SQUARE;
                multiply_part(whole ? x : copy + part, whole ? op->x_stride : copy_stride, weight, depth, count,
                              row == chunk, sums);
                finish_pair(1, op, row, count, pair, sums);
            } else {
                int64_t square = (row - chunk) / SQUARE;
                const char *next = pair + 1 < last ? weight + pair_bytes + square * depth * lines * CACHE_LINE : 0;
                multiply_square(op, x, op->x_stride, weight, depth, sums, &before, next, lines);
                before = (struct square){row, pair, sums};
                float *swapped = sums;
                sums = other;
                other = swapped;
            }
        }
    }
    if (before.sums) finish_pair(1, op, before.row, SQUARE, before.pair, before.sums);
}

#endif
#endif
