/* The guest whose pauses are measured:
 *
 *     writer DISK MIB-A-SECOND-OF-DISK MIB-A-SECOND-OF-MEMORY MIB-OF-MEMORY
 *
 * Fills so much memory with random bytes. Then it rewrites pages of it all over the place, and pieces of the disk with an fsync after each;
 * and says once a second that it lives: BEAT NUMBER MIB-OF-DISK MIB-OF-MEMORY, so far. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, PIECE = 256 << 10 };

static uint64_t state = 88172645463325252u;

static uint64_t next(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static void fill(uint64_t *words, size_t bytes) {
    for (size_t i = 0; i < bytes / sizeof *words; i++) words[i] = next();
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* Sleeps until so many steps are due; what was missed is not made good, or a slow guest would do nothing else. */
static double pace(double due, double interval) {
    double time = now();
    if (time < due) usleep((useconds_t)((due - time) * 1e6));
    return due + interval > time - 1 ? due + interval : time;
}

static void write_disk(const char *path, double rate, _Atomic uint64_t *written) {
    static uint64_t piece[PIECE / sizeof(uint64_t)];
    int disk = open(path, O_RDWR);
    if (disk < 0) exit(1);
    off_t pieces = lseek(disk, 0, SEEK_END) / PIECE;
    double due = now();
    for (off_t at = 0;; at = (at + 1) % pieces) {
        due = pace(due, PIECE / rate / (1 << 20));
        fill(piece, PIECE);
        if (pwrite(disk, piece, PIECE, at * PIECE) != PIECE || fsync(disk)) {
            printf("FAIL disk\n");
            exit(1);
        }
        *written += PIECE;
    }
}

static void write_memory(unsigned char *memory, size_t pages, double rate, _Atomic uint64_t *written) {
    const int together = 64;
    double due = now();
    for (;;) {
        due = pace(due, together * PAGE / rate / (1 << 20));
        for (int i = 0; i < together; i++) fill((uint64_t *)(void *)(memory + next() % pages * PAGE), PAGE);
        *written += (uint64_t)together * PAGE;
    }
}

int main(int count, char **words) {
    if (count != 5) return 2;
    double disk_rate = atof(words[2]), memory_rate = atof(words[3]);
    size_t size = (size_t)atoi(words[4]) << 20;
    setvbuf(stdout, NULL, _IOLBF, 0);
    /* Shared, since who writes and who tells are processes of their own. */
    _Atomic uint64_t *written = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    unsigned char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (written == MAP_FAILED || memory == MAP_FAILED) return 1;
    fill((uint64_t *)(void *)memory, size);
    if (disk_rate > 0 && fork() == 0) write_disk(words[1], disk_rate, &written[0]);
    if (memory_rate > 0 && fork() == 0) write_memory(memory, size / PAGE, memory_rate, &written[1]);
    double due = now();
    for (unsigned number = 1; waitpid(-1, NULL, WNOHANG) == 0; number++) {
        due = pace(due, 1);
        printf("BEAT %u %llu %llu\n", number, (unsigned long long)written[0] >> 20, (unsigned long long)written[1] >> 20);
    }
    printf("FAIL a writer has ended\n");
    return 1;
}
