/* What the library says of itself: the layout of its records, and the instruction sets that this processor has.
 *
 * Compiled once, for the oldest processor of the platform.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "records.h"

#define EXPORT __attribute__((visibility("default")))

struct field {
    const char *record;
    const char *name; /* 0: the record itself */
    int64_t offset;
    int64_t size;
};

#define RECORD(record) {#record, 0, 0, sizeof(struct record)}
#define FIELD(record, name) {#record, #name, offsetof(struct record, name), sizeof(((struct record *)0)->name)}

EXPORT const struct field lpa_fields[];
EXPORT const struct field lpa_fields[] = {
    RECORD(op),
    FIELD(op, kind),
    FIELD(op, dtype),
    FIELD(op, weight_dtype),
    FIELD(op, x),
    FIELD(op, weight),
    FIELD(op, bias),
    FIELD(op, residual),
    FIELD(op, out),
    FIELD(op, x_stride),
    FIELD(op, weight_stride),
    FIELD(op, residual_stride),
    FIELD(op, out_stride),
    FIELD(op, width),
    FIELD(op, columns),
    FIELD(op, panels),
    FIELD(op, group_panels),
    FIELD(op, epilogue),
    FIELD(op, heads),
    FIELD(op, head_stride),
    FIELD(op, eps),

    RECORD(op_list),
    FIELD(op_list, ops),
    FIELD(op_list, num_ops),
    FIELD(op_list, rows),
    FIELD(op_list, lanes),
    FIELD(op_list, counters),

    RECORD(attention),
    FIELD(attention, dtype),
    FIELD(attention, cache_dtype),
    FIELD(attention, q),
    FIELD(attention, new_keys),
    FIELD(attention, new_values),
    FIELD(attention, keys),
    FIELD(attention, values),
    FIELD(attention, key_scales),
    FIELD(attention, value_scales),
    FIELD(attention, out),
    FIELD(attention, rope),
    FIELD(attention, partial),
    FIELD(attention, stats),
    FIELD(attention, positions),
    FIELD(attention, lengths),
    FIELD(attention, tables),
    FIELD(attention, table_starts),
    FIELD(attention, item_rows),
    FIELD(attention, first_items),
    FIELD(attention, counters),
    FIELD(attention, rows),
    FIELD(attention, items),
    FIELD(attention, heads),
    FIELD(attention, key_heads),
    FIELD(attention, value_heads),
    FIELD(attention, key_width),
    FIELD(attention, value_width),
    FIELD(attention, query_stride),
    FIELD(attention, key_stride),
    FIELD(attention, value_stride),
    FIELD(attention, out_stride),
    FIELD(attention, block_size),
    FIELD(attention, split_blocks),
    FIELD(attention, prompt_positions),
    FIELD(attention, prompt_slots),
    FIELD(attention, shared_ends),
    FIELD(attention, own_starts),
    FIELD(attention, prompt_tables),
    FIELD(attention, spans),
    FIELD(attention, block_spans),
    FIELD(attention, query_tiles),
    FIELD(attention, prompt_rows),
    FIELD(attention, num_spans),
    FIELD(attention, prompt_blocks),
    FIELD(attention, num_query_tiles),
    FIELD(attention, packed_values),
    FIELD(attention, packed_value_tiles),
    FIELD(attention, scale),

    RECORD(draw),
    FIELD(draw, dtype),
    FIELD(draw, logits),
    FIELD(draw, settings),
    FIELD(draw, tokens),
    FIELD(draw, scratch),
    FIELD(draw, scratch_bytes),
    FIELD(draw, counters),
    FIELD(draw, rows),
    FIELD(draw, vocab),
    FIELD(draw, attempts),

    RECORD(mask),
    FIELD(mask, dtype),
    FIELD(mask, logits),
    FIELD(mask, masks),
    FIELD(mask, out),
    FIELD(mask, counters),
    FIELD(mask, rows),
    FIELD(mask, vocab),

    RECORD(score),
    FIELD(score, dtype),
    FIELD(score, logits),
    FIELD(score, targets),
    FIELD(score, own),
    FIELD(score, peak),
    FIELD(score, norm),
    FIELD(score, best),
    FIELD(score, rank),
    FIELD(score, top_ids),
    FIELD(score, top_logits),
    FIELD(score, scratch),
    FIELD(score, scratch_bytes),
    FIELD(score, counters),
    FIELD(score, rows),
    FIELD(score, vocab),
    FIELD(score, top),

    {0, 0, 0, 0},
};

