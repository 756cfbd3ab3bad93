/* Prompt attention: new tokens of some texts, whose earlier tokens are in the paged cache (chunked prefill).
 *
 * A work item is ITEM_TILES tiles of QUERIES queries of one head. Online softmax as in
 * FlashAttention-2, over KV tiles of TOKENS that begin at multiples of TOKENS in the text. S = K Q^T is transposed, a
 * query in each column, so that row statistics are vector lanes. Lazy rescaling: the running maximum is raised only
 * when a score exceeds it by more than MARGIN (as in FlashAttention-4). Masked scores have weight 0. A query's result
 * depends on neither the chunks of its prompt nor the rest of the batch, to the bit.
 *
 * Keys are read where they lie in the cache, and so are values, except with tiles (AMX): there PACK_VALUES copies them
 * once for all heads, transposed, and outputs are transposed like the scores. An int8 cache is dequantised first, a KV
 * tile at a time, into the thread's scratch, where 32 queries meet it: in bfloat16, arranged as such a cache, where
 * products are of bfloat16, else in float32.
 */
#include "attention.h"
#include "tiles.h"

enum {
    QUERIES = 32,
    TOKENS = 128,   /* whose scores stay in the first-level cache */
    ITEM_TILES = 2, /* tiles of queries in a work item */
    PACKED = 32,    /* tokens in a tile of packed values */
    SPAN_FIELDS = 6,
    SPARE = 8, /* rows after the last one that register tiles may write and that are never read */
    ROW = 4 * QUERIES,
};

/* Register tiles: scores of KEYS keys and KEY_VECTORS * 16 queries; outputs of at most MOST_ROWS queries and
 * VALUE_VECTORS * 16 columns. */
#if WIDE_TILES
enum { KEYS = 8, KEY_VECTORS = 2, MOST_ROWS = 8, VALUE_VECTORS = 2 };
#else
enum { KEYS = 6, KEY_VECTORS = 1, MOST_ROWS = 6, VALUE_VECTORS = 1 };
#endif

static const float MARGIN = 8;     /* powers of two by which a weight may exceed 1 */
static const float FIRST = -1e30f; /* a maximum below all scores, and finite */

/* Whether products are in tiles of bfloat16. */
INLINE int in_tiles(const struct attention *a) {
    return HAS_TILES && a->dtype == BFLOAT16 && a->block_size % PACKED == 0;
}

/* What keys and values are multiplied as: those of int8 are dequantised to it. */
INLINE int operands_bf16(int form) { return is_int8(form) ? uses_vnni(rows_bf16(form)) : rows_bf16(form); }

/* Numbers of 4 bytes in a query: float32, or pairs of bfloat16. */
INLINE int64_t query_units(int is_bf16, const struct attention *a) {
    return uses_vnni(is_bf16) ? a->key_width / 2 : a->key_width;
}

/* One thread's scratch. */
struct scratch {
    char *queries; /* [query_units, QUERIES] */
    char *scores;  /* float32 [TOKENS, QUERIES]; then weights, bfloat16 VNNI [TOKENS / 2, QUERIES, 2] or float32 */
    char *tile;    /* of an int8 cache: keys of TOKENS tokens, dequantised, then their values */
    float *out;    /* [QUERIES, value_width], transposed with tiles; before, queries as they lie */
    float *peaks;  /* [QUERIES]: maxima */
    float *sums;   /* [QUERIES]: of weights */
    float *factors; /* [QUERIES]: of rescaling */
};

INLINE int64_t queries_bytes(const struct attention *a) { return ROW * a->key_width; }

static const int64_t SCORES_BYTES = ROW * (TOKENS + SPARE);

INLINE int64_t out_bytes(const struct attention *a) {
    return 4 * (QUERIES + SPARE) * max_i64(a->key_width, a->value_width);
}

INLINE int64_t tile_bytes(const struct attention *a) {
    int form = form_of(a);
    if (!is_int8(form)) return 0;
    return number_bytes(operands_bf16(form)) * TOKENS * max_i64(a->key_width, a->value_width);
}

int64_t attention_prompt_scratch(const struct attention *a) {
    return queries_bytes(a) + SCORES_BYTES + tile_bytes(a) + out_bytes(a) + 3 * ROW;
}

