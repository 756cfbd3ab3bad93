/* What sampling and scores share: passes over a row of logits, float32 or bfloat16, while it is in the cache.
 *
 * Logits are ordered by value, then by lower id. `is_bf16` is a constant wherever it is passed.
 */
#ifndef LPA_LOGITS_H
#define LPA_LOGITS_H

#include "kernels.h"

enum {
    PASS = 1024,      /* logits that are looked through at a time */
    COLUMNS = 1024,   /* of a bound on the k-th largest logit */
    RARE_BLOCK = 128, /* logits that are looked through at a time for what is rare */
};

#define INFINITE __builtin_inff()

INLINE float logit_at(int is_bf16, const void *row, int64_t i) {
    return is_bf16 ? widen_bf16(((const bf16 *)row)[i]) : ((const float *)row)[i];
}

INLINE const void *row_at(int is_bf16, const void *rows, int64_t row, int64_t width) {
    return (const char *)rows + row * width * (is_bf16 ? 2 : 4);
}

/* An integer that compares as x does: equal for 0 and -0, and beyond the infinities' for NaN. */
INLINE int32_t order_of(float x) {
    int32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    int32_t size = bits & 0x7fffffff;
    return bits < 0 ? -size : size;
}

INLINE int32_t order_at(int is_bf16, const void *row, int64_t i) { return order_of(logit_at(is_bf16, row, i)); }

/* e^x for x <= 0, to a unit in the last place, and 1 for 0; it ends at e^-86. */
INLINE f32x16 exp_close(f32x16 x) {
    const f32x16 shift = splat_f32(3 << 22); /* leaves the integer nearest to what it is added to in the last bits */
    x = max_f32(x, splat_f32(-86));
    f32x16 shifted = fma_f32(x, splat_f32(LOG2_E), shift);
    f32x16 y = fma_f32(shift - shifted, splat_f32(0.6931471805599453f), x);
    f32x16 series = splat_f32(1.38145988e-3f); /* e^y on [-ln 2 / 2, ln 2 / 2]: a minimax polynomial */
    series = fma_f32(series, y, splat_f32(8.36871658e-3f));
    series = fma_f32(series, y, splat_f32(4.1668389e-2f));
    series = fma_f32(series, y, splat_f32(1.66665211e-1f));
    series = fma_f32(series, y, splat_f32(4.9999994e-1f));
    series = fma_f32(series, y, splat_f32(1));
    series = fma_f32(series, y, splat_f32(1));
    return (f32x16)((u32x16)series + ((u32x16)shifted << 23));
}

/* The first `count` numbers, at most 16, from number i on; `other` in the other lanes. */
INLINE f32x16 load_or(int is_bf16, const void *row, int64_t i, int64_t count, float other) {
    const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    if (count >= LANES) return load_as(is_bf16, row, i);
    return select_f32(lanes < (i32x16)splat_u32((uint32_t)count), load_some(is_bf16, row, i, count), splat_f32(other));
}

/* The lowest id of the largest logit, or of NaN. `has_norm`: the row is NaN nowhere, and its largest not infinite. */
INLINE int64_t find_best(int is_bf16, const void *row, int64_t vocab, int *has_norm) {
    float peak = -INFINITE;
    int64_t home = 0;
    i32x16 nan = {0};
    for (int64_t start = 0; start < vocab; start += PASS) {
        int64_t end = min_i64(start + PASS, vocab), i = start;
        f32x16 high = splat_f32(-INFINITE);
        for (; i + LANES <= end; i += LANES) {
            f32x16 x = load_as(is_bf16, row, i);
            high = max_f32(x, high);
            nan |= x != x;
        }
        if (i < end) {
            f32x16 x = load_or(is_bf16, row, i, end - i, -INFINITE);
            high = max_f32(x, high);
            nan |= x != x;
        }
        float most = high[0];
        for (int lane = 1; lane < LANES; lane++) most = high[lane] > most ? high[lane] : most;
        if (most > peak) peak = most, home = start;
    }
    int32_t any = 0;
    for (int lane = 0; lane < LANES; lane++) any |= nan[lane];
    *has_norm = !any && peak != INFINITE && peak != -INFINITE;
    for (int64_t i = any ? 0 : home;; i++) {
        float x = logit_at(is_bf16, row, i);
        if (any ? x != x : x == peak) return i;
    }
}

