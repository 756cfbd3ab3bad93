/* The GEMM of int8 and int4 weights: activations are quantised, too, and dot products are whole numbers.
 *
 * Numbers are quantised in groups of 32 along the input. A group's dot product is exact, the same on every instruction
 * set; it is scaled, and added to the sums of the groups before it in float32. So a row's bits depend on the row alone.
 *
 * A panel is its scales, bfloat16 [groups, 16], padded to a whole cache line, and then its codes: int8 [groups, 8, 16,
 * 4], four inputs of an output side by side, or int4 + 8 [groups, 4, 16, 4] with the group's input i in the lower
 * halves and input 16 + i in the upper ones.
 *
 * A row of x is quantised by each thread that meets it, and kept in its scratch from item to item. Where there are
 * products of matrices (I8MM), rows are kept two by two.
 */
#ifndef LPA_GEMM_QUANTIZED_H
#define LPA_GEMM_QUANTIZED_H

#include "gemm.h"

/* Rows of a register tile. */
#if HAS_MATRIX_I8 || (HAS_DOT_I8 && VECTORS >= 32)
#define QUANTIZED_ROWS 8
#elif HAS_DOT_S8
#define QUANTIZED_ROWS 3
#elif HAS_NEON
#define QUANTIZED_ROWS 1 /* a product and its sums take all registers */
#else
#define QUANTIZED_ROWS 4
#endif

enum {
    GROUP_INPUTS = 32,
    INT8_LINES = 8, /* lines of a group: 16 outputs of 4 inputs each */
    INT4_LINES = 4,
    ROWS_TOGETHER = HAS_MATRIX_I8 ? 2 : 1,
    QUANTIZED_CHUNK = 128,         /* rows of an item: in the second-level cache, with a pair of panels */
    QUANTIZED_BYTES = 128 * 1024,  /* of weights of an item */
};

/* A group of a row of x, or of two: x = scale * codes. */
struct x_group {
    float scale[ROWS_TOGETHER]; /* NaN: not all numbers are finite */
    int32_t sum[ROWS_TOGETHER]; /* of the codes */
    int8_t codes[GROUP_INPUTS / 8][ROWS_TOGETHER][8];
};

/* `side`: which one of the rows that are together it is. */
static void quantize_row(int is_bf16, const void *x, int64_t groups, struct x_group *to, int side) {
    for (int64_t g = 0; g < groups; g++) {
        f32x16 first = load_as(is_bf16, x, g * GROUP_INPUTS), second = load_as(is_bf16, x, g * GROUP_INPUTS + LANES);
        i32x16 sizes = __builtin_elementwise_max((i32x16)first & 0x7fffffff, (i32x16)second & 0x7fffffff);
        int32_t bits = max_i32(sizes); /* larger numbers have larger bits, and NaN the largest */
        float largest;
        __builtin_memcpy(&largest, &bits, sizeof largest);
        int finite = largest < __builtin_inff(), tiny = largest < 1e-30f; /* of which 127 / x may be infinite */
        if (!finite) first = second = splat_f32(0); /* codes of any kind will do, but not those that overflow a sum */
        f32x16 factor = splat_f32(finite && !tiny ? 127 / largest : 0);
        i32x16 codes[2] = {round_i32(first * factor), round_i32(second * factor)};
        to[g].scale[side] = finite ? (tiny ? 0 : largest / 127) : __builtin_nanf("");
        to[g].sum[side] = sum_i32(codes[0] + codes[1]);
        int8_t bytes[GROUP_INPUTS];
        store_i8(bytes, codes[0]);
        store_i8(bytes + LANES, codes[1]);
        for (int i = 0; i < GROUP_INPUTS / 8; i++) __builtin_memcpy(to[g].codes[i][side], bytes + 8 * i, 8);
    }
}

INLINE int64_t scale_bytes(int64_t groups) { return ceil_div(groups * LANES * 2, CACHE_LINE) * CACHE_LINE; }

INLINE int64_t lines_of(int is_int4) { return is_int4 ? INT4_LINES : INT8_LINES; }

INLINE int64_t quantized_panel_bytes(int is_int4, int64_t groups) {
    return scale_bytes(groups) + groups * lines_of(is_int4) * CACHE_LINE;
}