INLINE struct scratch scratch_at(const struct attention *a, char *memory) {
    char *scores = memory + queries_bytes(a), *tile = scores + SCORES_BYTES, *out = tile + tile_bytes(a);
    float *rest = (float *)(out + out_bytes(a));
    return (struct scratch){memory, scores, tile, (float *)out, rest, rest + QUERIES, rest + 2 * QUERIES};
}

int64_t attention_prompt_items(const struct attention *a) { return a->num_query_tiles * a->heads; }

/* ---- the cache ---- */

INLINE void write_row(int form, const struct attention *a, int64_t i) {
    int64_t slot = a->prompt_slots[i];
    write_token(form, a, a->rows + i, a->prompt_positions[i], slot / a->block_size, slot % a->block_size);
}

void cache_write_row(const struct attention *a, int64_t row) {
    FOR_FORM(a, write_row(FORM, a, row));
}

/* 16 numbers of an int8 cache. */
INLINE f32x16 dequantized(const char *codes, bf16 scale) {
    return load_i8((const int8_t *)codes) * splat_f32(widen_bf16(scale));
}

/* A text's tokens begin to begin + count: their keys of a head, from an int8 cache into the tile. */
INLINE void dequantize_keys(int is_bf16, const struct attention *a, const int64_t *table, int64_t head, int64_t begin,
                            int64_t count, char *tile) {
    int64_t size = a->block_size, width = a->key_width;
    for (int64_t t = 0; t < count; t++) {
        int64_t block = table[(begin + t) / size], offset = (begin + t) % size;
        const char *codes = keys_of(FORM_F32_INT8, a, block, head) + offset * width;
        bf16 scale = key_scales_of(a, block, head)[offset];
        for (int64_t d = 0; d < width; d += LANES) store_as(is_bf16, tile, t * width + d, dequantized(codes + d, scale));
    }
}

/* The same of values: in bfloat16 in VNNI layout, with zeros beside the last one if it is alone. */
INLINE void dequantize_values(int is_bf16, const struct attention *a, const int64_t *table, int64_t head,
                              int64_t begin, int64_t count, char *tile) {
    int64_t size = a->block_size, width = a->value_width;
    for (int64_t t = 0; t < count; t += is_bf16 ? 2 : 1, tile += 4 * width) {
        int64_t block = table[(begin + t) / size], offset = (begin + t) % size;
        const char *codes = values_of(FORM_F32_INT8, a, block, head) + offset * width;
        const bf16 *scales = value_scales_of(a, block, head) + offset;
        for (int64_t d = 0; d < width; d += LANES) {
            f32x16 value = dequantized(codes + d, scales[0]), next = splat_f32(0);
            if (is_bf16 && t + 1 < count) next = dequantized(codes + width + d, scales[1]);
            store_u32(tile + 4 * d, is_bf16 ? pair_bf16(value, next) : (u32x16)value);
        }
    }
}

/* Codes of 32 tokens [32, 16], rows `width` bytes apart, become bfloat16 columns of `to`. */
static void transpose_codes(const char *codes, int64_t width, const bf16 *scales, char *to, int64_t to_bytes) {
    u32x16 rows[LANES];
    for (int i = 0; i < LANES; i++, codes += 2 * width, scales += 2)
        rows[i] = pair_bf16(dequantized(codes, scales[0]), dequantized(codes + width, scales[1]));
    transpose(rows);
    for (int i = 0; i < LANES; i++) store_u32(to + i * to_bytes, rows[i]);
}

/* A block's values as rows of 32 tokens: packed_values is [value_heads * value_width / 16, packed_value_tiles, 16,
 * PACKED], with zeros behind a text's last token. */
INLINE void pack_block(int form, const struct attention *a, int64_t block) {
    const int64_t *span = a->spans + SPAN_FIELDS * a->block_spans[block];
    int64_t place = block - span[5], start = place * a->block_size, width = a->value_width;
    int64_t count = min_i64(a->block_size, span[1] + span[2] - start), column = span[4] + start;
    for (int64_t h = 0; h < a->value_heads; h++) {
        const char *values = values_of(form, a, a->prompt_tables[span[3] + place], h);
        const bf16 *scales = is_int8(form) ? value_scales_of(a, a->prompt_tables[span[3] + place], h) : 0;
        for (int64_t t = 0; t < count; t += PACKED)
            for (int64_t d = 0; d < width; d += LANES) {
                int64_t panel = (h * width + d) / LANES;
                bf16 *to = (bf16 *)a->packed_values +
                           LANES * PACKED * (panel * a->packed_value_tiles + (column + t) / PACKED);
                if (is_int8(form))
                    transpose_codes(values + t * width + d, width, scales + t, (char *)to, 2 * PACKED);
                else
                    transpose_square(values + 2 * t * width + 4 * d, 4 * width, (char *)to, 2 * PACKED);
                for (int64_t i = count - t; i < PACKED; i++)
                    for (int64_t r = 0; r < LANES; r++) to[r * PACKED + i] = 0;
            }
    }
}

