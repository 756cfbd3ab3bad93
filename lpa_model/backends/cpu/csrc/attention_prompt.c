#include "kernels.h"
void cache_write_row(const struct attention *a, int64_t row) {}
void pack_values_block(const struct attention *a, int64_t block) {}
int64_t attention_prompt_items(const struct attention *a) { return 0; }
int64_t attention_prompt_scratch(const struct attention *a) { return 0; }
void attention_prompt_item(const struct attention *a, int64_t item, void *scratch) {}
