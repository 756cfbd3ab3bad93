/* Decode attention: single queries over a paged cache of keys and values, full or latent.
 *
 * Split-KV with online softmax: a work item is `split_blocks` blocks of one row's tokens, so that the splits follow
 * from the row's length alone and a row's bits do not depend on the batch. An item writes maximum, sum and unnormalised
 * output of each head; the thread that ends a row's last item merges them in the order of the tokens. The item that
 * holds the row's own token writes it into the cache first. With tiles (AMX), heads that share bfloat16 keys or values
 * meet them there, all at once.
 */
#include "attention.h"
#include "tiles.h"

/* Register tiles: scores of one head and ONE_KEYS keys, or of SHARED heads and SHARED_KEYS keys that they share;
 * outputs of one head and ONE_COLUMNS vectors of columns, or of SHARED heads and SHARED_COLUMNS. */
#if WIDE_TILES
enum { ONE_KEYS = 16, SHARED_KEYS = 4, SHARED_COLUMNS = 4 };
#else
enum { ONE_KEYS = 4, SHARED_KEYS = 1, SHARED_COLUMNS = 1 };
#endif
enum { SHARED = 4, ONE_COLUMNS = 4 };
enum { TILE_ROWS = 16, TILE_KEYS = 64, TILE_VALUES = 32 }; /* heads; tokens that are met at a time */

/* One thread's scratch. */
struct scratch {
    char *queries;        /* [heads], each query_bytes long */
    char *scores;         /* float32 [heads, tokens of a split and some], rows line bytes apart: they become weights */
    int64_t query_bytes;
    int64_t line;
    /* for tiles, which read TILE_ROWS queries and rows of weights from each head on: */
    char *pairs;  /* queries transposed, bfloat16 VNNI [key_heads, key_width / 2, TILE_ROWS, 2] */
    char *found;  /* scores float32 [TILE_KEYS, TILE_ROWS] */
    char *last;   /* values of the last tokens, [TILE_VALUES / 2, value_width, 2], and zeros */
    char *mixed;  /* outputs float32 [TILE_ROWS, value_width] */
};

INLINE int64_t whole_lines(int64_t bytes) { return ceil_div(bytes, CACHE_LINE) * CACHE_LINE; }

/* Rows of queries and of scores. */
INLINE int64_t scratch_rows(const struct attention *a) { return a->heads + (HAS_TILES ? TILE_ROWS : 0); }

INLINE int64_t queries_bytes(const struct attention *a) { return whole_lines(4 * scratch_rows(a) * a->key_width); }

INLINE int64_t line_bytes(const struct attention *a) {
    return whole_lines(4 * (a->split_blocks * a->block_size + LANES));
}

INLINE struct scratch scratch_at(const struct attention *a, char *memory) {
    int64_t line = line_bytes(a), key_pairs = 2 * TILE_ROWS * a->key_width * a->key_heads;
    char *scores = memory + queries_bytes(a), *pairs = scores + scratch_rows(a) * line, *found = pairs + key_pairs;
    char *last = found + 4 * TILE_KEYS * TILE_ROWS, *mixed = last + 2 * TILE_VALUES * a->value_width;
    return (struct scratch){memory, scores, 4 * a->key_width, line, pairs, found, last, mixed};
}

int64_t attention_decode_scratch(const struct attention *a) {
    int64_t tiles = 2 * TILE_ROWS * a->key_width * a->key_heads + 4 * TILE_KEYS * TILE_ROWS +
                    (2 * TILE_VALUES + 4 * TILE_ROWS) * a->value_width;
    return queries_bytes(a) + scratch_rows(a) * line_bytes(a) + (HAS_TILES ? tiles : 0);
}

/* Whether products are of pairs of bfloat16; an int8 cache meets float32. */
INLINE int in_pairs(int form) { return uses_vnni(form == FORM_BF16); }

/* Bytes of a part of a query, see `store_query`. */
INLINE int64_t query_part_bytes(int form) { return form == FORM_BF16 && !HAS_DOT_BF16 ? 128 : 64; }

/* A query, rotated where positions are rotary, as parts: bfloat16 in VNNI layout, or float32, where the 16 even numbers
 * of a part come before the odd ones if keys are bfloat16. */
