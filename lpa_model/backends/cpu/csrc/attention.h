/* What decode and prompt attention share: the paged cache's numbers as vectors, RoPE, the write of new tokens.
 *
 * Keys are [blocks, key_heads, block_size, key_width]. Values are [blocks, value_heads, block_size, value_width] in
 * float32 and int8, and in bfloat16 in the VNNI layout [.., block_size / 2, value_width, 2]. An int8 cache has codes in
 * them, and scales beside them: number = scale * code, a scale for each token and head.
 *
 * `form` says what rows and cache are, `is_bf16` what rows are. Both are constants wherever they are passed: each kernel
 * is written once and compiled for every form.
 */
#ifndef LPA_ATTENTION_H
#define LPA_ATTENTION_H

#include "kernels.h"

#define LOWEST (-__builtin_inff())

/* Whether register tiles are for 32 registers of 64 bytes. */
#define WIDE_TILES (VECTORS >= 32)

/* Queries, new keys and values, and outputs are float32 or bfloat16; the cache is the same, or int8. */
enum form { FORM_F32, FORM_BF16, FORM_F32_INT8, FORM_BF16_INT8 };

INLINE int rows_bf16(int form) { return form == FORM_BF16 || form == FORM_BF16_INT8; }

INLINE int is_int8(int form) { return form == FORM_F32_INT8 || form == FORM_BF16_INT8; }

INLINE int form_of(const struct attention *a) {
    if (a->cache_dtype == INT8) return a->dtype == BFLOAT16 ? FORM_BF16_INT8 : FORM_F32_INT8;
    return a->dtype == BFLOAT16 ? FORM_BF16 : FORM_F32;
}

#define FORM_CASE(form, call)  \
    case form: {               \
        enum { FORM = form };  \
        call;                  \
        break;                 \
    }

/* Runs `call` with a record's form as the constant FORM. */
#define FOR_FORM(a, call)               \
    switch (form_of(a)) {               \
        FORM_CASE(FORM_F32, call)       \
        FORM_CASE(FORM_BF16, call)      \
        FORM_CASE(FORM_F32_INT8, call)  \
        FORM_CASE(FORM_BF16_INT8, call) \
    }

INLINE int64_t number_bytes(int is_bf16) { return is_bf16 ? 2 : 4; }

/* Of a number in the cache. */
INLINE int64_t cached_bytes(int form) { return is_int8(form) ? 1 : number_bytes(rows_bf16(form)); }

/* Whether operands are bfloat16 in VNNI layout (interleaved by 2): queries and weights are then rounded to it. */
INLINE int uses_vnni(int is_bf16) { return is_bf16 && HAS_DOT_BF16; }

/* A part of a cached row, or of the rows of two neighbouring tokens: 16 numbers of a row in float32 and int8, 32 numbers
 * of a key or 16 columns of two values in bfloat16. */
INLINE int64_t part_numbers(int form) { return form == FORM_BF16 ? 32 : 16; }

INLINE int64_t part_bytes(int form) { return is_int8(form) ? 16 : 64; }

/* The numbers (codes, of int8), or the lower and the upper ones of its pairs, or these as they are. */
struct part {
    f32x16 low, high;
    u32x16 pairs;
};

INLINE struct part split_pairs(u32x16 pairs) {
    struct part part = {.pairs = pairs};
    if (!HAS_DOT_BF16) part.low = low_bf16(pairs), part.high = high_bf16(pairs);
    return part;
}

INLINE struct part load_part(int form, const char *from) {
    if (form == FORM_BF16) return split_pairs(load_u32(from));
    return (struct part){.low = is_int8(form) ? load_i8((const int8_t *)from) : load_f32((const float *)from)};
}

/* RoPE: neighbours (x[2i], x[2i + 1]) rotate by the angle whose (cos, sin) is (rope[2i], rope[2i + 1]). */
INLINE f32x16 apply_rope(f32x16 x, f32x16 rope) {
    f32x16 neighbours = __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    f32x16 cosines = __builtin_shufflevector(rope, rope, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14);
    f32x16 sines = __builtin_shufflevector(rope, -rope, 17, 1, 19, 3, 21, 5, 23, 7, 25, 9, 27, 11, 29, 13, 31, 15);
    return fma_f32(x, cosines, neighbours * sines);
}

/* 16 numbers of a row from number i on, rotated unless `rope` is 0. */
INLINE f32x16 load_rotated(int is_bf16, const void *row, const float *rope, int64_t i) {
    f32x16 x = load_as(is_bf16, row, i);
    return rope ? apply_rope(x, load_f32(rope + i)) : x;
}

