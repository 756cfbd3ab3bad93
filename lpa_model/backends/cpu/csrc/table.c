/* What Python finds of one instruction set: names and functions, the last one without a name. */
#include "kernels.h"

static void run_op_list_entry(const void *record) { run_op_list(record); }
static void draw_tokens_entry(const void *record) { draw_tokens(record); }
static void mask_logits_entry(const void *record) { mask_logits(record); }
static void score_rows_entry(const void *record) { score_rows(record); }

#define kernel_table ISA_NAME(lpa_kernels)
__attribute__((visibility("default"))) const struct kernel kernel_table[];
__attribute__((visibility("default"))) const struct kernel kernel_table[] = {
    {"run_op_list", run_op_list_entry},
    {"draw_tokens", draw_tokens_entry},
    {"mask_logits", mask_logits_entry},
    {"score_rows", score_rows_entry},
    {0, 0},
};
