/* What decode and prompt attention share: the paged cache's numbers as vectors, RoPE, the write of new tokens.
 *
 * `is_bf16` is a constant wherever it is passed: each kernel is written once and compiled for both dtypes. Keys are
 * [blocks, key_heads, block_size, key_width]. Values are [blocks, value_heads, block_size, value_width] in float32, and
 * in bfloat16 in the VNNI layout [.., block_size / 2, value_width, 2]. A part is 64 bytes of them: 16 numbers of a row
 * in float32, 32 numbers of a key or 16 columns of two neighbouring tokens' values in bfloat16.
 */
#ifndef LPA_ATTENTION_H
#define LPA_ATTENTION_H

#include "kernels.h"

#define LOWEST (-__builtin_inff())

/* Whether register tiles are for 32 registers of 64 bytes; those of emulated instruction sets are, too. */
#if defined(__AVX512F__) || HAS_DOT_BF16
#define WIDE_TILES 1
#else
#define WIDE_TILES 0
#endif

INLINE int64_t number_bytes(int is_bf16) { return is_bf16 ? 2 : 4; }

INLINE int64_t part_numbers(int is_bf16) { return is_bf16 ? 32 : 16; }

/* Whether operands are bfloat16 in VNNI layout (interleaved by 2): queries and weights are then rounded to it. */
INLINE int uses_vnni(int is_bf16) { return is_bf16 && HAS_DOT_BF16; }

/* A part: the numbers (float32), or the lower and the upper ones of its pairs, or these as they are. */
struct part {
    f32x16 low, high;
    u32x16 pairs;
};

INLINE struct part split_pairs(u32x16 pairs) {
    struct part part = {.pairs = pairs};
    if (!HAS_DOT_BF16) part.low = low_bf16(pairs), part.high = high_bf16(pairs);
    return part;
}

INLINE struct part load_part(int is_bf16, const char *from) {
    if (is_bf16) return split_pairs(load_u32(from));
    return (struct part){.low = load_f32((const float *)from)};
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
    return (const char *)a->q + number_bytes(is_bf16) * (row * a->heads + head) * a->key_width;
}

/* Where a head's keys, or values, begin in a block. */
INLINE char *keys_of(int is_bf16, const struct attention *a, int64_t block, int64_t head) {
    return (char *)a->keys + number_bytes(is_bf16) * (block * a->key_heads + head) * a->block_size * a->key_width;
}

INLINE char *values_of(int is_bf16, const struct attention *a, int64_t block, int64_t head) {
    return (char *)a->values + number_bytes(is_bf16) * (block * a->value_heads + head) * a->block_size * a->value_width;
}

/* A row's new key, rotated where positions are rotary, and value into the cache. In VNNI layout a value is every second
 * number: its neighbour's are not touched, since another thread may be writing them. */
INLINE void write_token(int is_bf16, const struct attention *a, int64_t row, int64_t position, int64_t block,
                        int64_t offset) {
    int64_t number = number_bytes(is_bf16), width = a->key_width;
    const char *keys = (const char *)a->new_keys + number * row * a->key_stride;
    const char *values = (const char *)a->new_values + number * row * a->value_stride;
    for (int64_t h = 0; h < a->key_heads; h++, keys += number * width)
        copy_row(is_bf16, keys, width, rope_of(a, position),
                 keys_of(is_bf16, a, block, h) + number * offset * width);
    width = a->value_width;
    for (int64_t h = 0; h < a->value_heads; h++, values += number * width) {
        if (is_bf16) {
            bf16 *to = (bf16 *)values_of(1, a, block, h) + offset / 2 * 2 * width + offset % 2;
            for (int64_t i = 0; i < width; i++) to[2 * i] = ((const bf16 *)values)[i];
        } else {
            __builtin_memcpy(values_of(0, a, block, h) + 4 * offset * width, values, (uint64_t)(4 * width));
        }
    }
}

#endif