INLINE void copy_row(int is_bf16, const void *from, int64_t width, const float *rope, void *to) {
    for (int64_t i = 0; i < width; i += LANES) store_as(is_bf16, to, i, load_rotated(is_bf16, from, rope, i));
}

/* (cos, sin) pairs of a position; 0 where positions are not rotary. */
INLINE const float *rope_of(const struct attention *a, int64_t position) {
    return a->rope ? a->rope + position * a->key_width : 0;
}

/* The query of a row and head. */
INLINE const char *query_of(int is_bf16, const struct attention *a, int64_t row, int64_t head) {
    return (const char *)a->q + number_bytes(is_bf16) * (row * a->query_stride + head * a->key_width);
}

/* Where a head's keys, or values, begin in a block. */
INLINE char *keys_of(int form, const struct attention *a, int64_t block, int64_t head) {
    return (char *)a->keys + cached_bytes(form) * (block * a->key_heads + head) * a->block_size * a->key_width;
}

INLINE char *values_of(int form, const struct attention *a, int64_t block, int64_t head) {
    return (char *)a->values + cached_bytes(form) * (block * a->value_heads + head) * a->block_size * a->value_width;
}

/* Their scales [block_size]. */
INLINE bf16 *key_scales_of(const struct attention *a, int64_t block, int64_t head) {
    return (bf16 *)a->key_scales + (block * a->key_heads + head) * a->block_size;
}

INLINE bf16 *value_scales_of(const struct attention *a, int64_t block, int64_t head) {
    return (bf16 *)a->value_scales + (block * a->value_heads + head) * a->block_size;
}

/* A row, rotated unless `rope` is 0, as codes and their scale: `quantize_rows` of cache.py, to the bit. */
INLINE void quantize_row(int is_bf16, const void *from, int64_t width, const float *rope, int8_t *codes, bf16 *scale) {
    i32x16 most = splat_i32(0); /* absolute values as whole numbers, which are in the same order, NaN above infinity */
    for (int64_t i = 0; i < width; i += LANES)
        most = __builtin_elementwise_max(most, (i32x16)load_rotated(is_bf16, from, rope, i) & splat_i32(0x7fffffff));
    f32x16 peak = (f32x16)splat_i32(max_i32(most)) / splat_f32(127);
    *scale = (bf16)round_bf16(peak)[0];
    f32x16 step = splat_f32(*scale ? widen_bf16(*scale) : __builtin_inff());
    for (int64_t i = 0; i < width; i += LANES) {
        i32x16 code = round_i32(load_rotated(is_bf16, from, rope, i) / step);
        code = __builtin_elementwise_min(__builtin_elementwise_max(code, splat_i32(-127)), splat_i32(127));
        store_i8(codes + i, code);
    }
}

/* A row's new key, rotated where positions are rotary, and value into the cache. In VNNI layout a value is every second
 * number: its neighbour's are not touched, since another thread may be writing them. */
INLINE void write_token(int form, const struct attention *a, int64_t row, int64_t position, int64_t block,
                        int64_t offset) {
    int is_bf16 = rows_bf16(form);
    int64_t number = number_bytes(is_bf16), width = a->key_width;
    const char *keys = (const char *)a->new_keys + number * row * a->key_stride;
    const char *values = (const char *)a->new_values + number * row * a->value_stride;
    const float *rope = rope_of(a, position);
    for (int64_t h = 0; h < a->key_heads; h++, keys += number * width) {
        char *to = keys_of(form, a, block, h) + cached_bytes(form) * offset * width;
        if (is_int8(form))
            quantize_row(is_bf16, keys, width, rope, (int8_t *)to, key_scales_of(a, block, h) + offset);
        else
            copy_row(is_bf16, keys, width, rope, to);
    }
    width = a->value_width;
    for (int64_t h = 0; h < a->value_heads; h++, values += number * width) {
        char *block_values = values_of(form, a, block, h);
        if (is_int8(form)) {
            quantize_row(is_bf16, values, width, 0, (int8_t *)block_values + offset * width,
                         value_scales_of(a, block, h) + offset);
        } else if (is_bf16) {
            bf16 *to = (bf16 *)block_values + offset / 2 * 2 * width + offset % 2;
            for (int64_t i = 0; i < width; i++) to[2 * i] = ((const bf16 *)values)[i];
        } else {
            __builtin_memcpy(block_values + 4 * offset * width, values, (uint64_t)(4 * width));
        }
    }
}

#endif