/* The order of the k-th largest of `count` numbers. */
INLINE int32_t order_of_kth(const float *values, int64_t count, int64_t k) {
    int64_t low = -order_of(INFINITE), high = order_of(INFINITE);
    while (low < high) { /* the answer is between them */
        int64_t middle = (low + high + 1) >> 1;
        int32_t bound = (int32_t)middle, reached = 0;
        for (int64_t i = 0; i < count; i++) reached += order_of(values[i]) >= bound;
        if (reached >= k)
            low = middle;
        else
            high = middle - 1;
    }
    return (int32_t)low;
}

/* The order of a number that k of the row's logits reach: each of k columns of the row has one. */
INLINE int32_t lower_bound(int is_bf16, const void *row, int64_t vocab, int64_t k, float *columns) {
    int64_t count = min_i64(COLUMNS, vocab);
    if (k > count) return -order_of(INFINITE);
    for (int64_t i = 0; i < count; i++) columns[i] = -INFINITE;
    for (int64_t start = 0; start < vocab; start += COLUMNS) {
        int64_t some = min_i64(COLUMNS, vocab - start);
        const void *part = row_at(is_bf16, row, start, 1);
        for (int64_t i = 0; i < some; i++) {
            float x = logit_at(is_bf16, part, i);
            columns[i] = x > columns[i] ? x : columns[i];
        }
    }
    return order_of_kth(columns, count, k);
}

/* The k best tokens in the order of their ids, and their logits: into ids[:k], values[:k], both of the row's length.
 * columns float32 [COLUMNS] is scratch. The row holds no NaN. */
INLINE void gather_best(int is_bf16, const void *row, int64_t vocab, int64_t k, float *columns, int32_t *ids,
                        float *values) {
    int32_t bound = lower_bound(is_bf16, row, vocab, k, columns);
    int64_t found = 0;
    for (int64_t start = 0; start < vocab; start += RARE_BLOCK) {
        int64_t end = min_i64(start + RARE_BLOCK, vocab);
        int32_t reached = 0;
        for (int64_t i = start; i < end; i++) reached += order_at(is_bf16, row, i) >= bound;
        for (int64_t i = start; reached && i < end; i++)
            if (order_at(is_bf16, row, i) >= bound) {
                ids[found] = (int32_t)i;
                values[found++] = logit_at(is_bf16, row, i);
            }
    }
    int32_t kth = order_of_kth(values, found, k);
    int64_t equals = k, left = 0;
    for (int64_t i = 0; i < found; i++) equals -= order_of(values[i]) > kth;
    for (int64_t i = 0; i < found; i++) {
        int32_t key = order_of(values[i]);
        if (key > kth || (key == kth && equals-- > 0)) ids[left] = ids[i], values[left++] = values[i];
    }
}

/* Best first; of equal ones those stay first that are. */
INLINE void sort_best(int32_t *ids, float *values, int64_t count) {
    for (int64_t i = 1; i < count; i++) {
        int32_t id = ids[i];
        float value = values[i];
        int64_t at = i;
        for (; at > 0 && values[at - 1] < value; at--) ids[at] = ids[at - 1], values[at] = values[at - 1];
        ids[at] = id, values[at] = value;
    }
}

/* One thread's scratch: `bytes` of it from `memory` on for each thread that takes a number from `threads`. */
struct row_scratch {
    float *columns; /* [COLUMNS] */
    float *sums;    /* of blocks of weights: [vocab / 128] */
    float *values;  /* [vocab] */
    int32_t *ids;   /* [vocab] */
};

INLINE struct row_scratch take_scratch(void *memory, int64_t bytes, int64_t *threads, int64_t vocab) {
    float *mine = (float *)((char *)memory + bytes * fetch_add(threads));
    float *values = mine + COLUMNS + ceil_div(vocab, RARE_BLOCK);
    return (struct row_scratch){mine, mine + COLUMNS, values, (int32_t *)(values + vocab)};
}

#endif
