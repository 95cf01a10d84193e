/* What the demo's guest does: numbered, checksummed records to a disk and to the console; or plain dirtying. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include <linux/fs.h>

enum { RECORD = 4096 };

static uint64_t fnv(const unsigned char *bytes, size_t count) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < count; i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
    return hash;
}

/* A record: magic, number, disk, a marker that must never be seen on the wire, filler, checksum of all before. */
static uint64_t make_record(unsigned char *record, uint64_t number, uint32_t disk) {
    memset(record, 0, RECORD);
    memcpy(record, "XDRECORD", 8);
    memcpy(record + 8, &number, 8);
    memcpy(record + 16, &disk, 4);
    strcpy((char *)record + 32, "CROSSDOCK-GUEST-DATA-MARKER");
    uint64_t state = number * 0x9e3779b97f4a7c15u + disk + 1;
    for (int i = 64; i + 8 <= RECORD - 8; i += 8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        memcpy(record + i, &state, 8);
    }
    uint64_t sum = fnv(record, RECORD - 8);
    memcpy(record + RECORD - 8, &sum, 8);
    return sum;
}

static int open_disk(const char *path, uint64_t *size) {
    int fd = open(path, O_RDWR | O_DIRECT | O_SYNC);
    if (fd < 0 || ioctl(fd, BLKGETSIZE64, size) < 0) {
        perror(path);
        exit(1);
    }
    return fd;
}

static int records(const char *path, uint32_t disk, unsigned interval) {
    uint64_t size;
    int fd = open_disk(path, &size);
    int console = open("/dev/console", O_WRONLY);
    unsigned char *record = aligned_alloc(RECORD, RECORD);
    /* The second half of the disk belongs to `fill`. */
    uint64_t slots = size / 2 / RECORD;
    for (uint64_t number = 0;; number++) {
        uint64_t sum = make_record(record, number, disk);
        if (pwrite(fd, record, RECORD, (off_t)(number % slots) * RECORD) != RECORD) {
            dprintf(console, "FAIL %u %llu\n", disk, (unsigned long long)number);
            return 1;
        }
        dprintf(console, "REC %u %llu %016llx\n", disk, (unsigned long long)number, (unsigned long long)sum);
        if (interval) usleep(interval);
    }
}

/* Writes so many MiB over and over, as fast as the disk takes them. */
static int fill(const char *path, unsigned megabytes) {
    uint64_t size;
    int fd = open_disk(path, &size);
    size_t piece = 1 << 20;
    unsigned char *buffer = aligned_alloc(RECORD, piece);
    uint64_t state = 1;
    for (;;) {
        for (unsigned i = 0; i < megabytes && size / 2 + (uint64_t)(i + 1) * piece <= size; i++) {
            for (size_t k = 0; k < piece; k += 512) {
                state = state * 6364136223846793005u + 1442695040888963407u;
                memcpy(buffer + k, &state, 8);
            }
            if (pwrite(fd, buffer, piece, (off_t)(size / 2 + (uint64_t)i * piece)) < 0) return 1;
        }
    }
}

/* Changes so many MiB of memory over and over: a word, and again so many bytes further on. */
_Noreturn static void dirty(unsigned megabytes, size_t stride) {
    size_t size = (size_t)megabytes << 20;
    /* Volatile: nobody reads it, and it must be written all the same. */
    volatile uint64_t *memory = malloc(size);
    uint64_t state = 1;
    for (;;) {
        for (size_t i = 0; i < size / sizeof *memory; i += stride / sizeof *memory) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            memory[i] = state;
        }
    }
}

int main(int argc, char **argv) {
    if (argc == 5 && !strcmp(argv[1], "records"))
        return records(argv[2], (uint32_t)atoi(argv[3]), (unsigned)atoi(argv[4]));
    if (argc == 4 && !strcmp(argv[1], "fill")) return fill(argv[2], (unsigned)atoi(argv[3]));
    if (argc == 3 && !strcmp(argv[1], "dirty")) dirty((unsigned)atoi(argv[2]), 64);
    /* What counts then is how many pages a guest writes that has little time. */
    if (argc == 3 && !strcmp(argv[1], "pages")) dirty((unsigned)atoi(argv[2]), 4096);
    return 2;
}
