/* GEMM with packed panels of weights, float32 or bfloat16, and its epilogues; int8 and int4: gemm_quantized.h.
 *
 * A panel is 16 outputs. Float32 weights lie as [panels, inputs, 16], bfloat16 ones as [panels, inputs / 2,
 * 16, 2] (the VNNI layout: two inputs side by side). Each sum is taken in the order of its inputs, whatever the number
 * of rows and wherever a row is, so that a row's bits depend on the row alone. Blocking changes no order: sums that
 * wait for their next block of inputs are stored as they are.
 *
 * A work item is some pairs of panels for a chunk of rows. Few rows stream the weights through once: then memory is
 * what takes time. With more rows a block of a panel stays in the first-level cache for all row tiles.
 */
#include "gemm.h"
#include "gemm_quantized.h"
#include "gemm_tiles.h"

#if VECTORS >= 32
enum { TILE_ROWS = 12, TILE_PANELS = 2 }; /* 24 of 32 registers hold sums */
#elif VECTORS >= 8
enum { TILE_ROWS = 6, TILE_PANELS = 1 }; /* 12 of 16 registers; of 24 of 32 on NEON */
#else
enum { TILE_ROWS = 2, TILE_PANELS = 1 };
#endif

enum {
    BLOCK = 256,                 /* inputs: of a panel in float32 they are half of the first-level cache */
    PAIRS_BLOCK = 768,           /* the same of products of bfloat16: fewer stores of sums pay for second-level reads */
    CHUNK = 192,                 /* rows: BLOCK inputs of each are a part of the second-level cache */
    ITEM_BYTES = 256 * 1024,     /* of weights, with few rows */
    GROUP = 8,                   /* pairs of an item at most, with many rows */
    LINE = 64,                   /* bytes of weights: an input of a panel in float32, two in bfloat16 */
};

/* How weights and x are multiplied: both float32; weights bfloat16 in VNNI layout, x widened to float32; both VNNI. */
enum operands { FLOATS, WIDENED_X, PAIRS };

/* One register tile: `rows` rows of x times TILE_PANELS panels, `lines` lines of each. */
struct tile {
    const char *x;
    int64_t x_stride;
    const char *weight;
    int64_t panel_bytes; /* from panel to panel */
    int64_t lines;
    const char *next; /* weights that are read after these: prefetched; 0: none */
    int64_t next_step; /* bytes of them with each line: row tiles share them, so that memory is never idle */
    float *sums;      /* [rows, PAIR] */
    int fresh;        /* the sums begin here */
};

INLINE void multiply(enum operands operands, int rows, const struct tile *t) {
    f32x16 sums[TILE_ROWS][TILE_PANELS];
#pragma clang loop unroll(full)
    for (int r = 0; r < rows; r++)
#pragma clang loop unroll(full)
        for (int s = 0; s < TILE_PANELS; s++)
            sums[r][s] = t->fresh ? splat_f32(0) : load_f32(t->sums + r * PAIR + s * LANES);
    const char *x = t->x, *weight = t->weight, *next = t->next;
    int64_t x_stride = t->x_stride, panel_bytes = t->panel_bytes, next_step = t->next_step;
#pragma clang loop unroll_count(4)
    for (int64_t i = 0; i < t->lines; i++) {
        __asm__ volatile("" ::: "memory"); /* x of the next lines is not loaded yet: the registers are full */
        u32x16 w[TILE_PANELS];
#pragma clang loop unroll(full)
        for (int s = 0; s < TILE_PANELS; s++) {
            w[s] = load_u32(weight + s * panel_bytes + i * LINE);
            if (next) prefetch(next + s * panel_bytes + i * next_step);
        }
        const char *at = x + (operands == WIDENED_X ? 8 : 4) * i;
#pragma clang loop unroll(full)
        for (int r = 0; r < rows; r++) {
            const char *from = at + r * x_stride;
            if (operands == PAIRS) {
                uint32_t pair;
                __builtin_memcpy(&pair, from, sizeof pair);
#pragma clang loop unroll(full)
                for (int s = 0; s < TILE_PANELS; s++) sums[r][s] = dot_bf16_pairs(sums[r][s], splat_u32(pair), w[s]);
            } else {
                float v[2];
                __builtin_memcpy(v, from, operands == FLOATS ? sizeof *v : sizeof v);
#pragma clang loop unroll(full)
                for (int s = 0; s < TILE_PANELS; s++) {
                    f32x16 first = operands == FLOATS ? (f32x16)w[s] : low_bf16(w[s]);
                    sums[r][s] = fma_f32(splat_f32(v[0]), first, sums[r][s]);
                    if (operands == WIDENED_X) sums[r][s] = fma_f32(splat_f32(v[1]), high_bf16(w[s]), sums[r][s]);
                }
            }
        }
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < rows; r++)
#pragma clang loop unroll(full)
        for (int s = 0; s < TILE_PANELS; s++) store_f32(t->sums + r * PAIR + s * LANES, sums[r][s]);
}

