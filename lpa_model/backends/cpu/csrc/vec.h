/* The vector layer: one type of 16 float32, and the few operations that the kernels are written in.
 *
 * The compiler maps the type to two ymm registers on AVX2, one zmm on AVX-512, four q registers on NEON and four xmm
 * in the portable build. Every source file is compiled once per instruction set, with ISA as the suffix of its symbols.
 * HAS_NEON, HAS_DOT_BF16, HAS_DOT_I8 (VNNI), HAS_DOT_S8 (ARM's dotprod), HAS_MATRIX_I8 (I8MM) and HAS_TILES say which
 * instructions the flavour may use; where the compiler's target lacks them (the flavour for tests) they are computed in
 * plain C.
 */
#ifndef LPA_VEC_H
#define LPA_VEC_H

#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef HAS_NEON
#define HAS_NEON 0
#endif

#ifndef HAS_DOT_BF16
#define HAS_DOT_BF16 0
#endif
#ifndef HAS_TILES
#define HAS_TILES 0
#endif
#ifndef HAS_DOT_I8
#define HAS_DOT_I8 0
#endif
#ifndef HAS_DOT_S8
#define HAS_DOT_S8 0
#endif
#ifndef HAS_MATRIX_I8
#define HAS_MATRIX_I8 0
#endif

/* Vectors of 16 float32 that the registers hold: register tiles are sized by it. */
#ifndef VECTORS
#if defined(__AVX512F__)
#define VECTORS 32
#elif defined(__AVX2__) || HAS_NEON
#define VECTORS 8
#else
#define VECTORS 4
#endif
#endif

#define JOIN_SUFFIX(name, suffix) name##_##suffix
#define JOIN_EXPANDED(name, suffix) JOIN_SUFFIX(name, suffix)
/* A symbol that other files of the same instruction set refer to. */
#define ISA_NAME(name) JOIN_EXPANDED(name, ISA)
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

enum { LANES = 16, CACHE_LINE = 64 };

typedef uint16_t bf16; /* the bits of a bfloat16 */
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));
typedef uint16_t u16x4 __attribute__((vector_size(8)));

/* ---- load and store: no alignment is assumed ---- */