void pack_values_block(const struct attention *a, int64_t block) {
    if (!in_tiles(a)) return;
    if (a->cache_dtype == INT8)
        pack_block(FORM_BF16_INT8, a, block);
    else
        pack_block(FORM_BF16, a, block);
}

/* ---- scores and weights, a query in each column ---- */

/* `count` queries of a head, rotated where positions are rotary, and zeros in the other columns. */
INLINE void take_queries(int is_bf16, const struct attention *a, int64_t first, int64_t count, int64_t head,
                         struct scratch s) {
    int64_t units = query_units(is_bf16, a);
    char *rows = (char *)s.out;
    for (int64_t i = 0; i < count; i++) {
        const char *query = query_of(is_bf16, a, a->rows + first + i, head);
        const float *rope = rope_of(a, a->prompt_positions[first + i]);
        for (int64_t d = 0; d < a->key_width; d += LANES)
            store_as(uses_vnni(is_bf16), rows + 4 * units * i, d, load_rotated(is_bf16, query, rope, d));
    }
    __builtin_memset(rows + 4 * units * count, 0, (uint64_t)(4 * units * (QUERIES - count)));
    for (int64_t i = 0; i < QUERIES; i += LANES)
        for (int64_t d = 0; d < units; d += LANES)
            transpose_square(rows + 4 * (i * units + d), 4 * units, s.queries + ROW * d + 4 * i, ROW);
}

/* What is loaded before it is loaded again after it, instead of being kept in registers that are short. */
#define RELOAD __asm__ volatile("" ::: "memory")

/* scores [num_keys, 16 * num_vectors] = keys . queries, both at their first of these columns. */
INLINE void score_tile(int is_bf16, int num_keys, int num_vectors, const char *const *keys, int64_t units,
                       const char *queries, char *scores) {
    f32x16 sums[KEYS][KEY_VECTORS];
    for (int k = 0; k < num_keys; k++)
        for (int v = 0; v < num_vectors; v++) sums[k][v] = splat_f32(0);
    int pairs = uses_vnni(is_bf16);
    int64_t steps = is_bf16 && !pairs ? units / 2 : units;
    for (int64_t i = 0; i < steps; i++, queries += is_bf16 && !pairs ? 2 * ROW : ROW) {
        if (pairs) {
            for (int v = 0; v < num_vectors; v++) {
                u32x16 query = load_u32(queries + 64 * v);
                for (int k = 0; k < num_keys; k++)
                    sums[k][v] = dot_bf16_pairs(sums[k][v], splat_u32(((const uint32_t *)keys[k])[i]), query);
            }
            continue;
        }
        for (int v = 0; v < num_vectors; v++) {
            f32x16 query = load_f32((const float *)(queries + 64 * v));
            for (int k = 0; k < num_keys; k++) {
                f32x16 key = is_bf16 ? low_bf16(splat_u32(((const uint32_t *)keys[k])[i]))
                                     : splat_f32(((const float *)keys[k])[i]);
                sums[k][v] = fma_f32(key, query, sums[k][v]);
            }
        }
        if (!is_bf16) continue;
        RELOAD;
        for (int v = 0; v < num_vectors; v++) {
            f32x16 query = load_f32((const float *)(queries + ROW + 64 * v));
            for (int k = 0; k < num_keys; k++)
                sums[k][v] = fma_f32(high_bf16(splat_u32(((const uint32_t *)keys[k])[i])), query, sums[k][v]);
        }
    }
    for (int k = 0; k < num_keys; k++)
        for (int v = 0; v < num_vectors; v++) store_f32((float *)(scores + ROW * k + 64 * v), sums[k][v]);
}

