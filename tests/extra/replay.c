/* Runs saved steps (saved_step.py) on another processor: `replay` prints the instruction sets that the processor has,
 * `replay SET BEFORE AFTER` runs the steps of the file BEFORE and writes to AFTER what memory holds then.
 *
 * Everything is int64, little-endian. A step is its number of regions, their addresses and sizes; its number of
 * pointers, and each one's region and offset; and the bytes of the regions. The first region is the op list's record.
 * Here each region ends at a page that may not be touched, and its pointers are those to the regions' new places; a
 * pointer to none of them becomes 0.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "kernels.h"

#define SETS(each) each(scalar) each(neon) each(dotprod) each(i8mm) each(neonbf16)
#define DECLARE(name) extern const struct kernel lpa_kernels_##name[];
#define ENTRY(name) {#name, lpa_kernels_##name},

SETS(DECLARE)
int64_t lpa_supports(const char *name);

static const struct {
    const char *name;
    const struct kernel *kernels;
} sets[] = {SETS(ENTRY)};

enum { PAGE = 1 << 16 };

struct region {
    int64_t address, bytes;
    char *here;
};

static void fail(const char *what) {
    fprintf(stderr, "replay: %s\n", what);
    exit(2);
}

static int read_numbers(FILE *file, int64_t *numbers, int64_t count) {
    return fread(numbers, sizeof *numbers, (size_t)count, file) == (size_t)count;
}

static char *guarded(int64_t bytes) {
    int64_t whole = (bytes + PAGE - 1) / PAGE * PAGE;
    char *pages = mmap(0, (size_t)(whole + PAGE), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mprotect(pages + whole, PAGE, PROT_NONE)) fail("no memory");
    return pages + whole - bytes;
}

static int64_t moved(const struct region *regions, int64_t count, int64_t address) {
    for (int64_t i = 0; i < count; i++)
        if (address >= regions[i].address && address < regions[i].address + regions[i].bytes)
            return (int64_t)(intptr_t)regions[i].here + address - regions[i].address;
    return 0;
}

/* 0 at the end of the file. */
static int replay(FILE *before, FILE *after, void (*run)(const void *)) {
    int64_t count, pointers;
    if (!read_numbers(before, &count, 1)) return 0;
    struct region *regions = calloc((size_t)count, sizeof *regions);
    if (!regions) fail("no memory");
    for (int64_t i = 0; i < count; i++)
        if (!read_numbers(before, &regions[i].address, 2)) fail("a step without its end");
    if (!read_numbers(before, &pointers, 1)) fail("a step without its end");
    int64_t(*places)[2] = calloc((size_t)pointers, sizeof *places);
    if (!places || !read_numbers(before, places[0], 2 * pointers)) fail("a step without its end");
    for (int64_t i = 0; i < count; i++) {
        regions[i].here = guarded(regions[i].bytes);
        if (fread(regions[i].here, 1, (size_t)regions[i].bytes, before) != (size_t)regions[i].bytes)
            fail("a step without its end");
    }
    for (int64_t i = 0; i < pointers; i++) {
        char *at = regions[places[i][0]].here + places[i][1];
        int64_t address;
        memcpy(&address, at, sizeof address);
        address = moved(regions, count, address);
        memcpy(at, &address, sizeof address);
    }
    run(regions[0].here);
    for (int64_t i = 0; i < count; i++) {
        fwrite(regions[i].here, 1, (size_t)regions[i].bytes, after);
        int64_t whole = (regions[i].bytes + PAGE - 1) / PAGE * PAGE;
        munmap(regions[i].here + regions[i].bytes - whole, (size_t)(whole + PAGE));
    }
    free(places);
    free(regions);
    return 1;
}

int main(int argc, char **argv) {
    int64_t count = sizeof sets / sizeof *sets;
    if (argc == 1) {
        for (int64_t i = 0; i < count; i++)
            if (lpa_supports(sets[i].name)) puts(sets[i].name);
        return 0;
    }
    const struct kernel *kernel = 0;
    for (int64_t i = 0; i < count && argc == 4; i++)
        if (!strcmp(sets[i].name, argv[1])) kernel = sets[i].kernels;
    while (kernel && kernel->name && strcmp(kernel->name, "run_op_list")) kernel++;
    if (!kernel || !kernel->name) fail("usage: replay [SET BEFORE AFTER]");
    FILE *before = fopen(argv[2], "rb"), *after = fopen(argv[3], "wb");
    if (!before || !after) fail("no file");
    while (replay(before, after, kernel->run)) continue;
    return fclose(after) ? 2 : 0;
}