#define CASE(rows) \
    case rows: \
        multiply(operands, rows, t); \
        break;

INLINE void multiply_rows(enum operands operands, int64_t rows, const struct tile *t) {
    switch (rows) {
        CASE(1)
        CASE(2)
#if VECTORS >= 8
        CASE(3)
        CASE(4)
        CASE(5)
        CASE(6)
#endif
#if VECTORS >= 32
        CASE(7)
        CASE(8)
        CASE(9)
        CASE(10)
        CASE(11)
        CASE(12)
#endif
    }
}

static NOINLINE void multiply_floats(int64_t rows, const struct tile *t) { multiply_rows(FLOATS, rows, t); }

static NOINLINE void multiply_widened(int64_t rows, const struct tile *t) { multiply_rows(WIDENED_X, rows, t); }

#if HAS_DOT_BF16 && !HAS_TILES /* with tiles, bfloat16 rows go through them */
static NOINLINE void multiply_pairs(int64_t rows, const struct tile *t) { multiply_rows(PAIRS, rows, t); }
#endif

/* ---- work items ---- */

/* How an operation falls into work items. */
struct plan {
    int64_t pairs;  /* of panels */
    int64_t group;  /* pairs of an item */
    int64_t groups;
    int64_t chunk;  /* rows of an item */
    int64_t lines;  /* of a panel */
    int64_t block;  /* lines that are met at a time */
    int64_t blocks;
    int few; /* rows: one row tile for each panel */
};

INLINE struct plan plan_of(const struct op *op, int64_t rows) {
    int narrow = op->weight_dtype == BFLOAT16;
    struct plan p = {.pairs = op->panels / 2};
    p.lines = narrow ? op->width / 2 : op->width;
    p.few = rows <= TILE_ROWS;
    p.chunk = min_i64(rows, CHUNK);
    if (p.few)
        p.group = min_i64(ITEM_BYTES / (2 * LINE * max_i64(p.lines, 1)), p.pairs / 16);
    else
        p.group = min_i64(GROUP, p.pairs * ceil_div(rows, CHUNK) / 16);
    p.group = max_i64(p.group, 1);
    p.groups = ceil_div(p.pairs, p.group);
    p.block = BLOCK;
    if (narrow) p.block = (op->dtype == BFLOAT16 && HAS_DOT_BF16 && VECTORS >= 32 ? PAIRS_BLOCK : BLOCK) / 2;
    p.blocks = max_i64(ceil_div(p.lines, p.block), 1);
    return p;
}

/* Where things are in a thread's scratch, in bytes. */
struct layout {
    int64_t sums;   /* float32 [pairs of the item, rows of the chunk, PAIR] */
    int64_t weight; /* float32 [BLOCK, 16]: a block of a panel, widened */
    int64_t x;      /* float32 [rows of the chunk, BLOCK or width]: widened */
    int64_t bytes;
};

INLINE struct layout layout_of(const struct op *op, const struct plan *p) {
    struct layout l = {.sums = CACHE_LINE}; /* the first line says which x is there, widened: see gemm_item */
    l.weight = l.sums + p->group * p->chunk * PAIR * 4;
    l.x = l.weight + BLOCK * LANES * 4;
    l.bytes = l.x + p->chunk * (p->few ? op->width : BLOCK) * 4;
    return l;
}

/* x bfloat16 [rows, width] -> float32 [rows, width] at `to`. */
static void widen_rows(const char *x, int64_t stride, int64_t rows, int64_t width, float *to) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < width; i += LANES) /* a multiple of 32 */
            store_f32(to + r * width + i, load_bf16((const bf16 *)(x + r * stride) + i));
}

/* Lines of pairs -> float32 [2 * lines, 16]. */
static void widen_weight(const char *weight, int64_t lines, float *to) {
    for (int64_t i = 0; i < lines; i++) {
        u32x16 pairs = load_u32(weight + i * LINE);
        store_f32(to + (2 * i) * LANES, low_bf16(pairs));
        store_f32(to + (2 * i + 1) * LANES, high_bf16(pairs));
    }
}

