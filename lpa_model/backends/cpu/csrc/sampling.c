/* Tokens drawn from rows of logits, and rows copied without what a bit mask forbids.
 *
 * Nothing is sorted. A token is drawn from all; if those more probable have top_p of the mass, neither it nor anything
 * less probable may be taken, and the next one is drawn from them.
 */
#include "logits.h"

enum {
    NOTHING = -1,   /* instead of a token: all logits are -inf */
    UNDECIDED = -2, /* the numbers were not enough */
    SUM_BLOCK = RARE_BLOCK, /* tokens whose weights are summed before their sums are */
};

static const double SMALLEST_TOP_P = 1e-200; /* a top_p of 0 keeps the best token */
static const float LEAST = -86;              /* e^this times the best token's weight: what has less has none */
static const float LARGEST = 3e38f;

/* A row's weights, the best token's being 1. */
struct weights {
    float peak, scale, min_p;
    float bound; /* a logit: what does not exceed it has no weight */
};

INLINE f32x16 weights_of(f32x16 x, struct weights w) {
    f32x16 distance = (x - splat_f32(w.peak)) * splat_f32(w.scale), weight = exp_close(distance);
    i32x16 counts = (x > splat_f32(w.bound)) & (distance > splat_f32(LEAST)) & (weight >= splat_f32(w.min_p));
    return select_f32(counts, weight, splat_f32(0));
}

/* Sums of SUM_BLOCK weights each; returns that of all. */
INLINE double sum_blocks(int is_bf16, const void *row, int64_t vocab, struct weights w, float *sums) {
    double total = 0;
    for (int64_t start = 0; start < vocab; start += SUM_BLOCK) {
        int64_t end = min_i64(start + SUM_BLOCK, vocab), i = start;
        f32x16 even = splat_f32(0), odd = even;
        for (; i + 2 * LANES <= end; i += 2 * LANES) {
            even += weights_of(load_as(is_bf16, row, i), w);
            odd += weights_of(load_as(is_bf16, row, i + LANES), w);
        }
        for (; i < end; i += LANES) even += weights_of(load_or(is_bf16, row, i, end - i, -INFINITE), w);
        float part = sum_f32(even + odd);
        sums[start / SUM_BLOCK] = part;
        total += (double)part;
    }
    return total;
}

/* The first index at which the cumulative weight passes the target; against rounding, the last with a weight. */
INLINE int64_t inverse(int is_bf16, const void *row, int64_t vocab, struct weights w, const float *sums,
                       double target) {
    double cumulative = 0, before = 0;
    int64_t home = 0, found = 0;
    for (int64_t b = 0; b < ceil_div(vocab, SUM_BLOCK); b++)
        if (sums[b] > 0) {
            home = b;
            before = cumulative;
            cumulative += (double)sums[b];
            if (cumulative > target) break;
        }
    cumulative = before;
    int64_t end = min_i64((home + 1) * SUM_BLOCK, vocab);
    for (int64_t start = home * SUM_BLOCK; start < end; start += LANES) {
        float some[LANES];
        store_f32(some, weights_of(load_or(is_bf16, row, start, end - start, -INFINITE), w));
        for (int64_t i = 0; i < min_i64(LANES, end - start); i++)
            if (some[i] > 0) {
                found = start + i;
                cumulative += (double)some[i];
                if (cumulative > target) return found;
            }
    }
    return found;
}

/* An index into the row, or UNDECIDED. */
INLINE int64_t draw(int is_bf16, const void *row, int64_t vocab, float peak, const double *settings, int64_t attempts,
                    float *sums) {
    float scale = (float)(1 / settings[0]);
    struct weights w = {peak, scale < LARGEST ? scale : LARGEST, (float)settings[3], -INFINITE};
    double top_p = settings[2], mass = sum_blocks(is_bf16, row, vocab, w, sums);
    double limit = mass * (top_p > SMALLEST_TOP_P ? top_p : SMALLEST_TOP_P);
    for (int64_t i = 0; i < attempts; i++) {
        int64_t index = inverse(is_bf16, row, vocab, w, sums, settings[4 + i] * mass);
        if (top_p == 1) return index;
        w.bound = logit_at(is_bf16, row, index);
        mass = sum_blocks(is_bf16, row, vocab, w, sums);
        if (mass < limit) return index;
    }
    return UNDECIDED;
}

INLINE int64_t draw_row(int is_bf16, const struct draw *d, int64_t r, struct row_scratch s) {
    const void *row = row_at(is_bf16, d->logits, r, d->vocab);
    const double *settings = d->settings + r * (4 + d->attempts);
    int has_norm;
    int64_t best = find_best(is_bf16, row, d->vocab, &has_norm);
    float peak = logit_at(is_bf16, row, best);
    if (!has_norm) return peak == -INFINITE ? NOTHING : best;
    if (settings[0] == 0) return best;
    int64_t k = settings[1] < (double)d->vocab ? (int64_t)settings[1] : d->vocab;
    if (!k) return draw(is_bf16, row, d->vocab, peak, settings, d->attempts, s.sums);
    gather_best(is_bf16, row, d->vocab, k, s.columns, s.ids, s.values);
    int64_t index = draw(0, s.values, k, peak, settings, d->attempts, s.sums);
    return index < 0 ? index : s.ids[index];
}

void draw_tokens(const struct draw *d) {
    struct row_scratch s = take_scratch(d->scratch, d->scratch_bytes, &d->counters[1], d->vocab);
    for (int64_t r = fetch_add(d->counters); r < d->rows; r = fetch_add(d->counters))
        d->tokens[r] = d->dtype == BFLOAT16 ? draw_row(1, d, r, s) : draw_row(0, d, r, s);
}

INLINE void mask_row(int is_bf16, const struct mask *m, int64_t r) {
    const u32x16 lanes = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    const void *row = row_at(is_bf16, m->logits, r, m->vocab);
    const uint8_t *bits = m->masks[r];
    float *out = m->out + r * m->vocab;
    int64_t i = 0;
    for (; i + LANES <= m->vocab; i += LANES) {
        f32x16 x = load_as(is_bf16, row, i);
        if (bits) {
            uint32_t own = (uint32_t)bits[i / 8] | (uint32_t)bits[i / 8 + 1] << 8;
            x = select_f32((splat_u32(own) & lanes) == lanes, x, splat_f32(-INFINITE));
        }
        store_f32(out + i, x);
    }
    for (; i < m->vocab; i++)
        out[i] = !bits || (bits[i / 8] >> i % 8 & 1) ? logit_at(is_bf16, row, i) : -INFINITE;
}

void mask_logits(const struct mask *m) {
    for (int64_t r = fetch_add(m->counters); r < m->rows; r = fetch_add(m->counters)) {
        if (m->dtype == BFLOAT16)
            mask_row(1, m, r);
        else
            mask_row(0, m, r);
    }
}