/* Four codes of the first row of a group, from 4 * i on, in all lanes. */
INLINE u32x16 splat_codes(const struct x_group *group, int i) {
    uint32_t four;
    __builtin_memcpy(&four, group->codes[i / 2][0] + i % 2 * 4, sizeof four);
    return splat_u32(four);
}

/* `rows` rows of x, `stride` groups apart, times one panel -> sums [rows, PAIR]. With each group `lines` lines at
 * `next` are prefetched, if that is not 0. */
INLINE void multiply_panel(int is_int4, int rows, const struct x_group *x, int64_t stride, const char *panel,
                           int64_t groups, float *sums, const char *next, int64_t lines) {
    const bf16 *scales = (const bf16 *)panel;
    const char *codes = panel + scale_bytes(groups);
    f32x16 totals[QUANTIZED_ROWS];
#pragma clang loop unroll(full)
    for (int r = 0; r < rows; r++) totals[r] = splat_f32(0);
    for (int64_t g = 0; g < groups; g++) {
        i32x16 dots[QUANTIZED_ROWS];
#pragma clang loop unroll(full)
        for (int r = 0; r < rows; r++) dots[r] = splat_i32(0);
        if (next) prefetch_bytes(next + g * lines * CACHE_LINE, lines * CACHE_LINE);
#pragma clang loop unroll(full)
        for (int i = 0; i < lines_of(is_int4); i++) {
            u32x16 w = load_u32(codes + (g * lines_of(is_int4) + i) * CACHE_LINE);
            u32x16 low = is_int4 ? w & 0x0f0f0f0fu : weights_i8(w), high = (w >> 4) & 0x0f0f0f0fu;
#pragma clang loop unroll(full)
            for (int r = 0; r < rows; r++) {
                const struct x_group *group = &x[r * stride + g];
                u32x16 four = splat_codes(group, i);
                if (is_int4)
                    dots[r] = add_u4(add_u4(dots[r], four, low), splat_codes(group, i + INT4_LINES), high);
                else
                    dots[r] = dot_i8(dots[r], four, low);
            }
        }
        f32x16 scale = load_bf16(scales + g * LANES);
#pragma clang loop unroll(full)
        for (int r = 0; r < rows; r++) {
            const struct x_group *group = &x[r * stride + g];
            i32x16 dot = is_int4 ? total_u4(dots[r]) - 8 * *group->sum : dots[r] - EXCESS_I8 * *group->sum;
            totals[r] = fma_f32(__builtin_convertvector(dot, f32x16), scale * splat_f32(*group->scale), totals[r]);
        }
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < rows; r++) store_f32(sums + r * PAIR, totals[r]);
}

#if HAS_MATRIX_I8
/* The same for pairs of rows, `stride` groups apart, four outputs at a time. A product of matrices takes eight inputs of
 * two outputs: two lines of the panel, zipped. */
