/* What becomes of a GEMM's sums. */
#ifndef LPA_GEMM_H
#define LPA_GEMM_H

#include "kernels.h"

enum { PAIR = 2 * LANES }; /* outputs of two panels */

INLINE void finish_vector(int is_bf16, const struct op *op, void *out, int64_t column, f32x16 v) {
    int64_t rest = op->columns - column;
    if (rest <= 0) return;
    int add = op->epilogue == RESIDUAL_ADD;
    if (add && is_bf16) v = through_bf16(v);
    if (rest >= LANES) {
        if (add)
            store_f32((float *)out + column, load_f32((float *)out + column) + v);
        else
            store_as(is_bf16, out, column, v);
    } else {
        if (add)
            store_some(0, out, column, load_some(0, out, column, rest) + v, rest);
        else
            store_some(is_bf16, out, column, v, rest);
    }
}

/* Sums [count, PAIR] of a pair of panels, and the bias, to the output's rows from `row` on. */
INLINE void finish_pair(int is_bf16, const struct op *op, int64_t row, int64_t count, int64_t pair, const float *sums) {
    f32x16 bias[2] = {splat_f32(0), splat_f32(0)};
    if (op->bias)
        for (int s = 0; s < 2; s++) bias[s] = load_as(is_bf16, op->bias, pair * PAIR + s * LANES);
    for (int64_t r = 0; r < count; r++) {
        void *out = (char *)op->out + (row + r) * op->out_stride;
        f32x16 left = load_f32(sums + r * PAIR), right = load_f32(sums + r * PAIR + LANES);
        if (op->bias) {
            left += bias[0];
            right += bias[1];
        }
        if (op->epilogue == SWIGLU_GATED) {
            finish_vector(is_bf16, op, out, pair * LANES, silu_f32(left) * right);
            continue;
        }
        if (op->epilogue == RELU) { /* NaN stays NaN */
            left = select_f32(left < splat_f32(0), splat_f32(0), left);
            right = select_f32(right < splat_f32(0), splat_f32(0), right);
        }
        finish_vector(is_bf16, op, out, pair * PAIR, left);
        finish_vector(is_bf16, op, out, pair * PAIR + LANES, right);
    }
}

#endif
