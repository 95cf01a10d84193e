/* Looks for the guest's records (deploy/guest/workload.c) in a disk image. */
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

enum { RECORD = 4096 };

static uint64_t fnv(const unsigned char *bytes, size_t count) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < count; i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
    return hash;
}

/* The first record out of first .. first + count - 1 that is not where it belongs with the checksum that the guest
 * printed, or that a later record has taken the place of too early; -1 when all are there, -2 when the image cannot be
 * read. */
int64_t xf_first_missing(const char *path, uint32_t disk, uint64_t first, uint64_t count, const uint64_t *sums,
                         uint64_t slots) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -2;
    unsigned char record[RECORD];
    int64_t missing = -1;
    for (uint64_t i = 0; i < count && missing < 0; i++) {
        uint64_t number = first + i, found, sum;
        uint32_t owner;
        missing = (int64_t)number;
        if (pread(fd, record, RECORD, (off_t)(number % slots) * RECORD) != RECORD) break;
        memcpy(&found, record + 8, 8);
        memcpy(&owner, record + 16, 4);
        memcpy(&sum, record + RECORD - 8, 8);
        if (memcmp(record, "XDRECORD", 8) || found != number || owner != disk) break;
        if (sum != sums[i] || fnv(record, RECORD - 8) != sum) break;
        missing = -1;
    }
    close(fd);
    return missing;
}
