/* Decode attention: single queries over a paged cache of keys and values, full or latent.
 *
 * Split-KV with online softmax: a work item is `split_blocks` blocks of one row's tokens, so that the splits follow
 * from the row's length alone and a row's bits do not depend on the batch. An item writes maximum, sum and unnormalised
 * output of each head; the thread that ends a row's last item merges them in the order of the tokens. The item that
 * holds the row's own token writes it into the cache first.
 */
#include "attention.h"

/* Register tiles: scores of one head and ONE_KEYS keys, or of SHARED heads and SHARED_KEYS keys that they share;
 * outputs of one head and ONE_COLUMNS vectors of columns, or of SHARED heads and SHARED_COLUMNS. */
#if WIDE_TILES
enum { ONE_KEYS = 8, SHARED_KEYS = 4, SHARED_COLUMNS = 4 };
#else
enum { ONE_KEYS = 4, SHARED_KEYS = 1, SHARED_COLUMNS = 1 };
#endif
enum { SHARED = 4, ONE_COLUMNS = 4 };

/* One thread's scratch. */
struct scratch {
    char *queries;        /* [heads], each query_bytes long */
    char *scores;         /* float32 [heads, tokens of a split and some], rows line bytes apart: they become weights */
    int64_t query_bytes;
    int64_t line;
};

INLINE int64_t whole_lines(int64_t bytes) { return ceil_div(bytes, CACHE_LINE) * CACHE_LINE; }

INLINE int64_t queries_bytes(const struct attention *a) { return whole_lines(4 * a->heads * a->key_width); }

INLINE int64_t line_bytes(const struct attention *a) {
    return whole_lines(4 * (a->split_blocks * a->block_size + LANES));
}

int64_t attention_decode_scratch(const struct attention *a) { return queries_bytes(a) + a->heads * line_bytes(a); }

INLINE struct scratch scratch_at(const struct attention *a, char *memory) {
    return (struct scratch){memory, memory + queries_bytes(a), 4 * a->key_width, line_bytes(a)};
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
    f32x16 sums[SHARED][8];
    for (int h = 0; h < SHARED; h++)
        for (int k = 0; k < 8; k++) sums[h][k] = splat_f32(0);
    int64_t parts = width / part_numbers(form);
    for (int64_t i = 0; i < parts; i++)
        for (int k = 0; k < num_keys; k++) {
            struct part key = load_part(form, keys[k] + part_bytes(form) * i);
            for (int h = 0; h < num_heads; h++) {
                const char *query = queries + h * query_bytes + i * query_part_bytes(form);
                sums[h][k] = multiply_part(form, sums[h][k], query, key);
            }
        }
    if (num_keys == 1) {
        f32x4 found = sums_of_four(sums[0][0], sums[1][0], sums[2][0], sums[3][0]);
        for (int h = 0; h < num_heads; h++) *(float *)(out + h * line) = found[h];
    } else {
        for (int h = 0; h < num_heads; h++)
            for (int k = 0; k < num_keys; k += 4) {
                f32x4 found = sums_of_four(sums[h][k], sums[h][k + 1], sums[h][k + 2], sums[h][k + 3]);
                __builtin_memcpy(out + h * line + 4 * k, &found, sizeof found);
            }
    }
}

/* Queries of `count` heads times `tokens` keys that they share -> out float32 [count, tokens]; some numbers behind a
 * row's last one are written, too. As many keys at `ahead` are fetched. */
INLINE void score_keys(int form, const char *queries, int64_t query_bytes, int64_t count, const char *keys,
                       int64_t tokens, int64_t width, char *out, int64_t line, const char *ahead) {
    int64_t key_bytes = width * cached_bytes(form), last = tokens - 1;
    const char *some[8];
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
    for (int64_t b = 0; b < blocks; b++) {
        if (is_int8(form)) prefetch_bytes(value_scales_of(a, table[b], 0), 2 * a->value_heads * size);
        for (int64_t k = 0; k < a->key_heads; k++) {
            const char *ahead = k + 1 < a->key_heads ? keys_of(form, a, table[b], k + 1)
                                : b + 1 < blocks     ? keys_of(form, a, table[b + 1], 0)
                                                     : values_of(form, a, table[0], 0);
            char *scores = s.scores + k * group * s.line + 4 * b * size;
            int64_t count = min_i64(size, tokens - b * size);
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
        pv_product(form, a, table, tokens, k, group, s.scores + k * group * s.line, s.line,
                   a->partial + (item * heads + k * group) * a->value_width);
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
            store_as(rows_bf16(form), a->out, (row * heads + h) * width + column, sums);
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
