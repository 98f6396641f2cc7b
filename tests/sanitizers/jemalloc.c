/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Stands in for libjemalloc.so.2 under valgrind, which replaces malloc and free but not
 * what else Debian's server takes from that library. */
#include <stdlib.h>
#include <string.h>

size_t nallocx(size_t size, int flags) {
    (void)flags;
    return size;
}

void sdallocx(void *memory, size_t size, int flags) {
    (void)size;
    (void)flags;
    free(memory);
}

void malloc_stats_print(void (*write)(void *, const char *), void *to, const char *options) {
    (void)write;
    (void)to;
    (void)options;
}

int mallctl(const char *name, void *old, size_t *old_length, void *new, size_t new_length) {
    (void)name;
    (void)new;
    (void)new_length;
    if (old && old_length)
        memset(old, 0, *old_length);
    return 0;
}
