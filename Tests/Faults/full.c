/* Preloaded into the source's QEMU: its writes to images fail with ENOSPC as long as the file XF_FULL is there. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>

static const char *mark;

__attribute__((constructor)) static void start(void) { mark = getenv("XF_FULL"); }

static int is_full(void) {
    if (!mark || access(mark, F_OK)) return 0;
    errno = ENOSPC;
    return 1;
}

#define FORWARD(name, vector, size)                                                  \
    ssize_t name(int fd, vector bytes, size count, off64_t offset) {                 \
        static ssize_t (*real)(int, vector, size, off64_t);                          \
        if (!real) real = (ssize_t(*)(int, vector, size, off64_t))(uintptr_t)dlsym(RTLD_NEXT, #name); \
        return is_full() ? -1 : real(fd, bytes, count, offset);                      \
    }

FORWARD(pwrite, const void *, size_t)
FORWARD(pwrite64, const void *, size_t)
FORWARD(pwritev, const struct iovec *, int)
FORWARD(pwritev64, const struct iovec *, int)