INLINE void store_query(int form, const char *from, int64_t width, const float *rope, char *to) {
    if (form != FORM_BF16 || HAS_DOT_BF16) {
        for (int64_t i = 0; i < width; i += LANES)
            store_as(in_pairs(form), to, i, load_rotated(rows_bf16(form), from, rope, i));
        return;
    }
    for (int64_t i = 0; i < width; i += 2 * LANES) {
        f32x16 x = load_rotated(1, from, rope, i), y = load_rotated(1, from, rope, i + LANES);
        f32x16 even = __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        f32x16 odd = __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
        store_f32((float *)to + i, even);
        store_f32((float *)to + i + LANES, odd);
    }
}

/* sums + a part of a query times that of a key, lane by lane. */
INLINE f32x16 multiply_part(int form, f32x16 sums, const char *query, struct part key) {
    if (in_pairs(form)) return dot_bf16_pairs(sums, load_u32(query), key.pairs);
    sums = fma_f32(load_f32((const float *)query), key.low, sums);
    return form == FORM_BF16 ? fma_f32(load_f32((const float *)query + LANES), key.high, sums) : sums;
}

INLINE f32x4 fold(f32x16 x) {
    f32x8 y = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
              __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(y, y, 0, 1, 2, 3) + __builtin_shufflevector(y, y, 4, 5, 6, 7);
}

/* The sum of each one's lanes. */
INLINE f32x4 sums_of_four(f32x16 a, f32x16 b, f32x16 c, f32x16 d) {
    f32x4 p = fold(a), q = fold(b), r = fold(c), s = fold(d);
    f32x4 t = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
    f32x4 u = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
    return __builtin_shufflevector(t, u, 0, 1, 4, 5) + __builtin_shufflevector(t, u, 2, 3, 6, 7);
}

/* Queries of `num_heads` heads times `num_keys` keys -> out [num_heads, num_keys], rows `line` bytes apart. */
INLINE void score_tile(int form, int num_heads, int num_keys, const char *queries, int64_t query_bytes,
                       const char *const *keys, int64_t width, char *out, int64_t line) {
    f32x16 sums[LANES]; /* [num_heads, num_keys] */
    for (int i = 0; i < LANES; i++) sums[i] = splat_f32(0);
    int64_t parts = width / part_numbers(form);
    for (int64_t i = 0; i < parts; i++)
        for (int k = 0; k < num_keys; k++) {
            struct part key = load_part(form, keys[k] + part_bytes(form) * i);
            for (int h = 0; h < num_heads; h++) {
                const char *query = queries + h * query_bytes + i * query_part_bytes(form);
                f32x16 *sum = &sums[h * num_keys + k];
                *sum = multiply_part(form, *sum, query, key);
            }
        }
    union {
        f32x16 sixteen;
        f32x4 four;
        float one[LANES];
    } found;
    if (num_heads * num_keys == LANES)
        found.sixteen = sums_f32(sums);
    else
        found.four = sums_of_four(sums[0], sums[1], sums[2], sums[3]);
    for (int h = 0; h < num_heads; h++)
        __builtin_memcpy(out + h * line, found.one + h * num_keys, (uint64_t)num_keys * sizeof(float));
}

/* Queries of `count` heads times `tokens` keys that they share -> out float32 [count, tokens]; some numbers behind a
 * row's last one are written, too. As many keys at `ahead` are fetched. */
INLINE void score_keys(int form, const char *queries, int64_t query_bytes, int64_t count, const char *keys,
                       int64_t tokens, int64_t width, char *out, int64_t line, const char *ahead) {
    int64_t key_bytes = width * cached_bytes(form), last = tokens - 1;
    const char *some[LANES];
    int64_t h = 0;
    for (; h + SHARED <= count; h += SHARED)
        for (int64_t t = 0; t < tokens; t += SHARED_KEYS) {
            for (int k = 0; k < SHARED_KEYS; k++) some[k] = keys + min_i64(t + k, last) * key_bytes;
            if (h == 0) prefetch_bytes(ahead + t * key_bytes, SHARED_KEYS * key_bytes);
            score_tile(form, SHARED, SHARED_KEYS, queries + h * query_bytes, query_bytes, some, width,
                       out + h * line + 4 * t, line);
        }
    for (; h < count; h++)
        for (int64_t t = 0; t < tokens; t += ONE_KEYS) {
            for (int k = 0; k < ONE_KEYS; k++) some[k] = keys + min_i64(t + k, last) * key_bytes;
            if (h == 0) prefetch_bytes(ahead + t * key_bytes, ONE_KEYS * key_bytes);
            score_tile(form, 1, ONE_KEYS, queries + h * query_bytes, query_bytes, some, width,
                       out + h * line + 4 * t, line);
        }
}