/* A text's tokens begin to begin + count: their keys of a head times the queries. */
INLINE void score(int form, const struct attention *a, const int64_t *table, int64_t key_head, int64_t begin,
                  int64_t count, int vectors, struct scratch s) {
    int is_bf16 = operands_bf16(form);
    int64_t key_bytes = number_bytes(is_bf16) * a->key_width, units = query_units(is_bf16, a);
    for (int64_t t = 0; t < count; t += KEYS) {
        const char *keys[KEYS];
        for (int k = 0; k < KEYS; k++) {
            int64_t i = min_i64(t + k, count - 1), at = begin + i;
            keys[k] = is_int8(form) ? s.tile + i * key_bytes
                                    : keys_of(form, a, table[at / a->block_size], key_head) +
                                          at % a->block_size * key_bytes;
        }
        for (int v = 0; v < vectors; v += KEY_VECTORS)
            score_tile(is_bf16, KEYS, KEY_VECTORS, keys, units, s.queries + 64 * v, s.scores + ROW * t + 64 * v);
    }
}

/* Causal mask: tokens after each query's own; the first query's is number `own` of `count`. */
INLINE void mask_later(int64_t own, int64_t count, int vectors, char *scores) {
    const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int64_t t = max_i64(own + 1, 0); t < count; t++)
        for (int v = 0; v < vectors; v++) {
            float *row = (float *)(scores + ROW * t) + LANES * v;
            i32x16 masked = lanes < (i32x16)splat_u32((uint32_t)(t - own - LANES * v));
            store_f32(row, select_f32(masked, splat_f32(LOWEST), load_f32(row)));
        }
}

/* Masks the tokens of other branches. */
INLINE void mask_branches(const struct attention *a, int64_t first, int64_t queries, int64_t begin, int64_t count,
                          char *scores) {
    for (int64_t q = 0; q < queries; q++) {
        int64_t end = min_i64(a->own_starts[first + q] - begin, count);
        for (int64_t t = max_i64(a->shared_ends[first + q] - begin, 0); t < end; t++)
            ((float *)(scores + ROW * t))[q] = LOWEST;
    }
}

/* Scores of 16 queries become weights 2^(power * (score - peak)), and zeros behind `count` to a multiple of `whole`.
 * Returns whether a peak had to be raised: sums under the old one have to be multiplied by the factors. */
INLINE int softmax_columns(int is_bf16, int64_t count, int64_t whole, float power, int v, struct scratch s) {
    float *peaks = s.peaks + LANES * v, *sums = s.sums + LANES * v;
    char *scores = s.scores + 64 * v;
    f32x16 even = splat_f32(LOWEST), odd = even;
    int64_t end = ceil_div(count, whole) * whole;
    for (int64_t t = count; t < end; t++) store_f32((float *)(scores + ROW * t), splat_f32(LOWEST));
    for (int64_t t = 0; t < count; t += 2) {
        even = max_f32(load_f32((const float *)(scores + ROW * t)), even);
        if (t + 1 < count) odd = max_f32(load_f32((const float *)(scores + ROW * (t + 1))), odd);
    }
    f32x16 old = load_f32(peaks), highest = max_f32(even, odd);
    i32x16 higher = highest > old + splat_f32(MARGIN / power);
    f32x16 peak = select_f32(higher, highest, old);
    f32x16 factor = select_f32(higher, exp2_f32((old - highest) * splat_f32(power)), splat_f32(1));
    store_f32(peaks, peak);
    store_f32(s.factors + LANES * v, factor);
    even = odd = splat_f32(0);
    for (int64_t t = 0; t < end; t += whole == 1 ? 1 : 2) {
        float *row = (float *)(scores + ROW * t), *next = row + QUERIES;
        f32x16 x = exp2_f32((load_f32(row) - peak) * splat_f32(power)), y = splat_f32(0);
        if (whole != 1) y = exp2_f32((load_f32(next) - peak) * splat_f32(power));
        even += x;
        odd += y;
        if (uses_vnni(is_bf16)) {
            store_u32(scores + ROW * (t / 2), pair_bf16(x, y));
        } else {
            store_f32(row, x);
            if (whole != 1) store_f32(next, y);
        }
    }
    store_f32(sums, fma_f32(load_f32(sums), factor, even + odd));
    int raised = 0;
    for (int i = 0; i < LANES; i++) raised |= higher[i];
    return raised;
}