INLINE void multiply_pairs_of_rows(int is_int4, int pairs, const struct x_group *x, int64_t stride, const char *panel,
                                   int64_t groups, float *sums, const char *next, int64_t lines) {
    for (int64_t first = 0; first < LANES; first += 4) {
        const bf16 *scales = (const bf16 *)panel + first;
        const char *codes = panel + scale_bytes(groups) + first * 4;
        f32x4 totals[QUANTIZED_ROWS / 2][2]; /* [pairs, pairs of outputs], each one two rows of two outputs */
#pragma clang loop unroll(full)
        for (int r = 0; r < pairs; r++) totals[r][0] = totals[r][1] = (f32x4){0, 0, 0, 0};
        for (int64_t g = 0; g < groups; g++) {
            i32x4 dots[QUANTIZED_ROWS / 2][2];
#pragma clang loop unroll(full)
            for (int r = 0; r < pairs; r++) {
                const int32_t *sum = x[r * stride + g].sum;
                i32x4 offset = {-8 * sum[0], -8 * sum[0], -8 * sum[1], -8 * sum[1]};
                dots[r][0] = dots[r][1] = is_int4 ? offset : (i32x4){0, 0, 0, 0};
            }
            if (next && !first) prefetch_bytes(next + g * lines * CACHE_LINE, lines * CACHE_LINE);
#pragma clang loop unroll(full)
            for (int i = 0; i < lines_of(is_int4); i += 2) {
                const char *line = codes + (g * lines_of(is_int4) + i) * CACHE_LINE;
                u32x4 even = load_u32x4(line), odd = load_u32x4(line + CACHE_LINE);
                u32x4 both[2] = {__builtin_shufflevector(even, odd, 0, 4, 1, 5),
                                 __builtin_shufflevector(even, odd, 2, 6, 3, 7)};
#pragma clang loop unroll(full)
                for (int s = 0; s < 2; s++) {
                    u32x4 low = is_int4 ? both[s] & 0x0f0f0f0fu : both[s], high = (both[s] >> 4) & 0x0f0f0f0fu;
#pragma clang loop unroll(full)
                    for (int r = 0; r < pairs; r++) {
                        const struct x_group *group = &x[r * stride + g];
                        dots[r][s] = dot_matrix(dots[r][s], load_u32x4(group->codes[i / 2]), low);
                        if (is_int4)
                            dots[r][s] = dot_matrix(dots[r][s], load_u32x4(group->codes[(i + INT4_LINES) / 2]), high);
                    }
                }
            }
            f32x4 scale = load_bf16x4(scales + g * LANES);
            f32x4 of_outputs[2] = {__builtin_shufflevector(scale, scale, 0, 1, 0, 1),
                                   __builtin_shufflevector(scale, scale, 2, 3, 2, 3)};
#pragma clang loop unroll(full)
            for (int r = 0; r < pairs; r++) {
                const float *of_rows = x[r * stride + g].scale;
                f32x4 of_x = {of_rows[0], of_rows[0], of_rows[1], of_rows[1]};
                for (int s = 0; s < 2; s++)
                    totals[r][s] =
                        fma_f32x4(__builtin_convertvector(dots[r][s], f32x4), of_outputs[s] * of_x, totals[r][s]);
            }
        }
#pragma clang loop unroll(full)
        for (int r = 0; r < pairs; r++) {
            f32x4 rows[2] = {__builtin_shufflevector(totals[r][0], totals[r][1], 0, 1, 4, 5),
                             __builtin_shufflevector(totals[r][0], totals[r][1], 2, 3, 6, 7)};
            for (int side = 0; side < 2; side++)
                __builtin_memcpy(sums + (2 * r + side) * PAIR + first, &rows[side], sizeof *rows);
        }
    }
}
#endif

#define QUANTIZED_CASE(multiply, number) \
    case number: \
        multiply(is_int4, number, x, stride, panel, groups, sums, next, lines); \
        break;

INLINE void multiply_quantized(int is_int4, int64_t rows, const struct x_group *x, int64_t stride, const char *panel,
                               int64_t groups, float *sums, const char *next, int64_t lines) {
#if HAS_MATRIX_I8
    if (rows > 1) {
        switch ((rows + 1) / 2) {
            QUANTIZED_CASE(multiply_pairs_of_rows, 1)
            QUANTIZED_CASE(multiply_pairs_of_rows, 2)
            QUANTIZED_CASE(multiply_pairs_of_rows, 3)
            QUANTIZED_CASE(multiply_pairs_of_rows, 4)
        }
        return;
    }
#endif
    switch (rows) {
        QUANTIZED_CASE(multiply_panel, 1)
#if !HAS_MATRIX_I8 && QUANTIZED_ROWS > 1
        QUANTIZED_CASE(multiply_panel, 2)
        QUANTIZED_CASE(multiply_panel, 3)
#if QUANTIZED_ROWS > 3
        QUANTIZED_CASE(multiply_panel, 4)
#endif
#if QUANTIZED_ROWS > 4
        QUANTIZED_CASE(multiply_panel, 5)
        QUANTIZED_CASE(multiply_panel, 6)
        QUANTIZED_CASE(multiply_panel, 7)
        QUANTIZED_CASE(multiply_panel, 8)
#endif
#endif
    }
}

static NOINLINE void multiply_int8(int64_t rows, const struct x_group *x, int64_t stride, const char *panel,
                                   int64_t groups, float *sums, const char *next, int64_t lines) {
    multiply_quantized(0, rows, x, stride, panel, groups, sums, next, lines);
}

static NOINLINE void multiply_int4(int64_t rows, const struct x_group *x, int64_t stride, const char *panel,
                                   int64_t groups, float *sums, const char *next, int64_t lines) {
    multiply_quantized(1, rows, x, stride, panel, groups, sums, next, lines);
}

/* ---- work items ---- */

