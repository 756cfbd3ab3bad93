/* What is done to a row alone: RMSNorm, LayerNorm with its addition to the residual stream, SwiGLU. */
#include "kernels.h"

/* 16 numbers from `i` on of a row of `width`, and zeros behind its end. */
INLINE f32x16 load_within(int is_bf16, const void *row, int64_t i, int64_t width) {
    return width - i >= LANES ? load_as(is_bf16, row, i) : load_some(is_bf16, row, i, width - i);
}

INLINE void store_within(int is_bf16, void *row, int64_t i, int64_t width, f32x16 v) {
    if (width - i >= LANES)
        store_as(is_bf16, row, i, v);
    else
        store_some(is_bf16, row, i, v, width - i);
}

/* The padding of a row that later products read. */
INLINE void store_zeros(int is_bf16, void *row, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i += LANES) store_within(is_bf16, row, i, to, splat_f32(0));
}

/* Ones below `count`, zeros from there on. */
INLINE f32x16 ones_below(int64_t count) {
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return select_f32(lane < (int32_t)min_i64(count, LANES), splat_f32(1), splat_f32(0));
}

/* x [width] -> out [columns], zeros from width on. A bfloat16 result is rounded before the weight, too, as the plain
 * layer does. */
INLINE void rms_norm(int x_is_bf16, int is_bf16, const struct op *op, const void *x, void *out) {
    int64_t width = op->width;
    f32x16 squares = splat_f32(0);
    for (int64_t i = 0; i < width; i += LANES) {
        f32x16 v = load_within(x_is_bf16, x, i, width);
        squares = fma_f32(v, v, squares);
    }
    float mean = sum_f32(squares) / (float)width + (float)op->eps;
    f32x16 factor = splat_f32(1 / __builtin_sqrtf(mean));
    for (int64_t i = 0; i < width; i += LANES) {
        f32x16 v = load_within(x_is_bf16, x, i, width) * factor;
        if (is_bf16) v = through_bf16(v);
        store_within(is_bf16, out, i, width, v * load_within(is_bf16, op->weight, i, width));
    }
    store_zeros(is_bf16, out, width, op->columns);
}

/* residual [width] += LayerNorm(x [width]); out [columns], if there is one, is the residual, zeros from width on. */
INLINE void add_layer_norm(int is_bf16, const struct op *op, const void *x, float *residual, void *out) {
    int64_t width = op->width;
    f32x16 total = splat_f32(0), squares = splat_f32(0);
    for (int64_t i = 0; i < width; i += LANES) total += load_within(is_bf16, x, i, width);
    f32x16 mean = splat_f32(sum_f32(total) / (float)width);
    for (int64_t i = 0; i < width; i += LANES) {
        f32x16 v = (load_within(is_bf16, x, i, width) - mean) * ones_below(width - i);
        squares = fma_f32(v, v, squares);
    }
    f32x16 factor = splat_f32(1 / __builtin_sqrtf(sum_f32(squares) / (float)width + (float)op->eps));
    for (int64_t i = 0; i < width; i += LANES) {
        f32x16 v = (load_within(is_bf16, x, i, width) - mean) * factor;
        f32x16 bias = op->bias ? load_within(is_bf16, op->bias, i, width) : splat_f32(0);
        f32x16 sum = load_within(0, residual, i, width) + fma_f32(v, load_within(is_bf16, op->weight, i, width), bias);
        store_within(0, residual, i, width, sum);
        if (out) store_within(is_bf16, out, i, width, sum);
    }
    if (out) store_zeros(is_bf16, out, width, op->columns);
}

/* out [columns] = silu(gate [width]) * up [width], zeros from width on. */
INLINE void swiglu(int is_bf16, const struct op *op, const void *gate, const void *up, void *out) {
    int64_t width = op->width;
    for (int64_t i = 0; i < width; i += LANES) {
        f32x16 v = silu_f32(load_within(is_bf16, gate, i, width));
        store_within(is_bf16, out, i, width, v * load_within(is_bf16, up, i, width));
    }
    store_zeros(is_bf16, out, width, op->columns);
}

INLINE void row_of(int is_bf16, const struct op *op, int64_t row) {
    const char *x = (const char *)op->x + row * op->x_stride;
    char *out = op->out ? (char *)op->out + row * op->out_stride : 0;
    if (op->kind == RMS_NORM) {
        rms_norm(0, is_bf16, op, x, out);
    } else if (op->kind == HEAD_RMS_NORM) {
        for (int64_t h = 0; h < op->heads; h++)
            rms_norm(is_bf16, is_bf16, op, x + h * op->head_stride, out + h * op->head_stride);
    } else if (op->kind == ADD_LAYER_NORM) {
        add_layer_norm(is_bf16, op, x, (float *)((char *)op->residual + row * op->residual_stride), out);
    } else {
        swiglu(is_bf16, op, x, (const char *)op->weight + row * op->weight_stride, out);
    }
}

void norm_row(const struct op *op, int64_t row) {
    if (op->dtype == BFLOAT16)
        row_of(1, op, row);
    else
        row_of(0, op, row);
}