/* ---- outputs ---- */

/* sums + factors [num_rows] times `value`. */
INLINE void add_products(int num_rows, const char *factors, f32x16 value, f32x16 (*sums)[VALUE_VECTORS], int v) {
    for (int r = 0; r < num_rows; r++) sums[r][v] = fma_f32(splat_f32(((const float *)factors)[r]), value, sums[r][v]);
}

/* out [num_rows, 16 * num_vectors], rows 4 * value_width bytes apart, += weights . values of `count` tokens of a
 * block. */
INLINE void pv_tile(int is_bf16, int num_rows, int num_vectors, const char *weights, const char *values, int64_t count,
                    int64_t width, float *out) {
    f32x16 sums[MOST_ROWS][VALUE_VECTORS];
    for (int r = 0; r < num_rows; r++)
        for (int v = 0; v < num_vectors; v++) sums[r][v] = load_f32(out + r * width + LANES * v);
    int64_t steps = is_bf16 ? ceil_div(count, 2) : count;
    for (int64_t i = 0; i < steps; i++, values += 4 * width) {
        if (!is_bf16) {
            for (int v = 0; v < num_vectors; v++)
                add_products(num_rows, weights, load_f32((const float *)(values + 64 * v)), sums, v);
            weights += ROW;
            continue;
        }
        u32x16 there = splat_u32(2 * i + 1 < count ? ~0u : 0xffff); /* the other half need not be a number */
        if (uses_vnni(is_bf16)) {
            u32x16 pairs[VALUE_VECTORS];
            for (int v = 0; v < num_vectors; v++) pairs[v] = load_u32(values + 64 * v) & there;
            for (int r = 0; r < num_rows; r++)
                for (int v = 0; v < num_vectors; v++)
                    sums[r][v] = dot_bf16_pairs(sums[r][v], splat_u32(((const uint32_t *)weights)[r]), pairs[v]);
            weights += ROW;
            continue;
        }
        for (int v = 0; v < num_vectors; v++)
            add_products(num_rows, weights, low_bf16(load_u32(values + 64 * v)), sums, v);
        RELOAD;
        weights += ROW;
        for (int v = 0; v < num_vectors; v++)
            add_products(num_rows, weights, high_bf16(load_u32(values + 64 * v) & there), sums, v);
        weights += ROW;
    }
    for (int r = 0; r < num_rows; r++)
        for (int v = 0; v < num_vectors; v++) store_f32(out + r * width + LANES * v, sums[r][v]);
}

/* The same for all queries. */
INLINE void pv_rows(int is_bf16, int64_t queries, int num_vectors, const char *weights, const char *values,
                    int64_t count, int64_t width, float *out) {
    for (int64_t q = 0; q < queries;) {
        int64_t left = queries - q;
        int many = MOST_ROWS == 8 ? left > 4 : left > 8 || left == 5 || left == 6;
        if (many)
            pv_tile(is_bf16, MOST_ROWS, num_vectors, weights + 4 * q, values, count, width, out + q * width);
        else
            pv_tile(is_bf16, 4, num_vectors, weights + 4 * q, values, count, width, out + q * width);
        q += many ? MOST_ROWS : 4;
    }
}

/* out += weights . values of the tokens begin to begin + count of a text, in the blocks of its table. */
INLINE void pv_product(int form, const struct attention *a, const int64_t *table, int64_t value_head, int64_t begin,
                       int64_t count, int64_t queries, struct scratch s) {
    int is_bf16 = operands_bf16(form);
    int64_t size = a->block_size, width = a->value_width, step_bytes = uses_vnni(is_bf16) ? ROW / 2 : ROW;
    for (int64_t column = 0; column < width; column += VALUE_VECTORS * LANES)
        for (int64_t t = 0; t < count;) {
            int64_t offset = (begin + t) % size, some = min_i64(size - offset, count - t);
            const char *values = s.tile;
            if (is_int8(form))
                some = count;
            else
                values = values_of(form, a, table[(begin + t) / size], value_head) +
                         number_bytes(is_bf16) * offset * width;
            const char *weights = s.scores + t * step_bytes;
            values += 4 * column;
            if (column + VALUE_VECTORS * LANES <= width)
                pv_rows(is_bf16, queries, VALUE_VECTORS, weights, values, some, width, s.out + column);
            else
                pv_rows(is_bf16, queries, 1, weights, values, some, width, s.out + column);
            t += some;
        }
}

