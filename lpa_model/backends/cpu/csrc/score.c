/* What a row of logits says of its target and of its best tokens. */
#include <math.h>

#include "logits.h"

enum { CHUNK_ROWS = 4 }; /* rows that a thread takes at a time */

/* Sum of e^(logit - peak), of which as many as a pass has are added up in float32. */
INLINE double sum_exp(int is_bf16, const void *row, int64_t count, float peak) {
    double total = 0;
    for (int64_t start = 0; start < count; start += PASS) {
        int64_t end = min_i64(start + PASS, count), i = start;
        f32x16 even = splat_f32(0), odd = even;
        for (; i + 2 * LANES <= end; i += 2 * LANES) {
            even += exp_close(load_as(is_bf16, row, i) - splat_f32(peak));
            odd += exp_close(load_as(is_bf16, row, i + LANES) - splat_f32(peak));
        }
        float part = sum_f32(even + odd);
        for (; i < end; i += LANES) {
            float some[LANES];
            store_f32(some, exp_close(load_or(is_bf16, row, i, end - i, peak) - splat_f32(peak)));
            for (int64_t j = 0; j < min_i64(LANES, end - i); j++) part += some[j];
        }
        total += (double)part;
    }
    return total;
}

/* Tokens before the target, by logit, then by id. */
INLINE int64_t count_before(int is_bf16, const void *row, int64_t vocab, int64_t target) {
    float own = logit_at(is_bf16, row, target);
    int32_t before = 0;
    for (int64_t i = 0; i < target; i++) before += logit_at(is_bf16, row, i) >= own;
    for (int64_t i = target; i < vocab; i++) before += logit_at(is_bf16, row, i) > own;
    return before;
}

INLINE void score_row(int is_bf16, const struct score *s, int64_t r, struct row_scratch scratch) {
    const void *row = row_at(is_bf16, s->logits, r, s->vocab);
    int has_norm;
    int64_t best = find_best(is_bf16, row, s->vocab, &has_norm), target = s->targets[r], top = s->top;
    float peak = logit_at(is_bf16, row, best);
    s->best[r] = best;
    s->peak[r] = peak;
    s->own[r] = logit_at(is_bf16, row, target);
    s->norm[r] = (double)__builtin_nanf("");
    if (has_norm) { /* the best one's 1 apart: a norm is as accurate where the others are next to nothing */
        double others = sum_exp(is_bf16, row, best, peak);
        others += sum_exp(is_bf16, row_at(is_bf16, row, best + 1, 1), s->vocab - best - 1, peak);
        s->norm[r] = log1p(others);
    }
    s->rank[r] = 1 + count_before(is_bf16, row, s->vocab, target);
    int64_t *ids = s->top_ids + r * top;
    float *logits = s->top_logits + r * top;
    if (top == 1) {
        ids[0] = best;
        logits[0] = peak;
    } else if (top && has_norm) {
        gather_best(is_bf16, row, s->vocab, top, scratch.columns, scratch.ids, scratch.values);
        sort_best(scratch.ids, scratch.values, top);
        for (int64_t i = 0; i < top; i++) ids[i] = scratch.ids[i], logits[i] = scratch.values[i];
    }
}

void score_rows(const struct score *s) {
    struct row_scratch scratch = take_scratch(s->scratch, s->scratch_bytes, &s->counters[1], s->vocab);
    for (int64_t first = CHUNK_ROWS * fetch_add(s->counters); first < s->rows; first = CHUNK_ROWS * fetch_add(s->counters))
        for (int64_t r = first; r < min_i64(first + CHUNK_ROWS, s->rows); r++) {
            if (s->dtype == BFLOAT16)
                score_row(1, s, r, scratch);
            else
                score_row(0, s, r, scratch);
        }
}
