#include "kernels.h"
int64_t gemm_items(const struct op *op, int64_t rows) { return 0; }
int64_t gemm_scratch(const struct op *op, int64_t rows) { return 0; }
void gemm_item(const struct op *op, int64_t rows, int64_t item, void *scratch) {}
