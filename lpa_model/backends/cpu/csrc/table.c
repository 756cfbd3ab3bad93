/* What Python finds of one instruction set: names and functions, the last one without a name. */
#include "kernels.h"

static void run_op_list_entry(const void *record) { run_op_list(record); }

#define kernel_table ISA_NAME(lpa_kernels)
__attribute__((visibility("default"))) const struct kernel kernel_table[];
__attribute__((visibility("default"))) const struct kernel kernel_table[] = {
    {"run_op_list", run_op_list_entry},
    {0, 0},
};