/* Scores, or weights, of `count` heads times the scales of `tokens` keys, or values. */
INLINE void multiply_scales(const bf16 *scales, int64_t count, int64_t tokens, char *scores, int64_t line) {
    int64_t t = 0;
    for (; t + LANES <= tokens; t += LANES)
        for (int64_t h = 0; h < count; h++) {
            float *row = (float *)(scores + h * line) + t;
            store_f32(row, load_f32(row) * load_bf16(scales + t));
        }
    for (; t < tokens; t++)
        for (int64_t h = 0; h < count; h++) ((float *)(scores + h * line))[t] *= widen_bf16(scales[t]);
}

/* scores[:tokens] become weights e^(scale * (score - maximum)), and zeros to the next multiple of 16: float32, or
 * bfloat16 in VNNI layout. `scale` times the maximum, and the sum of the weights before they are rounded, go to
 * `peak` and `total`. */
INLINE void softmax_row(int form, float *scores, int64_t tokens, float scale, float *peak, float *total) {
    const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    int64_t whole = tokens / LANES * LANES;
    f32x16 highest = splat_f32(LOWEST), sums = splat_f32(0);
    if (whole < tokens) {
        i32x16 there = lanes < (i32x16)splat_u32((uint32_t)(tokens - whole));
        store_f32(scores + whole, select_f32(there, load_f32(scores + whole), splat_f32(LOWEST)));
    }
    for (int64_t t = 0; t < tokens; t += LANES) highest = max_f32(load_f32(scores + t), highest);
    float most = highest[0];
    for (int i = 1; i < LANES; i++) most = highest[i] > most ? highest[i] : most;
    for (int64_t t = 0; t < tokens; t += LANES) {
        f32x16 weights = exp2_f32((load_f32(scores + t) - splat_f32(most)) * splat_f32(scale * LOG2_E));
        sums += weights;
        if (in_pairs(form))
            store_bf16((bf16 *)scores + t, weights);
        else
            store_f32(scores + t, weights);
    }
    *peak = scale * most;
    *total = sum_f32(sums);
}

/* sums + the weight of a token, or of two in bfloat16, times their values. */
INLINE f32x16 pv_part(int form, f32x16 sums, const char *weights, struct part values) {
    if (in_pairs(form)) {
        uint32_t pair;
        __builtin_memcpy(&pair, weights, sizeof pair);
        return dot_bf16_pairs(sums, splat_u32(pair), values.pairs);
    }
    sums = fma_f32(splat_f32(((const float *)weights)[0]), values.low, sums);
    return form == FORM_BF16 ? fma_f32(splat_f32(((const float *)weights)[1]), values.high, sums) : sums;
}

/* out [num_heads, 16 * num_columns] = weights [num_heads, tokens] . values [tokens, ..] of a value head, from `column`
 * on, in the blocks of `table`. */
INLINE void pv_tile(int form, int num_heads, int num_columns, const struct attention *a, const int64_t *table,
                    int64_t tokens, int64_t value_head, int64_t column, const char *weights, int64_t line,
                    float *out) {
    f32x16 sums[SHARED][ONE_COLUMNS];
    for (int h = 0; h < num_heads; h++)
        for (int c = 0; c < num_columns; c++) sums[h][c] = splat_f32(0);
    int64_t step = form == FORM_BF16 ? 2 : 1, step_bytes = in_pairs(form) ? 4 : 4 * step;
    int64_t row_bytes = step * cached_bytes(form) * a->value_width, part = part_bytes(form);
    for (int64_t done = 0; done < tokens; done += a->block_size) {
        const char *values = values_of(form, a, *table++, value_head) + part * column / LANES;
        int64_t steps = min_i64(a->block_size, tokens - done);
        int odd = form == FORM_BF16 && steps % 2;
        steps /= step;
        for (; steps--; values += row_bytes, weights += step_bytes)
            for (int c = 0; c < num_columns; c++) {
                struct part found = load_part(form, values + part * c);
                for (int h = 0; h < num_heads; h++)
                    sums[h][c] = pv_part(form, sums[h][c], weights + h * line, found);
            }
        if (odd) /* the other half of the last pair is uninitialised and may be NaN: masked to 0 */
            for (int c = 0; c < num_columns; c++) {
                struct part found = split_pairs(load_u32(values + part * c) & splat_u32(0xffff));
                for (int h = 0; h < num_heads; h++)
                    sums[h][c] = pv_part(form, sums[h][c], weights + h * line, found);
            }
    }
    for (int h = 0; h < num_heads; h++)
        for (int c = 0; c < num_columns; c++)
            store_f32(out + h * a->value_width + column + LANES * c, sums[h][c]);
}