INLINE f32x16 load_f32(const float *p) {
    f32x16 v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store_f32(float *p, f32x16 v) { __builtin_memcpy(p, &v, sizeof v); }

INLINE u32x16 load_u32(const void *p) {
    u32x16 v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store_u32(void *p, u32x16 v) { __builtin_memcpy(p, &v, sizeof v); }

INLINE u32x4 load_u32x4(const void *p) {
    u32x4 v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

INLINE f32x16 splat_f32(float x) { return (f32x16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

INLINE u32x16 splat_u32(uint32_t x) { return (u32x16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

INLINE i32x16 splat_i32(int32_t x) { return (i32x16)splat_u32((uint32_t)x); }

/* 16 vectors of 16 numbers: in each round, squares of half the size change places. */
INLINE void transpose(u32x16 *rows) {
    for (int i = 0; i < LANES; i += 2) {
        u32x16 x = rows[i], y = rows[i + 1];
        rows[i] = __builtin_shufflevector(x, y, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
        rows[i + 1] = __builtin_shufflevector(x, y, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    }
    for (int i = 0; i < LANES; i++)
        if (!(i & 2)) {
            u32x16 x = rows[i], y = rows[i + 2];
            rows[i] = __builtin_shufflevector(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
            rows[i + 2] = __builtin_shufflevector(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        }
    for (int i = 0; i < LANES; i++)
        if (!(i & 4)) {
            u32x16 x = rows[i], y = rows[i + 4];
            rows[i] = __builtin_shufflevector(x, y, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
            rows[i + 4] = __builtin_shufflevector(x, y, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
        }
    for (int i = 0; i < 8; i++) {
        u32x16 x = rows[i], y = rows[i + 8];
        rows[i] = __builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        rows[i + 8] = __builtin_shufflevector(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
}

/* Numbers of 4 bytes [16, 16], rows from_bytes apart, become columns of `to`. */
static inline void transpose_square(const char *from, int64_t from_bytes, char *to, int64_t to_bytes) {
    u32x16 rows[LANES];
    for (int i = 0; i < LANES; i++) rows[i] = load_u32(from + i * from_bytes);
    transpose(rows);
    for (int i = 0; i < LANES; i++) store_u32(to + i * to_bytes, rows[i]);
}

/* ---- arithmetic ---- */

/* a * b + c, rounded once where the processor can. The build turns contraction off, so that nothing else is fused. */
INLINE f32x16 fma_f32(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__FMA__) || defined(__AVX512F__) || defined(__aarch64__)
    return __builtin_elementwise_fma(a, b, c);
#else
    return a * b + c;
#endif
}

INLINE f32x4 fma_f32x4(f32x4 a, f32x4 b, f32x4 c) {
#if defined(__FMA__) || defined(__AVX512F__) || defined(__aarch64__)
    return __builtin_elementwise_fma(a, b, c);
#else
    return a * b + c;
#endif
}

/* Lanes of `a` where the mask's are all ones, of `b` where they are zero. */
INLINE f32x16 select_f32(i32x16 mask, f32x16 a, f32x16 b) {
    return (f32x16)(((i32x16)a & mask) | ((i32x16)b & ~mask));
}

/* The larger of both; b where one is NaN. */
INLINE f32x16 max_f32(f32x16 a, f32x16 b) { return select_f32(a > b, a, b); }

/* The sum of all lanes, in a fixed order. */
INLINE float sum_f32(f32x16 v) {
    f32x8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
              __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    f32x4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    return (b[0] + b[2]) + (b[1] + b[3]);
}

/* The sum of all lanes of each of 16 vectors, in the order of sum_f32. `rows` is overwritten. */
INLINE f32x16 sums_f32(f32x16 *rows) {
    for (int i = 0; i < 8; i++) {
        f32x16 x = rows[2 * i], y = rows[2 * i + 1];
        rows[i] = __builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                  __builtin_shufflevector(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    for (int i = 0; i < 4; i++) {
        f32x16 x = rows[2 * i], y = rows[2 * i + 1];
        rows[i] = __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                  __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
    for (int i = 0; i < 2; i++) {
        f32x16 x = rows[2 * i], y = rows[2 * i + 1];
        rows[i] = __builtin_shufflevector(x, y, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
                  __builtin_shufflevector(x, y, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    }
    f32x16 x = rows[0], y = rows[1];
    return __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

/* 2^y on [0, 1): a minimax polynomial. */
INLINE f32x16 exp2_series(f32x16 y) {
    f32x16 series = splat_f32(1.8775767e-3f);
    series = fma_f32(series, y, splat_f32(8.9893397e-3f));
    series = fma_f32(series, y, splat_f32(5.5826318e-2f));
    series = fma_f32(series, y, splat_f32(2.4015361e-1f));
    series = fma_f32(series, y, splat_f32(6.9315308e-1f));
    return fma_f32(series, y, splat_f32(0.99999994f));
}

/* 2^power to 2 units in the last place; 0 below -126 (AVX-512: below -149), NaN stays NaN. `power` is at most 127. */
INLINE f32x16 exp2_f32(f32x16 power) {
#if defined(__AVX512DQ__)
    enum { MINUS_FLOOR = 9 };
    f32x16 y = (f32x16)_mm512_reduce_ps((__m512)power, MINUS_FLOOR);
    return (f32x16)_mm512_scalef_ps((__m512)exp2_series(y), (__m512)power); /* times 2^floor(power) */
#else
    f32x16 clamped = max_f32(power, splat_f32(-127)); /* a whole number fits into int32, and NaN becomes one */
    i32x16 whole = __builtin_convertvector(clamped, i32x16);
    whole += __builtin_convertvector(whole, f32x16) > clamped; /* towards -infinity: a true comparison is -1 */
    f32x16 y = select_f32(power < clamped, splat_f32(0), power - __builtin_convertvector(whole, f32x16));
    return exp2_series(y) * (f32x16)((whole + 127) << 23);
#endif
}

#define LOG2_E 1.4426950408889634f

/* x * sigmoid(x). */
INLINE f32x16 silu_f32(f32x16 x) {
    f32x16 power = x * splat_f32(-LOG2_E);
    power = select_f32(power > splat_f32(126), splat_f32(126), power);
    return x / (exp2_f32(power) + splat_f32(1));
}

/* ---- bfloat16 ---- */

INLINE float widen_bf16(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float v;
    __builtin_memcpy(&v, &bits, sizeof v);
    return v;
}

INLINE f32x16 load_bf16(const bf16 *p) {
    u16x16 v;
    __builtin_memcpy(&v, p, sizeof v);
    return (f32x16)(__builtin_convertvector(v, u32x16) << 16);
}

INLINE f32x4 load_bf16x4(const bf16 *p) {
    u16x4 v;
    __builtin_memcpy(&v, p, sizeof v);
    return (f32x4)(__builtin_convertvector(v, u32x4) << 16);
}

/* The bits of bfloat16 in the lower halves, rounded to nearest even; NaN stays NaN. */
INLINE u32x16 round_bf16(f32x16 v) {
    u32x16 bits = (u32x16)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    u32x16 nan = (u32x16)(v != v);
    return (rounded & ~nan) | (((bits >> 16) | 0x40) & nan);
}

/* Whether store_bf16 is an instruction. */
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define CONVERTS_BF16 1
#else
#define CONVERTS_BF16 0
#endif

INLINE void store_bf16(bf16 *p, f32x16 v) {
#if defined(__AVX512BF16__)
    __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
    __builtin_memcpy(p, &narrow, sizeof narrow);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    float32x4_t quarters[4];
    bfloat16x8_t narrow[2];
    __builtin_memcpy(quarters, &v, sizeof v);
    for (int i = 0; i < 2; i++)
        narrow[i] = vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(quarters[2 * i]), quarters[2 * i + 1]);
    __builtin_memcpy(p, narrow, sizeof narrow);
#else
    u16x16 narrow = __builtin_convertvector(round_bf16(v), u16x16);
    __builtin_memcpy(p, &narrow, sizeof narrow);
#endif
}

/* v as it is after a store as bfloat16. */
INLINE f32x16 through_bf16(f32x16 v) {
#if CONVERTS_BF16
    bf16 narrow[LANES];
    store_bf16(narrow, v);
    return load_bf16(narrow);
#else
    return (f32x16)(round_bf16(v) << 16);
#endif
}

/* The lower and the upper of two bfloat16 in each lane. */
INLINE f32x16 low_bf16(u32x16 pairs) { return (f32x16)(pairs << 16); }

INLINE f32x16 high_bf16(u32x16 pairs) { return (f32x16)(pairs & 0xffff0000u); }

/* Both as bfloat16 side by side, `low` in the lower halves. */
INLINE u32x16 pair_bf16(f32x16 low, f32x16 high) {
#if CONVERTS_BF16
    bf16 both[2][LANES];
    store_bf16(both[0], low);
    store_bf16(both[1], high);
    u16x16 a, b;
    __builtin_memcpy(&a, both[0], sizeof a);
    __builtin_memcpy(&b, both[1], sizeof b);
    return __builtin_convertvector(a, u32x16) | (__builtin_convertvector(b, u32x16) << 16);
#else
    return round_bf16(low) | (round_bf16(high) << 16);
#endif
}

/* acc + the products of 32 bfloat16 in x and w, two in each lane. In C and on ARM the lower ones are added first, each
 * rounded as fma_f32 does; VDPBF16PS adds the upper ones first, and subnormal numbers are zeros to it. ARM's BFDOT rounds
 * in a way of its own (to odd, and subnormal numbers to zero), so BFMLALB and BFMLALT are taken. */
INLINE f32x16 dot_bf16_pairs(f32x16 acc, u32x16 x, u32x16 w) {
#if defined(__AVX512BF16__)
    return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)w);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    float32x4_t sums[4];
    bfloat16x8_t xs[4], ws[4];
    __builtin_memcpy(sums, &acc, sizeof acc);
    __builtin_memcpy(xs, &x, sizeof x);
    __builtin_memcpy(ws, &w, sizeof w);
    for (int i = 0; i < 4; i++) sums[i] = vbfmlaltq_f32(vbfmlalbq_f32(sums[i], xs[i], ws[i]), xs[i], ws[i]);
    __builtin_memcpy(&acc, sums, sizeof acc);
    return acc;
#else
    acc = fma_f32(low_bf16(x), low_bf16(w), acc);
    return fma_f32(high_bf16(x), high_bf16(w), acc);
#endif
}

/* ---- int8: dot products of four numbers in each lane ---- */

/* The larger of all lanes. */
INLINE int32_t max_i32(i32x16 v) {
    i32x8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
    i32x8 b = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    a = __builtin_elementwise_max(a, b);
    i32x4 c = __builtin_shufflevector(a, a, 0, 1, 2, 3), d = __builtin_shufflevector(a, a, 4, 5, 6, 7);
    c = __builtin_elementwise_max(c, d);
    c = __builtin_elementwise_max(c, __builtin_shufflevector(c, c, 2, 3, 0, 1));
    return c[0] > c[1] ? c[0] : c[1];
}

INLINE int32_t sum_i32(i32x16 v) {
    i32x8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
              __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    i32x4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    return (b[0] + b[2]) + (b[1] + b[3]);
}

/* The nearest whole numbers, halves to even, of numbers between -2^22 and 2^22. */
INLINE i32x16 round_i32(f32x16 v) {
    const float magic = 0x1.8p23f;
    return (i32x16)(v + splat_f32(magic)) - (i32x16)splat_f32(magic);
}

/* The lowest 8 bits of each lane. */
INLINE void store_i8(void *p, i32x16 v) {
    i8x16 narrow = __builtin_convertvector(v, i8x16);
    __builtin_memcpy(p, &narrow, sizeof narrow);
}

/* 16 codes as numbers. */
INLINE f32x16 load_i8(const int8_t *p) {
    i8x16 v;
    __builtin_memcpy(&v, p, sizeof v);
    return __builtin_convertvector(__builtin_convertvector(v, i32x16), f32x16);
}

/* acc + the products of four bytes of x and of w in each lane, plainly. */
INLINE i32x16 dot_bytes(i32x16 acc, i32x16 x, u32x16 w, int w_is_signed) {
    for (int byte = 0; byte < 4; byte++) {
        u32x16 top = w << (24 - 8 * byte);
        acc += (x << (24 - 8 * byte) >> 24) * (w_is_signed ? (i32x16)top >> 24 : (i32x16)(top >> 24));
    }
    return acc;
}

#if defined(__AVX2__)
INLINE __m256i half_of(u32x16 v, int high) {
    typedef long long i64x8 __attribute__((vector_size(64)));
    i64x8 whole = (i64x8)v;
    return high ? __builtin_shufflevector(whole, whole, 4, 5, 6, 7) : __builtin_shufflevector(whole, whole, 0, 1, 2, 3);
}

INLINE u32x16 both_halves(__m256i low, __m256i high) {
    return (u32x16)__builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
}
#endif

#if HAS_NEON
INLINE int32x4_t dot_quarter(int32x4_t acc, int8x16_t x, int8x16_t w) {
#if HAS_DOT_S8
    return vdotq_s32(acc, x, w);
#else /* two products of 127 fit into 16 bits */
    int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(w)), high = vmull_high_s8(x, w);
    return vpadalq_s16(acc, vpaddq_s16(low, high));
#endif
}

INLINE i32x16 dot_quarters(i32x16 acc, u32x16 x, u32x16 w) {
    int32x4_t sums[4];
    int8x16_t xs[4], ws[4];
    __builtin_memcpy(sums, &acc, sizeof acc);
    __builtin_memcpy(xs, &x, sizeof x);
    __builtin_memcpy(ws, &w, sizeof w);
    for (int i = 0; i < 4; i++) sums[i] = dot_quarter(sums[i], xs[i], ws[i]);
    __builtin_memcpy(&acc, sums, sizeof acc);
    return acc;
}
#endif

#if defined(__AVXVNNI__)
INLINE i32x16 dot_halves(i32x16 acc, u32x16 x, u32x16 w) {
    __m256i sums[2];
    for (int i = 0; i < 2; i++) sums[i] = _mm256_dpbusd_avx_epi32(half_of((u32x16)acc, i), half_of(w, i), half_of(x, i));
    return (i32x16)both_halves(sums[0], sums[1]);
}
#endif

/* Weights of int8 as dot_i8 takes them, and what it counts too much for each 1 in x: the dot product of VNNI takes one
 * of its two factors unsigned. */
#if HAS_DOT_I8
enum { EXCESS_I8 = 128 };
INLINE u32x16 weights_i8(u32x16 w) { return w ^ 0x80808080u; }
#else
enum { EXCESS_I8 = 0 };
INLINE u32x16 weights_i8(u32x16 w) { return w; }
#endif

/* acc + (x . w), both from -127 to 127; x is one group of four in all lanes. */
INLINE i32x16 dot_i8(i32x16 acc, u32x16 x, u32x16 w) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVXVNNI__)
    return dot_halves(acc, x, w);
#elif HAS_NEON
    return dot_quarters(acc, x, w);
#elif HAS_DOT_I8
    return dot_bytes(acc, (i32x16)x, w, 0);
#elif defined(__AVX2__)
    /* |w| times x with w's sign: two products of 127 fit into 16 bits, of 255 they would not */
    __m256i sums[2];
    for (int i = 0; i < 2; i++) {
        __m256i part = half_of(w, i);
        __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(part), _mm256_sign_epi8(half_of(x, i), part));
        sums[i] = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
    return acc + (i32x16)both_halves(sums[0], sums[1]);
#else
    return dot_bytes(acc, (i32x16)x, w, 1);
#endif
}

/* Sums of (x . w) over one group, w from 0 to 15: in 16 bits with AVX2, since 16 products of 15 and 127 fit into them.
 * They begin as zeros. */
INLINE i32x16 add_u4(i32x16 sums, u32x16 x, u32x16 w) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, (__m512i)x);
#elif defined(__AVXVNNI__)
    return dot_halves(sums, x, w);
#elif HAS_NEON
    return dot_quarters(sums, x, w);
#elif HAS_DOT_I8
    return dot_bytes(sums, (i32x16)x, w, 0);
#elif defined(__AVX2__)
    __m256i both[2];
    for (int i = 0; i < 2; i++) {
        __m256i pairs = _mm256_maddubs_epi16(half_of(w, i), half_of(x, i));
        both[i] = _mm256_add_epi16(half_of((u32x16)sums, i), pairs);
    }
    return (i32x16)both_halves(both[0], both[1]);
#else
    return dot_bytes(sums, (i32x16)x, w, 0);
#endif
}

INLINE i32x16 total_u4(i32x16 sums) {
#if defined(__AVX2__) && !HAS_DOT_I8
    __m256i both[2];
    for (int i = 0; i < 2; i++) both[i] = _mm256_madd_epi16(half_of((u32x16)sums, i), _mm256_set1_epi16(1));
    return (i32x16)both_halves(both[0], both[1]);
#else
    return sums;
#endif
}

/* acc [2, 2] + x [2, 8] times w [2, 8] transposed: two rows and two outputs, eight codes of each. */
INLINE i32x4 dot_matrix(i32x4 acc, u32x4 x, u32x4 w) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return (i32x4)vmmlaq_s32((int32x4_t)acc, (int8x16_t)x, (int8x16_t)w);
#else
    i8x16 xs = (i8x16)x, ws = (i8x16)w;
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 8; k++) acc[i] += xs[i / 2 * 8 + k] * ws[i % 2 * 8 + k];
    return acc;
#endif
}

/* ---- numbers of either dtype: `is_bf16` is a constant wherever these are called, and folds ---- */

INLINE f32x16 load_as(int is_bf16, const void *base, int64_t index) {
    return is_bf16 ? load_bf16((const bf16 *)base + index) : load_f32((const float *)base + index);
}

INLINE void store_as(int is_bf16, void *base, int64_t index, f32x16 v) {
    if (is_bf16)
        store_bf16((bf16 *)base + index, v);
    else
        store_f32((float *)base + index, v);
}

/* The first `count` numbers (1 to 16); the other lanes are 0. Nothing behind them is read. */
INLINE f32x16 load_some(int is_bf16, const void *base, int64_t index, int64_t count) {
    f32x16 v = splat_f32(0);
    if (is_bf16) {
        bf16 some[LANES] = {0};
        __builtin_memcpy(some, (const bf16 *)base + index, (uint64_t)count * sizeof(bf16));
        return load_bf16(some);
    }
    __builtin_memcpy(&v, (const float *)base + index, (uint64_t)count * sizeof(float));
    return v;
}

/* Nothing behind the first `count` numbers (1 to 16) is written. */
INLINE void store_some(int is_bf16, void *base, int64_t index, f32x16 v, int64_t count) {
    if (is_bf16) {
        bf16 some[LANES];
        store_bf16(some, v);
        __builtin_memcpy((bf16 *)base + index, some, (uint64_t)count * sizeof(bf16));
    } else {
        __builtin_memcpy((float *)base + index, &v, (uint64_t)count * sizeof(float));
    }
}

/* ---- memory and threads ---- */

/* Have the line at p, which need not be anything's, come to the second-level cache. */
INLINE void prefetch(const void *p) { __builtin_prefetch(p, 0, 2); }

INLINE void prefetch_bytes(const void *p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += CACHE_LINE) prefetch((const char *)p + i);
}

/* Spin-wait hint: some dozen nanoseconds for the other hardware thread of the core. */
INLINE void pause_core(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

/* Adds 1 for all threads to see; returns what was there. */
INLINE int64_t fetch_add(int64_t *counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_ACQ_REL); }

INLINE void add_to(int64_t *counter, int64_t n) { __atomic_fetch_add(counter, n, __ATOMIC_ACQ_REL); }

INLINE int64_t fetch(const int64_t *counter) { return __atomic_load_n(counter, __ATOMIC_ACQUIRE); }

INLINE int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#endif