#if defined(__x86_64__)
#include <cpuid.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif

enum { SSE_AVX = 0x6, AVX512 = 0xe6, AMX = 0x60000 }; /* register states that the system saves, in XCR0 */

static int state_saved(uint64_t states) {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return 0; /* OSXSAVE */
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (((uint64_t)high << 32 | low) & states) == states;
}

/* Linux gives the tiles' state to processes that say they will use it. */
static int tiles_permitted(void) {
#if defined(__linux__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
#else
    return 0;
#endif
}

static int supports(const char *name) {
    if (!strcmp(name, "scalar")) return 1;
    uint32_t a1, b1, c1, d1, a7, b7, c7, d7, a8, b8, c8, d8;
    if (!__get_cpuid(1, &a1, &b1, &c1, &d1) || !__get_cpuid_count(7, 0, &a7, &b7, &c7, &d7)) return 0;
    int fma = c1 >> 12 & 1, movbe = c1 >> 22 & 1, f16c = c1 >> 29 & 1, avx = c1 >> 28 & 1;
    int bmi1 = b7 >> 3 & 1, avx2 = b7 >> 5 & 1, bmi2 = b7 >> 8 & 1;
    int lzcnt = __get_cpuid(0x80000001, &a8, &b8, &c8, &d8) && (c8 >> 5 & 1);
    int v3 = fma && movbe && f16c && avx && bmi1 && avx2 && bmi2 && lzcnt && state_saved(SSE_AVX);
    if (!strcmp(name, "avx2")) return v3;
    int f = b7 >> 16 & 1, dq = b7 >> 17 & 1, cd = b7 >> 28 & 1, bw = b7 >> 30 & 1, vl = b7 >> 31 & 1;
    int v4 = v3 && f && dq && cd && bw && vl && state_saved(AVX512);
    if (!strcmp(name, "avx512")) return v4;
    if (!__get_cpuid_count(7, 1, &a8, &b8, &c8, &d8)) a8 = 0;
    if (!strcmp(name, "avxvnni")) return v3 && (a8 >> 4 & 1);
    int vnni = c7 >> 11 & 1, bf16 = v4 && vnni && (a8 >> 5 & 1);
    if (!strcmp(name, "avx512bf16")) return bf16;
    int amx_bf16 = d7 >> 22 & 1, amx_tile = d7 >> 24 & 1;
    if (!strcmp(name, "amx")) return bf16 && amx_bf16 && amx_tile && state_saved(AMX) && tiles_permitted();
    return 0;
}
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>

static int supports(const char *name) {
    uint64_t hwcap = getauxval(AT_HWCAP), hwcap2 = getauxval(AT_HWCAP2);
    int dotprod = (hwcap & HWCAP_ASIMDDP) != 0, i8mm = dotprod && (hwcap2 & HWCAP2_I8MM);
    if (!strcmp(name, "dotprod")) return dotprod;
    if (!strcmp(name, "i8mm")) return i8mm;
    if (!strcmp(name, "neonbf16")) return i8mm && (hwcap2 & HWCAP2_BF16);
    return !strcmp(name, "scalar") || !strcmp(name, "neon");
}
#else
static int supports(const char *name) { return !strcmp(name, "scalar"); }
#endif

/* 1 if this processor and system run the kernels of an instruction set, else 0. Where that is "amx", the process may
 * use tiles from here on. */
EXPORT int64_t lpa_supports(const char *name);
EXPORT int64_t lpa_supports(const char *name) { return supports(name); }

/* What the library was compiled from: build.py's source_hash. */
EXPORT extern const char lpa_source[];
EXPORT const char lpa_source[] = SOURCE;