/* Of the `count` heads that share a value head: out float32 [count, value_width] = weights . values. */
INLINE void pv_product(int form, const struct attention *a, const int64_t *table, int64_t tokens,
                       int64_t value_head, int64_t count, const char *weights, int64_t line, float *out) {
    int64_t width = a->value_width, shared = count / SHARED * SHARED, column = 0;
    for (; shared && column + SHARED_COLUMNS * LANES <= width; column += SHARED_COLUMNS * LANES)
        for (int64_t h = 0; h < shared; h += SHARED)
            pv_tile(form, SHARED, SHARED_COLUMNS, a, table, tokens, value_head, column, weights + h * line, line,
                    out + h * width);
    for (; shared && column < width; column += LANES)
        for (int64_t h = 0; h < shared; h += SHARED)
            pv_tile(form, SHARED, 1, a, table, tokens, value_head, column, weights + h * line, line,
                    out + h * width);
    for (int64_t h = shared; h < count; h++) {
        for (column = 0; column + ONE_COLUMNS * LANES <= width; column += ONE_COLUMNS * LANES)
            pv_tile(form, 1, ONE_COLUMNS, a, table, tokens, value_head, column, weights + h * line, line,
                    out + h * width);
        for (; column < width; column += LANES)
            pv_tile(form, 1, 1, a, table, tokens, value_head, column, weights + h * line, line,
                    out + h * width);
    }
}

/* ---- the same in tiles: all heads of a group at once ---- */

/* Whether `group` heads that share keys, or values, meet them in tiles. */
INLINE int in_tiles(int form, const struct attention *a, int64_t group) {
    return HAS_TILES && form == FORM_BF16 && group >= SHARED && group <= TILE_ROWS && a->block_size % TILE_KEYS == 0;
}

#if HAS_TILES

static void transpose_queries(const struct attention *a, int64_t key_head, struct scratch s) {
    const char *queries = s.queries + key_head * (a->heads / a->key_heads) * s.query_bytes;
    char *pairs = s.pairs + 2 * TILE_ROWS * a->key_width * key_head;
    for (int64_t i = 0; i < a->key_width / 2; i += LANES)
        transpose_square(queries + 4 * i, s.query_bytes, pairs + 4 * TILE_ROWS * i, 4 * TILE_ROWS);
}

/* As `score_keys`, of a block's keys. */
static void score_keys_in_tiles(const struct attention *a, int64_t key_head, const char *keys, int64_t tokens,
                                char *scores, const char *ahead, struct scratch s) {
    int64_t key_bytes = 2 * a->key_width, group = a->heads / a->key_heads;
    const char *pairs = s.pairs + TILE_ROWS * key_bytes * key_head;
    for (int64_t t = 0; t < tokens; t += TILE_KEYS, keys += TILE_KEYS * key_bytes, ahead += TILE_KEYS * key_bytes) {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
        for (int64_t i = 0; i < a->key_width / 32; i++) {
            prefetch_bytes(ahead + 64 * TILE_KEYS * i, 64 * TILE_KEYS);
            TILE_LOAD(4, pairs + 64 * TILE_ROWS * i, 64);
            TILE_LOAD(5, keys + 64 * i, key_bytes);
            TILE_DPBF16(0, 5, 4);
            TILE_LOAD(6, keys + 64 * i + 16 * key_bytes, key_bytes);
            TILE_DPBF16(1, 6, 4);
            TILE_LOAD(5, keys + 64 * i + 32 * key_bytes, key_bytes);
            TILE_DPBF16(2, 5, 4);
            TILE_LOAD(6, keys + 64 * i + 48 * key_bytes, key_bytes);
            TILE_DPBF16(3, 6, 4);
        }
        TILE_STORE(0, s.found, 64);
        TILE_STORE(1, s.found + 1024, 64);
        TILE_STORE(2, s.found + 2048, 64);
        TILE_STORE(3, s.found + 3072, 64);
        for (int64_t i = 0; i < TILE_KEYS; i += LANES) {
            u32x16 rows[LANES];
            for (int k = 0; k < LANES; k++) rows[k] = load_u32(s.found + 64 * (i + k));
            transpose(rows);
            for (int64_t h = 0; h < group; h++) store_u32(scores + h * s.line + 4 * (t + i), rows[h]);
        }
    }
}

