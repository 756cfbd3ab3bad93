/* What the files of one instruction set call of each other. Symbols carry the instruction set as a suffix. */
#ifndef LPA_KERNELS_H
#define LPA_KERNELS_H

#include "records.h"
#include "vec.h"

#define gemm_items ISA_NAME(gemm_items)
#define gemm_scratch ISA_NAME(gemm_scratch)
#define gemm_item ISA_NAME(gemm_item)
#define norm_row ISA_NAME(norm_row)
#define run_op_list ISA_NAME(run_op_list)
#define attention_decode ISA_NAME(attention_decode)
#define attention_decode_scratch ISA_NAME(attention_decode_scratch)
#define cache_write_row ISA_NAME(cache_write_row)
#define pack_values_block ISA_NAME(pack_values_block)
#define attention_prompt_items ISA_NAME(attention_prompt_items)
#define attention_prompt_item ISA_NAME(attention_prompt_item)
#define attention_prompt_scratch ISA_NAME(attention_prompt_scratch)
#define draw_tokens ISA_NAME(draw_tokens)
#define mask_logits ISA_NAME(mask_logits)
#define score_rows ISA_NAME(score_rows)

/* A GEMM falls into work items: some panels of outputs for some rows. `scratch` holds gemm_scratch(op, rows) bytes;
 * gemm_item keeps converted rows there from item to item, so that its first 8 bytes are -1 before an op's first one. */
int64_t gemm_items(const struct op *op, int64_t rows);
int64_t gemm_scratch(const struct op *op, int64_t rows);
void gemm_item(const struct op *op, int64_t rows, int64_t item, void *scratch);

/* One row of RMS_NORM, HEAD_RMS_NORM, ADD_LAYER_NORM or SWIGLU. */
void norm_row(const struct op *op, int64_t row);

/* The decode rows: takes work items until none is left. The caller waits for counters[1 + rows] to reach rows. */
void attention_decode(const struct attention *a, void *scratch);
int64_t attention_decode_scratch(const struct attention *a);
/* One prompt row; one block of prompt_blocks; one work item. */
void cache_write_row(const struct attention *a, int64_t row);
void pack_values_block(const struct attention *a, int64_t block);
int64_t attention_prompt_items(const struct attention *a);
void attention_prompt_item(const struct attention *a, int64_t item, void *scratch);
int64_t attention_prompt_scratch(const struct attention *a);

/* Rows of logits: every thread of a team calls it with the same record, and takes rows until none is left. */
void draw_tokens(const struct draw *d);
void mask_logits(const struct mask *m);
void score_rows(const struct score *s);

/* All operations of a list; every thread of a team calls it with the same list. */
void run_op_list(const struct op_list *list);

/* A kernel that Python calls, in every thread of a team: the argument is the address of its record. */
struct kernel {
    const char *name;
    void (*run)(const void *record);
};

#endif