/* ---- the same in tiles: outputs lie transposed, [value_width, QUERIES] ---- */

#if HAS_TILES

/* out float32 [32, QUERIES] = 32 rows of 32 * parts numbers times pairs [16 * parts, QUERIES]; added to what is there
 * if `add`. Rows lie `stride` bytes apart, 16 of them `panel`, and 32 numbers of a row `step`. */
static void multiply_tiles(const char *rows, int64_t stride, int64_t step, int64_t panel, int64_t parts, int add,
                           const char *columns, char *out) {
    if (add) {
        TILE_LOAD(0, out, ROW);
        TILE_LOAD(1, out + 64, ROW);
        TILE_LOAD(2, out + 16 * ROW, ROW);
        TILE_LOAD(3, out + 16 * ROW + 64, ROW);
    } else {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
    }
    for (int64_t i = 0; i < parts; i++, rows += step, columns += 16 * ROW) {
        TILE_LOAD(4, columns, ROW);
        TILE_STREAM(6, rows, stride);
        TILE_DPBF16(0, 6, 4);
        TILE_LOAD(5, columns + 64, ROW);
        TILE_DPBF16(1, 6, 5);
        TILE_STREAM(7, rows + panel, stride);
        TILE_DPBF16(2, 7, 4);
        TILE_DPBF16(3, 7, 5);
    }
    TILE_STORE(0, out, ROW);
    TILE_STORE(1, out + 64, ROW);
    TILE_STORE(2, out + 16 * ROW, ROW);
    TILE_STORE(3, out + 16 * ROW + 64, ROW);
}

/* As `score`, 32 keys at a time: some behind the last one, too. */
static void score_in_tiles(const struct attention *a, const int64_t *table, int64_t key_head, int64_t begin,
                           int64_t count, struct scratch s) {
    int64_t key_bytes = 2 * a->key_width;
    for (int64_t t = 0; t < count; t += PACKED) {
        const char *keys = s.tile + t * key_bytes;
        if (a->cache_dtype != INT8)
            keys = keys_of(FORM_BF16, a, table[(begin + t) / a->block_size], key_head) +
                   (begin + t) % a->block_size * key_bytes;
        multiply_tiles(keys, key_bytes, 64, 16 * key_bytes, a->key_width / 32, 0, s.queries, s.scores + ROW * t);
    }
}

/* As `pv_product`, of packed values. */
static void pv_product_in_tiles(const struct attention *a, const int64_t *span, int64_t value_head, int64_t begin,
                                int64_t count, struct scratch s) {
    int64_t width = a->value_width, panel = 2 * LANES * PACKED * a->packed_value_tiles;
    const char *values = (const char *)a->packed_values + value_head * width / LANES * panel +
                         2 * LANES * (span[4] + begin);
    for (int64_t d = 0; d < width; d += 32)
        multiply_tiles(values + d / LANES * panel, 2 * PACKED, 2 * LANES * PACKED, panel, ceil_div(count, PACKED),
                       begin > 0, s.scores, (char *)s.out + ROW * d);
}

static void rescale_columns(int64_t width, struct scratch s) {
    for (int64_t d = 0; d < width; d++)
        for (int v = 0; v < 2; v++) {
            float *out = s.out + QUERIES * d + LANES * v;
            store_f32(out, load_f32(out) * load_f32(s.factors + LANES * v));
        }
}

static void write_columns(const struct attention *a, int64_t row, int64_t queries, int64_t head, struct scratch s) {
    for (int64_t q = 0; q < queries; q += LANES) {
        f32x16 shares = splat_f32(1) / load_f32(s.sums + q);
        for (int64_t d = 0; d < a->value_width; d += LANES) {
            u32x16 rows[LANES];
            for (int i = 0; i < LANES; i++) rows[i] = (u32x16)(load_f32(s.out + QUERIES * (d + i) + q) * shares);
            transpose(rows);
            for (int i = 0; i < min_i64(LANES, queries - q); i++)
                store_as(1, a->out, (a->rows + row + q + i) * a->out_stride + head * a->value_width + d, (f32x16)rows[i]);
        }
    }
}

#else