/* `is_bf16`: x, `narrow`: weights. */
INLINE void item_of(int is_bf16, int narrow, const struct op *op, int64_t rows, int64_t item, char *scratch) {
    const int widen = is_bf16 && !HAS_DOT_BF16;
    struct plan p = plan_of(op, rows);
    struct layout layout = layout_of(op, &p);
    int64_t *widened = (int64_t *)scratch; /* the address of the x that is there */
    float *all_sums = (float *)(scratch + layout.sums), *widened_weight = (float *)(scratch + layout.weight);
    float *widened_x = (float *)(scratch + layout.x);
    int64_t first_row = item / p.groups * CHUNK, count = min_i64(CHUNK, rows - first_row);
    int64_t first_pair = item % p.groups * p.group, pairs = min_i64(p.group, p.pairs - first_pair);
    int64_t units = pairs * (2 / TILE_PANELS), steps = units * p.blocks;
    int64_t row_tile = ceil_div(count, ceil_div(count, TILE_ROWS)), panel_bytes = p.lines * LINE;
    int64_t x_bytes = is_bf16 ? 2 : 4, per_line = narrow ? 2 : 1; /* inputs of a line */
    const char *weights = op->weight, *weights_end = weights + op->panels * panel_bytes;
    const char *converted = 0;
    for (int64_t step = 0; step < steps; step++) {
        /* few rows: all of a panel, then the next one; else all panels' block, then the next block */
        int64_t unit = p.few ? step / p.blocks : step % units, block = p.few ? step % p.blocks : step / units;
        int64_t panel = 2 * first_pair + unit * TILE_PANELS, at = block * p.block;
        int64_t lines = min_i64(p.block, p.lines - at);
        int64_t soon = min_i64(step + 1, steps - 1), ahead = 0;
        if (p.few && step + 1 == steps)
            ahead = (panel + TILE_PANELS) * panel_bytes; /* another item's */
        else
            ahead = (2 * first_pair + (p.few ? soon / p.blocks : soon % units) * TILE_PANELS) * panel_bytes +
                    (p.few ? soon % p.blocks : soon / units) * p.block * LINE;
        const char *next = weights + ahead;
        if (next + (TILE_PANELS - 1) * panel_bytes + lines * LINE > weights_end) next = 0;
        const char *x = (const char *)op->x + first_row * op->x_stride;
        x += panel / op->group_panels * op->width * x_bytes;
        int64_t x_stride = op->x_stride;
        if (widen && p.few) {
            if (*widened != (int64_t)(intptr_t)x) {
                widen_rows(x, x_stride, count, op->width, widened_x);
                *widened = (int64_t)(intptr_t)x;
            }
            x_stride = op->width * 4;
            x = (const char *)widened_x + at * 8;
        } else {
            x += at * per_line * x_bytes;
            if (widen) {
                int64_t width = lines * 2;
                if (x != converted) {
                    widen_rows(x, x_stride, count, width, widened_x);
                    converted = x;
                }
                x_stride = width * 4;
                x = (const char *)widened_x;
            }
        }
        float *sums = all_sums + unit * TILE_PANELS / 2 * count * PAIR + unit * TILE_PANELS % 2 * LANES;
        int64_t step_bytes = max_i64(LINE / ceil_div(count, row_tile), 2);
        const char *first_line = weights + panel * panel_bytes + at * LINE;
        struct tile t = {x,     x_stride, first_line, panel_bytes, lines, next, step_bytes,
                         sums, !block};
        int floats = !narrow;
        if (narrow && (widen || !is_bf16) && TILE_PANELS == 1 && !p.few) {
            widen_weight(t.weight, lines, widened_weight);
            t.weight = (const char *)widened_weight;
            t.lines = 2 * lines;
            t.next_step /= 2;
            floats = 1;
        }
        for (int64_t r = 0; r < count; r += row_tile) {
            int64_t some = min_i64(row_tile, count - r);
            t.x = x + r * x_stride;
            t.sums = sums + r * PAIR;
            if (floats)
                multiply_floats(some, &t);
#if HAS_DOT_BF16 && !HAS_TILES
            else if (is_bf16)
                multiply_pairs(some, &t);
#endif
            else
                multiply_widened(some, &t);
            if (next) t.next += t.lines * t.next_step;
            if (block + 1 == p.blocks && (unit + 1) * TILE_PANELS % 2 == 0) {
                int64_t pair = panel / 2;
                finish_pair(is_bf16, op, first_row + r, some, pair, all_sums + ((pair - first_pair) * count + r) * PAIR);
            }
        }
    }
}

INLINE int is_quantized(const struct op *op) { return op->weight_dtype == INT8 || op->weight_dtype == INT4; }

int64_t gemm_items(const struct op *op, int64_t rows) {
    if (is_quantized(op)) return quantized_items(op, rows);
#if HAS_TILES
    if (op->dtype == BFLOAT16) return ceil_div(op->panels / 2, tiled_group(op, rows)) * ceil_div(rows, TILED_CHUNK);
#endif
    return plan_of(op, rows).groups * ceil_div(rows, CHUNK);
}

int64_t gemm_scratch(const struct op *op, int64_t rows) {
    if (is_quantized(op)) return quantized_scratch(op, rows);
#if HAS_TILES
    if (op->dtype == BFLOAT16) return tiled_scratch(op);
#endif
    struct plan p = plan_of(op, rows);
    return layout_of(op, &p).bytes;
}

void gemm_item(const struct op *op, int64_t rows, int64_t item, void *scratch) {
    if (is_quantized(op))
        quantized_item(op, rows, item, scratch);
    else if (op->weight_dtype == FLOAT32)
        item_of(0, 0, op, rows, item, scratch);
    else if (op->dtype == FLOAT32)
        item_of(0, 1, op, rows, item, scratch);
    else
#if HAS_TILES
        tiled_item(op, rows, item, scratch);
#else
        item_of(1, 1, op, rows, item, scratch);
#endif
}