/* The values of the last tokens, fewer than TILE_VALUES, with zeros behind them: memory that was never
 * written need not hold numbers. */
static void copy_last(const char *values, int64_t tokens, int64_t width, char *to) {
    int64_t row = 4 * width, whole = tokens / 2 * row;
    __builtin_memcpy(to, values, (uint64_t)whole);
    __builtin_memset(to + whole, 0, (uint64_t)(TILE_VALUES / 2 * row - whole));
    if (tokens % 2)
        for (int64_t i = 0; i < row; i += 64) store_u32(to + whole + i, load_u32(values + whole + i) & splat_u32(0xffff));
}

/* As `pv_product`. */
static void pv_product_in_tiles(const struct attention *a, const int64_t *table, int64_t tokens, int64_t value_head,
                                char *weights, float *out, struct scratch s) {
    int64_t width = a->value_width, row = 4 * width, group = a->heads / a->value_heads, size = a->block_size;
    int64_t whole = tokens / TILE_VALUES * TILE_VALUES, end = ceil_div(tokens, LANES) * LANES;
    if (whole < tokens)
        copy_last(values_of(FORM_BF16, a, table[whole / size], value_head) + 2 * width * (whole % size),
                  tokens - whole, width, s.last);
    if (end % TILE_VALUES)
        for (int64_t h = 0; h < group; h++) __builtin_memset(weights + h * s.line + 2 * end, 0, 2 * LANES);
    for (int64_t i = 0; i < row; i += 128) {
        TILE_ZERO(0);
        TILE_ZERO(1);
        for (int64_t t = 0; t < tokens; t += TILE_VALUES) {
            const char *values = s.last;
            if (t < whole) values = values_of(FORM_BF16, a, table[t / size], value_head) + 2 * width * (t % size);
            TILE_LOAD(4, weights + 2 * t, s.line);
            TILE_LOAD(5, values + i, row);
            TILE_DPBF16(0, 4, 5);
            TILE_LOAD(6, values + i + 64, row);
            TILE_DPBF16(1, 4, 6);
        }
        TILE_STORE(0, s.mixed + i, row);
        TILE_STORE(1, s.mixed + i + 64, row);
    }
    __builtin_memcpy(out, s.mixed, (uint64_t)(group * row));
}

#else

static inline void transpose_queries(const struct attention *a, int64_t key_head, struct scratch s) {}
static inline void score_keys_in_tiles(const struct attention *a, int64_t key_head, const char *keys, int64_t tokens,
                                       char *scores, const char *ahead, struct scratch s) {}
static inline void pv_product_in_tiles(const struct attention *a, const int64_t *table, int64_t tokens,
                                       int64_t value_head, char *weights, float *out, struct scratch s) {}

#endif

/* The first block of an item, or of the last one if there is no such item. */
INLINE int64_t first_block(const struct attention *a, int64_t item) {
    item = min_i64(item, a->items - 1);
    int64_t row = a->item_rows[item];
    return a->tables[a->table_starts[row] + (item - a->first_items[row]) * a->split_blocks];
}

/* One item; returns the one that this thread takes next. What is read next is fetched a head or a block ahead, since
 * the processor's own guesses end at every page. */