static void score_in_tiles(const struct attention *a, const int64_t *table, int64_t key_head, int64_t begin,
                           int64_t count, struct scratch s) {}
static void pv_product_in_tiles(const struct attention *a, const int64_t *span, int64_t value_head, int64_t begin,
                                int64_t count, struct scratch s) {}
static void rescale_columns(int64_t width, struct scratch s) {}
static void write_columns(const struct attention *a, int64_t row, int64_t queries, int64_t head, struct scratch s) {}

#endif

INLINE void rescale_rows(int64_t queries, int64_t width, struct scratch s) {
    for (int64_t q = 0; q < queries; q++)
        for (int64_t d = 0; d < width; d += LANES) {
            float *out = s.out + q * width + d;
            store_f32(out, load_f32(out) * splat_f32(s.factors[q]));
        }
}

INLINE void write_rows(int is_bf16, const struct attention *a, int64_t row, int64_t queries, int64_t head,
                       struct scratch s) {
    for (int64_t q = 0; q < queries; q++) {
        f32x16 share = splat_f32(1 / s.sums[q]);
        for (int64_t d = 0; d < a->value_width; d += LANES)
            store_as(is_bf16, a->out, (a->rows + row + q) * a->out_stride + head * a->value_width + d,
                     load_f32(s.out + q * a->value_width + d) * share);
    }
}

/* Up to QUERIES queries of a head, from row `first` of a text's new ones on. */
INLINE void attend_tile(int form, const struct attention *a, const int64_t *span, int64_t head, int64_t first,
                        struct scratch s) {
    int is_bf16 = operands_bf16(form);
    int64_t context = span[1], queries = min_i64(QUERIES, span[2] - first), width = a->value_width;
    int64_t row = span[0] + first, end = context + first + queries;
    const int64_t *table = a->prompt_tables + span[3];
    int64_t key_head = head / (a->heads / a->key_heads), value_head = head / (a->heads / a->value_heads);
    int tiles = is_bf16 && in_tiles(a), vectors = queries > LANES || KEY_VECTORS == 2 || tiles ? 2 : 1;
    int64_t whole = tiles ? PACKED : is_bf16 ? 2 : 1;
    float power = (float)a->scale * LOG2_E;
    take_queries(rows_bf16(form), a, row, queries, head, s);
    if (!tiles) __builtin_memset(s.out, 0, (uint64_t)out_bytes(a));
    for (int i = 0; i < QUERIES; i++) s.peaks[i] = FIRST, s.sums[i] = 0;
    for (int64_t begin = 0; begin < end; begin += TOKENS) {
        int64_t count = min_i64(TOKENS, end - begin);
        if (is_int8(form)) dequantize_keys(is_bf16, a, table, key_head, begin, count, s.tile);
        if (tiles)
            score_in_tiles(a, table, key_head, begin, count, s);
        else
            score(form, a, table, key_head, begin, count, vectors, s);
        mask_later(context + first - begin, count, vectors, s.scores);
        if (a->shared_ends) mask_branches(a, row, queries, begin, count, s.scores);
        int raised = 0;
        for (int v = 0; v < vectors; v++) raised |= softmax_columns(is_bf16, count, whole, power, v, s);
        if (raised && begin) {
            if (tiles)
                rescale_columns(width, s);
            else
                rescale_rows(queries, width, s);
        }
        if (is_int8(form) && !tiles) dequantize_values(is_bf16, a, table, value_head, begin, count, s.tile);
        if (tiles)
            pv_product_in_tiles(a, span, value_head, begin, count, s);
        else
            pv_product(form, a, table, value_head, begin, count, queries, s);
    }
    if (tiles)
        write_columns(a, row, queries, head, s);
    else
        write_rows(rows_bf16(form), a, row, queries, head, s);
}

INLINE void attend(int form, const struct attention *a, int64_t item, struct scratch s) {
    const int64_t *place = a->query_tiles + 2 * (item / a->heads), *span = a->spans + SPAN_FIELDS * place[0];
    int64_t first = place[1] * QUERIES, end = min_i64(first + ITEM_TILES * QUERIES, span[2]);
    for (; first < end; first += QUERIES) attend_tile(form, a, span, item % a->heads, first, s);
}

void attention_prompt_item(const struct attention *a, int64_t item, void *scratch) {
    FOR_FORM(a, attend(FORM, a, item, scratch_at(a, scratch)));
}
