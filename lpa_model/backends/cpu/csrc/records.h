/* The arguments of every kernel: what Python fills in (args.py) and C reads.
 *
 * All fields are 8 bytes: addresses, int64_t or double. Strides are in bytes, sizes in numbers. library.c exports name,
 * offset and size of each field, and args.py checks its own records against them when the library is loaded.
 */
#ifndef LPA_RECORDS_H
#define LPA_RECORDS_H

#include <stdint.h>

/* INT4 is of weights alone, INT8 of weights and of the cache. */
enum dtype { FLOAT32, BFLOAT16, INT8, INT4 };

enum op_kind {
    GEMM,           /* out = epilogue(x . weight + bias) */
    RMS_NORM,       /* out = RMSNorm(x), x float32 */
    HEAD_RMS_NORM,  /* the same of each head, x as `dtype` says */
    ADD_LAYER_NORM, /* residual += LayerNorm(x); out = residual */
    SWIGLU,         /* out = silu(x) * weight, both of a row */
    /* attention: x is the address of a struct attention */
    ATTENTION_DECODE, /* the decode rows */
    CACHE_WRITE,      /* the prompt rows' keys and values into the cache, keys rotated */
    PACK_VALUES,      /* for tiles: the cached values of the prompts' texts, transposed */
    ATTENTION_PROMPT, /* the prompt rows */
};

/* A GEMM's epilogue. With bfloat16 activations, sums are rounded to bfloat16 before RESIDUAL_ADD. */
enum epilogue {
    STORE,
    RELU,
    SWIGLU_GATED, /* panels of gate and up alternate: silu(gate) * up; out is half as wide */
    RESIDUAL_ADD, /* out float32 += sums */
};

/* One operation on all rows of a step. */
struct op {
    int64_t kind;         /* enum op_kind */
    int64_t dtype;        /* enum dtype: of activations, bias and norms; sums and the residual stream are float32 */
    int64_t weight_dtype; /* GEMM: enum dtype of its panels; BFLOAT16 ones may meet float32 activations */
    const void *x;        /* [rows, width], or [rows, groups * width] */
    const void *weight;   /* GEMM: packed panels; norms: [width]; SWIGLU: the second factor [rows, width] */
    const void *bias;     /* GEMM: [panels * 16]; ADD_LAYER_NORM: [width]; 0: none */
    float *residual;      /* ADD_LAYER_NORM: [rows, width] */
    void *out;            /* 0 of ADD_LAYER_NORM: nothing but the residual is written */
    int64_t x_stride;     /* from row to row, in bytes */
    int64_t weight_stride; /* of SWIGLU's second factor */
    int64_t residual_stride;
    int64_t out_stride;
    int64_t width;        /* inputs of a row, or of one group's part of it; GEMM: a multiple of 32 */
    int64_t columns;      /* GEMM: outputs that are written, at most 16 * panels; norms: zeros from width to here */
    int64_t panels;       /* GEMM: panels of 16 outputs each, an even number */
    int64_t group_panels; /* consecutive ones that read the same part of x; even */
    int64_t epilogue;     /* enum epilogue */
    int64_t heads;        /* HEAD_RMS_NORM */
    int64_t head_stride;  /* HEAD_RMS_NORM: bytes from head to head, in x and in out */
    double eps;           /* of norms */
};

/* Operations one after another, each on all rows. */
struct op_list {
    const struct op *ops;
    int64_t num_ops;
    int64_t rows;
    int64_t lanes;     /* parts that the work items of each op fall into: as many as there are threads */
    int64_t *counters; /* [1 + num_ops * (1 + lanes)], zeros: threads that got scratch; of each op items done, and items
                          taken of each lane */
};

/* A layer's attention over a paged cache, in the ops from ATTENTION_DECODE on. Numbers are as `dtype` says, those of the
 * cache as `cache_dtype` does. */
