/* The op list: the threads of a team take each operation's work items, and wait for its last one.
 *
 * The caller waits for work items, never for threads: a thread that starts late, or never, has its share done by the
 * others. Which thread computes an item changes no bit of it.
 */
#include <stdlib.h>
#include <unistd.h>

#include "kernels.h"
#include "tiles.h"

enum { SPINS = 1000 }; /* about 50 microseconds */

/* Other threads finish what they have taken in microseconds, unless the system has stopped them: then they get this
 * thread's core. */
static void wait_until(const int64_t *counter, int64_t count) {
    for (int64_t spins = 0; fetch(counter) < count; spins++) {
        if (spins < SPINS)
            pause_core();
        else
            usleep(20);
    }
}

static int64_t items_of(const struct op *op, int64_t rows) {
    const struct attention *a = op->x;
    switch (op->kind) {
    case GEMM:
        return gemm_items(op, rows);
    case CACHE_WRITE:
        return a->prompt_rows;
    case PACK_VALUES:
        return a->prompt_blocks;
    case ATTENTION_PROMPT:
        return attention_prompt_items(a);
    default:
        return rows;
    }
}

static int64_t scratch_of(const struct op *op, int64_t rows) {
    const struct attention *a = op->x;
    switch (op->kind) {
    case GEMM:
        return gemm_scratch(op, rows);
    case ATTENTION_DECODE:
        return a->rows ? attention_decode_scratch(a) : 0;
    case ATTENTION_PROMPT:
        return a->prompt_rows ? attention_prompt_scratch(a) : 0;
    default:
        return 0;
    }
}

static void run_item(const struct op *op, int64_t rows, int64_t item, void *scratch) {
    switch (op->kind) {
    case GEMM:
        gemm_item(op, rows, item, scratch);
        break;
    case CACHE_WRITE:
        cache_write_row(op->x, item);
        break;
    case PACK_VALUES:
        pack_values_block(op->x, item);
        break;
    case ATTENTION_PROMPT:
        attention_prompt_item(op->x, item, scratch);
        break;
    default:
        norm_row(op, item);
    }
}

static void run_op(const struct op_list *list, int64_t i, void *scratch) {
    const struct op *op = &list->ops[i];
    int64_t *taken = &list->counters[1 + 2 * i], *done = taken + 1;
    if (op->kind == ATTENTION_DECODE) {
        const struct attention *a = op->x;
        if (!a->rows) return;
        attention_decode(a, scratch);
        wait_until(&a->counters[1 + a->rows], a->rows);
        return;
    }
    int64_t items = items_of(op, list->rows);
    if (!items) return;
    *(int64_t *)scratch = -1;
    for (int64_t item = fetch_add(taken); item < items; item = fetch_add(taken)) {
        run_item(op, list->rows, item, scratch);
        fetch_add(done);
    }
    wait_until(done, items);
}

void run_op_list(const struct op_list *list) {
    int64_t bytes = CACHE_LINE;
    for (int64_t i = 0; i < list->num_ops; i++) bytes = max_i64(bytes, scratch_of(&list->ops[i], list->rows));
    void *scratch = aligned_alloc(CACHE_LINE, (size_t)(ceil_div(bytes, CACHE_LINE) * CACHE_LINE));
    if (!scratch) return; /* other threads do the work; if there is none, counters[0] says so */
    fetch_add(&list->counters[0]);
    tiles_configure();
    for (int64_t i = 0; i < list->num_ops; i++) run_op(list, i, scratch);
    tiles_release();
    free(scratch);
}