/* Pairs of panels of an item: so few that there are items enough for all threads. */
static int64_t quantized_group(const struct op *op, int64_t rows) {
    int64_t pairs = op->panels / 2, bytes = 2 * quantized_panel_bytes(op->weight_dtype == INT4, op->width / GROUP_INPUTS);
    int64_t most = pairs * ceil_div(rows, QUANTIZED_CHUNK) / 16;
    return max_i64(1, min_i64(QUANTIZED_BYTES / max_i64(bytes, 1), most));
}

static int64_t quantized_items(const struct op *op, int64_t rows) {
    return ceil_div(op->panels / 2, quantized_group(op, rows)) * ceil_div(rows, QUANTIZED_CHUNK);
}

/* A thread's scratch: a line that says which x is there (the address of its first row; -1: none), sums float32
 * [QUANTIZED_ROWS, PAIR], and rows of x, of all groups of panels. */
enum { QUANTIZED_SUMS_AT = CACHE_LINE, QUANTIZED_X_AT = QUANTIZED_SUMS_AT + QUANTIZED_ROWS * PAIR * 4 };

static int64_t row_groups(const struct op *op) {
    return op->width / GROUP_INPUTS * (op->panels / op->group_panels);
}

static int64_t quantized_scratch(const struct op *op, int64_t rows) {
    int64_t count = ceil_div(min_i64(rows, QUANTIZED_CHUNK), ROWS_TOGETHER);
    return QUANTIZED_X_AT + count * row_groups(op) * (int64_t)sizeof(struct x_group);
}

static void quantized_item(const struct op *op, int64_t rows, int64_t item, char *scratch) {
    const int is_bf16 = op->dtype == BFLOAT16, is_int4 = op->weight_dtype == INT4;
    int64_t *kept = (int64_t *)scratch, stride = row_groups(op), groups = op->width / GROUP_INPUTS;
    float *sums = (float *)(scratch + QUANTIZED_SUMS_AT);
    struct x_group *quantized = (struct x_group *)(scratch + QUANTIZED_X_AT);
    int64_t pairs = op->panels / 2, group = quantized_group(op, rows), items = ceil_div(pairs, group);
    int64_t first_row = item / items * QUANTIZED_CHUNK, count = min_i64(QUANTIZED_CHUNK, rows - first_row);
    int64_t first = item % items * group, last = min_i64(first + group, pairs);
    const char *x = (const char *)op->x + first_row * op->x_stride;
    if (*kept != (int64_t)(intptr_t)x) {
        for (int64_t r = 0; r < ceil_div(count, ROWS_TOGETHER) * ROWS_TOGETHER; r++) {
            const char *row = x + min_i64(r, count - 1) * op->x_stride; /* a last row alone fills both places */
            struct x_group *to = quantized + r / ROWS_TOGETHER * stride;
            if (is_bf16)
                quantize_row(1, row, stride, to, r % ROWS_TOGETHER);
            else
                quantize_row(0, row, stride, to, r % ROWS_TOGETHER);
        }
        *kept = (int64_t)(intptr_t)x;
    }
    int64_t panel_bytes = quantized_panel_bytes(is_int4, groups), tiles = ceil_div(count, QUANTIZED_ROWS);
    int64_t tile = ceil_div(ceil_div(count, tiles), ROWS_TOGETHER) * ROWS_TOGETHER;
    int64_t share = max_i64(1, lines_of(is_int4) / tiles);
    const char *weights = op->weight, *end = weights + op->panels * panel_bytes;
    for (int64_t pair = first; pair < last; pair++) {
        const struct x_group *part = quantized + 2 * pair / op->group_panels * groups;
        const char *panel = weights + 2 * pair * panel_bytes;
        for (int64_t r = 0; r < count; r += tile) {
            int64_t some = min_i64(tile, count - r);
            const struct x_group *rows_at = part + r / ROWS_TOGETHER * stride;
            for (int side = 0; side < 2; side++) {
                const char *mine = panel + side * panel_bytes;
                const char *next = mine + 2 * panel_bytes + r / tile * share * groups * CACHE_LINE;
                if (next + groups * share * CACHE_LINE > end) next = 0;
                if (is_int4)
                    multiply_int4(some, rows_at, stride, mine, groups, sums + side * LANES, next, share);
                else
                    multiply_int8(some, rows_at, stride, mine, groups, sums + side * LANES, next, share);
            }
            finish_pair(is_bf16, op, first_row + r, some, pair, sums);
        }
    }
}

#endif