struct attention {
    int64_t dtype;
    int64_t cache_dtype;    /* of keys and values: dtype, or INT8 */
    const void *q;          /* [decode rows and prompt rows, heads, key_width], rows query_stride apart */
    const void *new_keys;   /* [.., key_heads, key_width], rows key_stride apart: the step's own tokens */
    const void *new_values; /* [.., value_heads, value_width], rows value_stride apart */
    void *keys;             /* [blocks, key_heads, block_size, key_width] */
    void *values;           /* [blocks, value_heads, block_size, value_width]; bfloat16: [.., block_size / 2, .., 2] */
    void *key_scales;       /* INT8: bfloat16 [blocks, key_heads, block_size] */
    void *value_scales;     /* INT8: bfloat16 [blocks, value_heads, block_size] */
    void *out;              /* [.., heads, value_width], rows out_stride apart */
    const float *rope;      /* [positions, key_width / 2, 2]: cos and sin; 0: positions are not rotary */
    /* decode rows: one query each, in front of the prompt rows */
    float *partial;               /* [items, heads, value_width]: scratch */
    float *stats;                 /* [items, 2, heads]: scratch, maximum and sum */
    const int64_t *positions;     /* [rows] */
    const int64_t *lengths;       /* [rows]: tokens to attend to, the new one included */
    const int64_t *tables;        /* block tables, one after another */
    const int64_t *table_starts;  /* [rows] */
    const int64_t *item_rows;     /* [items]: a work item is a split of one row's tokens */
    const int64_t *first_items;   /* [rows + 1] */
    int64_t *counters;            /* [1 + rows + 1], zeros: next item; finished items of each row; finished rows */
    int64_t rows;
    int64_t items;
    int64_t heads;
    int64_t key_heads;
    int64_t value_heads;
    int64_t key_width;
    int64_t value_width;
    int64_t query_stride; /* from row to row, in numbers */
    int64_t key_stride;
    int64_t value_stride;
    int64_t out_stride;
    int64_t block_size;
    int64_t split_blocks; /* blocks of a work item */
    /* prompt rows: new tokens of some texts, one text after another */
    const int64_t *prompt_positions; /* [prompt_rows] */
    const int64_t *prompt_slots;     /* [prompt_rows]: block * block_size + offset */
    const int64_t *shared_ends;      /* [prompt_rows]: a row sees none of its text's tokens from here ...; 0: all */
    const int64_t *own_starts;       /* [prompt_rows]: ... to here */
    const int64_t *prompt_tables;    /* block tables, one after another */
    const int64_t *spans;            /* [num_spans, 6]: first row, context, length, table start, column, first block */
    const int64_t *block_spans;      /* [prompt_blocks]: the span of each block */
    const int64_t *query_tiles;      /* [num_query_tiles, 2]: span, and its first tile of queries */
    int64_t prompt_rows;
    int64_t num_spans;
    int64_t prompt_blocks;
    int64_t num_query_tiles;
    void *packed_values;             /* scratch of PACK_VALUES, bfloat16 [value_heads * value_width * 32 * tiles] */
    int64_t packed_value_tiles;      /* tiles of 32 tokens in a panel of packed_values */
    double scale;
};

/* Tokens drawn from rows of logits. */
struct draw {
    int64_t dtype;          /* of logits */
    const void *logits;     /* [rows, vocab] */
    const double *settings; /* [rows, 4 + attempts]: temperature, top_k, top_p, min_p, numbers in [0, 1) */
    int64_t *tokens;        /* [rows] */
    void *scratch;          /* of each thread that may come */
    int64_t scratch_bytes;  /* of one thread: see take_scratch in logits.h */
    int64_t *counters;      /* [2], zeros: next row; threads */
    int64_t rows;
    int64_t vocab;
    int64_t attempts;
};

/* Rows of logits copied without what masks forbid. */
struct mask {
    int64_t dtype;
    const void *logits;          /* [rows, vocab] */
    const uint8_t *const *masks; /* [rows]: a bit for each token, lowest first; 0: no mask */
    float *out;                  /* [rows, vocab] */
    int64_t *counters;           /* [1], zeros: next row */
    int64_t rows;
    int64_t vocab;
};

/* What rows of logits say of their targets and of their best tokens. */
struct score {
    int64_t dtype;
    const void *logits;     /* [rows, vocab] */
    const int64_t *targets; /* [rows] */
    float *own;             /* [rows]: the target's logit */
    float *peak;            /* [rows]: the best token's */
    double *norm;           /* [rows]: log of the sum of e^(logit - peak) */
    int64_t *best;          /* [rows] */
    int64_t *rank;          /* [rows] */
    int64_t *top_ids;       /* [rows, top]: the best tokens */
    float *top_logits;      /* [rows, top] */
    void *scratch;          /* of each thread that may come */
    int64_t scratch_bytes;
    int64_t *counters;      /* [2], zeros: next chunk of rows; threads */
    int64_t rows;
    int64_t vocab;
    int64_t top;
};

#endif
