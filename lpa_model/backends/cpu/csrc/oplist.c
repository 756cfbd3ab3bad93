/* The op list: the threads of a team take each operation's work items, and wait for its last one.
 *
 * An op's items fall into lanes, one for each thread. Those of a lane lie side by side in memory, and its thread takes
 * them one after another, so that what it prefetches is what it reads next. A lane that is left is shared by all.
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

static void run_op(const struct op_list *list, int64_t i, int64_t mine, void *scratch) {
    const struct op *op = &list->ops[i];
    int64_t lanes = list->lanes, *done = &list->counters[1 + i * (1 + lanes)], *taken = done + 1;
    if (op->kind == ATTENTION_DECODE) {
        const struct attention *a = op->x;
        if (!a->rows) return;
        attention_decode(a, scratch);
        wait_until(&a->counters[1 + a->rows], a->rows);
        return;
    }
    int64_t items = items_of(op, list->rows), count = 0;
    if (!items) return;
    *(int64_t *)scratch = -1;
    for (int64_t k = 0; k < lanes; k++) {
        int64_t lane = (mine + k) % lanes, first = lane * items / lanes, size = (lane + 1) * items / lanes - first;
        if (fetch(&taken[lane]) >= size) continue;
        for (int64_t item = fetch_add(&taken[lane]); item < size; item = fetch_add(&taken[lane])) {
            run_item(op, list->rows, first + item, scratch);
            count++;
        }
    }
    add_to(done, count);
    wait_until(done, items);
}

void run_op_list(const struct op_list *list) {
    int64_t bytes = CACHE_LINE;
    for (int64_t i = 0; i < list->num_ops; i++) bytes = max_i64(bytes, scratch_of(&list->ops[i], list->rows));
    void *scratch = aligned_alloc(CACHE_LINE, (size_t)(ceil_div(bytes, CACHE_LINE) * CACHE_LINE));
    if (!scratch) return; /* other threads do the work; if there is none, counters[0] says so */
    int64_t mine = fetch_add(&list->counters[0]) % list->lanes;
    tiles_configure();
    for (int64_t i = 0; i < list->num_ops; i++) run_op(list, i, mine, scratch);
    tiles_release();
    free(scratch);
}