INLINE int64_t attend(int form, const struct attention *a, int64_t item, struct scratch s) {
    int64_t heads = a->heads, size = a->block_size, row = a->item_rows[item], length = a->lengths[row];
    int64_t skipped = (item - a->first_items[row]) * a->split_blocks;
    int64_t tokens = min_i64(length - skipped * size, a->split_blocks * size), blocks = ceil_div(tokens, size);
    const int64_t *table = a->tables + a->table_starts[row] + skipped;
    if (skipped * size + tokens == length)
        write_token(form, a, row, a->positions[row], table[blocks - 1], (length - 1) % size);
    for (int64_t h = 0; h < heads; h++)
        store_query(form, query_of(rows_bf16(form), a, row, h), a->key_width, rope_of(a, a->positions[row]),
                    s.queries + h * s.query_bytes);

    int64_t group = heads / a->key_heads;
    int tiles = in_tiles(form, a, group);
    for (int64_t k = 0; tiles && k < a->key_heads; k++) transpose_queries(a, k, s);
    for (int64_t b = 0; b < blocks; b++) {
        if (is_int8(form)) prefetch_bytes(value_scales_of(a, table[b], 0), 2 * a->value_heads * size);
        for (int64_t k = 0; k < a->key_heads; k++) {
            const char *ahead = k + 1 < a->key_heads ? keys_of(form, a, table[b], k + 1)
                                : b + 1 < blocks     ? keys_of(form, a, table[b + 1], 0)
                                                     : values_of(form, a, table[0], 0);
            char *scores = s.scores + k * group * s.line + 4 * b * size;
            int64_t count = min_i64(size, tokens - b * size);
            if (tiles) {
                score_keys_in_tiles(a, k, keys_of(form, a, table[b], k), count, scores, ahead, s);
                continue;
            }
            if (is_int8(form)) prefetch_bytes(key_scales_of(a, table[b], k), 2 * count);
            score_keys(form, s.queries + k * group * s.query_bytes, s.query_bytes, group,
                       keys_of(form, a, table[b], k), count, a->key_width, scores, s.line, ahead);
            if (is_int8(form)) multiply_scales(key_scales_of(a, table[b], k), group, count, scores, s.line);
        }
    }
    float *peaks = a->stats + 2 * heads * item, *totals = peaks + heads;
    for (int64_t h = 0; h < heads; h++)
        softmax_row(form, (float *)(s.scores + h * s.line), tokens, (float)a->scale, &peaks[h], &totals[h]);

    int64_t next = fetch_add(a->counters);
    group = heads / a->value_heads;
    const char *ahead = keys_of(form, a, first_block(a, next), 0);
    int64_t head_bytes = cached_bytes(form) * a->block_size * a->key_width;
    for (int64_t k = 0; k < a->value_heads; k++) {
        if (k == 0) prefetch_bytes(ahead, head_bytes);
        if (is_int8(form))
            for (int64_t b = 0; b < blocks; b++)
                multiply_scales(value_scales_of(a, table[b], k), group, min_i64(size, tokens - b * size),
                                s.scores + k * group * s.line + 4 * b * size, s.line);
        char *weights = s.scores + k * group * s.line;
        float *out = a->partial + (item * heads + k * group) * a->value_width;
        if (in_tiles(form, a, group))
            pv_product_in_tiles(a, table, tokens, k, weights, out, s);
        else
            pv_product(form, a, table, tokens, k, group, weights, s.line, out);
    }
    return next;
}

/* The items of a row, all finished, become its output. */
INLINE void merge(int form, const struct attention *a, int64_t row) {
    int64_t first = a->first_items[row], end = a->first_items[row + 1], heads = a->heads, width = a->value_width;
    for (int64_t h = 0; h < heads; h++) {
        float peak = LOWEST, total = 0;
        for (int64_t i = first; i < end; i++) {
            float found = a->stats[2 * heads * i + h];
            peak = found > peak ? found : peak;
        }
        for (int64_t i = first; i < end; i++) {
            float *found = &a->stats[2 * heads * i + h];
            *found = exp2_f32(splat_f32((*found - peak) * LOG2_E))[0];
            total += *found * found[heads];
        }
        for (int64_t column = 0; column < width; column += LANES) {
            f32x16 sums = splat_f32(0);
            for (int64_t i = first; i < end; i++) {
                f32x16 share = splat_f32(a->stats[2 * heads * i + h] / total);
                sums = fma_f32(share, load_f32(a->partial + (i * heads + h) * width + column), sums);
            }
            store_as(rows_bf16(form), a->out, row * a->out_stride + h * width + column, sums);
        }
    }
}

INLINE void work(int form, const struct attention *a, struct scratch s) {
    int64_t item = fetch_add(a->counters);
    while (item < a->items) {
        int64_t row = a->item_rows[item];
        item = attend(form, a, item, s);
        if (fetch_add(&a->counters[1 + row]) + 1 == a->first_items[row + 1] - a->first_items[row]) {
            merge(form, a, row);
            fetch_add(&a->counters[1 + a->rows]);
        }
    }
}

void attention_decode(const struct attention *a, void *scratch) {
    FOR_FORM(a, work(FORM, a, scratch_at(a, scratch)));
}
