/* Preloaded into Crossdock's processes: stops, or lets fail, chosen calls, and steps their clock.
 *
 * XF_TABLE names a file of rules that the harness shares with all processes; it may change them at any time. In every
 * program but crossdock the calls go straight through. libfaketime cannot be used for the clock: it changes the
 * environment before main, and then Swift does not find its arguments.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* shim.py knows these numbers and the layout of the table. */
enum { MAGIC = 0x58464c31, RULES = 16, TEXT = 128 };
enum call { WRITE, SEND, PWRITE, SYNC, RENAME, TRUNCATE, ALLOCATE, SIGNAL, CALLS };
enum state { OFF, ARMED, REACHED };
enum action { GATE = 1, FAIL, DIE };

struct rule {
    int32_t state, action, call, after;
    int32_t error; /* of FAIL */
    int32_t skip;  /* how many matches pass first */
    int32_t left;  /* how often it acts; -1 for ever */
    int32_t hits;  /* how often it has acted */
    int32_t pid, thread;
    char role[TEXT]; /* the subcommand */
    char path[TEXT]; /* a part of the path behind the descriptor */
    char text[TEXT]; /* a part of what is written; for SYNC, of what was last written to the descriptor */
};

struct table {
    uint32_t magic;
    int32_t harness;
    int64_t steps[2]; /* seconds by which the clocks of the source and of the destination are wrong */
    struct rule rules[RULES];
};

static struct table *table;
static char role[TEXT];
static int trace = -1;

enum { KEPT = 512, FIRST = 4096 };
static char last[KEPT][TEXT];

static void *next(const char *name) { return dlsym(RTLD_NEXT, name); }

#define REAL(type, name, ...)                                            \
    static type (*real)(__VA_ARGS__);                                    \
    if (!real) real = (type(*)(__VA_ARGS__))(uintptr_t)next(name)

__attribute__((constructor)) static void start(void) {
    char path[4096], line[4096];
    ssize_t count = readlink("/proc/self/exe", path, sizeof path - 1);
    if (count <= 0) return;
    path[count] = 0;
    const char *name = strrchr(path, '/');
    if (!name || strcmp(name, "/crossdock")) return;
    int fd = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        count = read(fd, line, sizeof line - 1);
        close(fd);
        if (count > 0) {
            line[count] = 0;
            size_t first = strlen(line) + 1;
            if ((ssize_t)first < count) snprintf(role, sizeof role, "%s", line + first);
        }
    }
    const char *log = getenv("XF_TRACE");
    if (log) trace = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    const char *file = getenv("XF_TABLE");
    if (!file || (fd = open(file, O_RDWR | O_CLOEXEC)) < 0) return;
    struct table *mapped = mmap(NULL, sizeof *mapped, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped != MAP_FAILED && mapped->magic == MAGIC) table = mapped;
}

/* What is behind a descriptor: a path, for a Unix socket too; "tcp" for other sockets. */
static void describe(int fd, char *path, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t count = readlink(link, path, size - 1);
    path[count > 0 ? count : 0] = 0;
    if (strncmp(path, "socket:", 7)) return;
    struct sockaddr_un address = {0};
    socklen_t length = sizeof address;
    if (getpeername(fd, (struct sockaddr *)&address, &length) < 0 || address.sun_family != AF_UNIX) {
        snprintf(path, size, "tcp");
        return;
    }
    if (!address.sun_path[0]) {
        /* The peer has no name: it has connected to a socket of ours. */
        memset(&address, 0, sizeof address);
        length = sizeof address;
        (void)getsockname(fd, (struct sockaddr *)&address, &length);
    }
    snprintf(path, size, "%s", address.sun_path);
}

static int contains(const char *bytes, size_t length, const char *text) {
    return !text[0] || (bytes && memmem(bytes, length < FIRST ? length : FIRST, text, strlen(text)) != NULL);
}

/* Waits until the harness lets go, or is gone. */
static void park(struct rule *rule) {
    struct timespec pause = {0, 1000000};
    rule->pid = getpid();
    rule->thread = (int32_t)syscall(SYS_gettid);
    __atomic_store_n(&rule->state, REACHED, __ATOMIC_SEQ_CST);
    for (unsigned i = 1; __atomic_load_n(&rule->state, __ATOMIC_SEQ_CST) == REACHED; i++) {
        syscall(SYS_nanosleep, &pause, NULL);
        if (i % 512 == 0 && syscall(SYS_kill, table->harness, 0) < 0) return;
    }
}

static void note(enum call call, const char *path, const char *bytes, size_t length) {
    static const char *names[CALLS] = {"write", "send", "pwrite", "sync", "rename", "truncate", "allocate", "signal"};
    char line[700];
    int count = snprintf(line, sizeof line, "%s %s %s %zu ", role, names[call], path, length);
    for (size_t i = 0; bytes && i < length && i < 200 && count < 690; i++)
        line[count++] = bytes[i] >= 32 && bytes[i] < 127 ? bytes[i] : '.';
    line[count++] = '\n';
    syscall(SYS_write, trace, line, count);
}

/* Acts on the rules that match. Returns the error with which the call shall fail; 0 when it shall be made. */
static int check(enum call call, int after, int fd, const char *name, const char *bytes, size_t length) {
    if (!table && trace < 0) return 0;
    int saved = errno, result = 0;
    char path[4200];
    int described = 0;
    if (trace >= 0 && !after && length != 8) {
        if (!name) describe(fd, path, sizeof path);
        note(call, name ? name : path, bytes, length);
    }
    if (call == SYNC && fd >= 0 && fd < KEPT) {
        bytes = last[fd];
        length = strnlen(bytes, TEXT);
    }
    if (call == WRITE && !after && fd >= 0 && fd < KEPT && length > 8) {
        size_t count = length < TEXT - 1 ? length : TEXT - 1;
        memcpy(last[fd], bytes, count);
        last[fd][count] = 0;
    }
    for (int i = 0; table && i < RULES; i++) {
        struct rule *rule = &table->rules[i];
        if (__atomic_load_n(&rule->state, __ATOMIC_SEQ_CST) != ARMED) continue;
        if (rule->call != (int)call || rule->after != after || (rule->role[0] && strcmp(rule->role, role))) continue;
        if (!contains(bytes, length, rule->text)) continue;
        if (rule->path[0]) {
            if (name) {
                if (!strstr(name, rule->path)) continue;
            } else {
                if (!described) describe(fd, path, sizeof path);
                described = 1;
                if (!strstr(path, rule->path)) continue;
            }
        }
        if (__atomic_fetch_sub(&rule->skip, 1, __ATOMIC_SEQ_CST) > 0) continue;
        if (rule->left == 0) continue;
        if (rule->left > 0 && __atomic_fetch_sub(&rule->left, 1, __ATOMIC_SEQ_CST) <= 0) continue;
        __atomic_fetch_add(&rule->hits, 1, __ATOMIC_SEQ_CST);
        switch (rule->action) {
        case GATE: park(rule); break;
        case FAIL: result = rule->error; break;
        case DIE: syscall(SYS_kill, getpid(), SIGKILL); break;
        }
    }
    errno = saved;
    return result;
}

/* Checks, calls, checks again. */
#define AROUND(call, fd, name, bytes, length, type, invocation)        \
    do {                                                               \
        int error = check(call, 0, fd, name, bytes, length);           \
        if (error) {                                                   \
            errno = error;                                             \
            return -1;                                                 \
        }                                                              \
        type result = invocation;                                      \
        if (result >= 0) check(call, 1, fd, name, bytes, length);      \
        return result;                                                 \
    } while (0)

static const char *start_of(const struct iovec *vectors, int count, size_t *length) {
    *length = count > 0 ? vectors[0].iov_len : 0;
    return count > 0 ? vectors[0].iov_base : NULL;
}

ssize_t write(int fd, const void *bytes, size_t count) {
    REAL(ssize_t, "write", int, const void *, size_t);
    AROUND(WRITE, fd, NULL, bytes, count, ssize_t, real(fd, bytes, count));
}

ssize_t writev(int fd, const struct iovec *vectors, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    size_t length;
    const char *bytes = start_of(vectors, count, &length);
    AROUND(WRITE, fd, NULL, bytes, length, ssize_t, real(fd, vectors, count));
}

ssize_t send(int fd, const void *bytes, size_t count, int flags) {
    REAL(ssize_t, "send", int, const void *, size_t, int);
    AROUND(SEND, fd, NULL, bytes, count, ssize_t, real(fd, bytes, count, flags));
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    REAL(ssize_t, "sendmsg", int, const struct msghdr *, int);
    size_t length;
    const char *bytes = start_of(message->msg_iov, (int)message->msg_iovlen, &length);
    AROUND(SEND, fd, NULL, bytes, length, ssize_t, real(fd, message, flags));
}

ssize_t pwrite(int fd, const void *bytes, size_t count, off_t offset) {
    REAL(ssize_t, "pwrite", int, const void *, size_t, off_t);
    AROUND(PWRITE, fd, NULL, bytes, count, ssize_t, real(fd, bytes, count, offset));
}

ssize_t pwritev(int fd, const struct iovec *vectors, int count, off_t offset) {
    REAL(ssize_t, "pwritev", int, const struct iovec *, int, off_t);
    AROUND(PWRITE, fd, NULL, NULL, 0, ssize_t, real(fd, vectors, count, offset));
}

ssize_t pwritev2(int fd, const struct iovec *vectors, int count, off_t offset, int flags) {
    REAL(ssize_t, "pwritev2", int, const struct iovec *, int, off_t, int);
    AROUND(PWRITE, fd, NULL, NULL, 0, ssize_t, real(fd, vectors, count, offset, flags));
}

int fsync(int fd) {
    REAL(int, "fsync", int);
    AROUND(SYNC, fd, NULL, NULL, 0, int, real(fd));
}

int fdatasync(int fd) {
    REAL(int, "fdatasync", int);
    AROUND(SYNC, fd, NULL, NULL, 0, int, real(fd));
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    AROUND(RENAME, -1, from, to, strlen(to), int, real(from, to));
}

int renameat(int from_directory, const char *from, int to_directory, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *);
    AROUND(RENAME, -1, from, to, strlen(to), int, real(from_directory, from, to_directory, to));
}

int renameat2(int from_directory, const char *from, int to_directory, const char *to, unsigned flags) {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned);
    AROUND(RENAME, -1, from, to, strlen(to), int, real(from_directory, from, to_directory, to, flags));
}

static void read_line(const char *path, const char *key, char *line, size_t size) {
    char text[1024];
    line[0] = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return;
    ssize_t count = read(fd, text, sizeof text - 1);
    close(fd);
    if (count <= 0) return;
    text[count] = 0;
    const char *found = strstr(text, key);
    if (found) snprintf(line, size, "%.*s", (int)strcspn(found + strlen(key), "\n"), found + strlen(key));
}

/* A signal has no path: its number and the name of the program that gets it stand for that, "signal:19 qemu-system-x86". */
static const char *name_of_signal(long number, long process, int is_pidfd) {
    static _Thread_local char name[64];
    char path[64], line[32];
    if (is_pidfd) {
        snprintf(path, sizeof path, "/proc/self/fdinfo/%ld", process);
        read_line(path, "Pid:", line, sizeof line);
        process = atol(line);
    }
    snprintf(path, sizeof path, "/proc/%ld/comm", process < 0 ? -process : process);
    read_line(path, "", line, sizeof line);
    snprintf(name, sizeof name, "signal:%ld %s", number, line);
    return name;
}

int kill(pid_t process, int number) {
    REAL(int, "kill", pid_t, int);
    if (!number) return real(process, number);
    const char *name = name_of_signal(number, process, 0);
    AROUND(SIGNAL, -1, name, NULL, 0, int, real(process, number));
}

/* The C library has no name for a signal through a pidfd in all of its releases, so programs make the system call. */
long syscall(long number, ...) {
    REAL(long, "syscall", long, ...);
    long words[6];
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; i++) words[i] = va_arg(list, long);
    va_end(list);
    if (number != SYS_pidfd_send_signal || !words[1])
        return real(number, words[0], words[1], words[2], words[3], words[4], words[5]);
    const char *name = name_of_signal(words[1], words[0], 1);
    AROUND(SIGNAL, -1, name, NULL, 0, long, real(number, words[0], words[1], words[2], words[3], words[4], words[5]));
}

int ftruncate(int fd, off_t length) {
    REAL(int, "ftruncate", int, off_t);
    AROUND(TRUNCATE, fd, NULL, NULL, 0, int, real(fd, length));
}

int fallocate(int fd, int mode, off_t offset, off_t length) {
    REAL(int, "fallocate", int, int, off_t, off_t);
    AROUND(ALLOCATE, fd, NULL, NULL, 0, int, real(fd, mode, offset, length));
}

/* The monotonic clock stays: a step of the time of day does not touch it. */
static time_t step(void) {
    if (!table) return 0;
    return (time_t)__atomic_load_n(&table->steps[!strcmp(role, "destination")], __ATOMIC_SEQ_CST);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(int, "clock_gettime", clockid_t, struct timespec *);
    int result = real(clock, now);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += step();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    REAL(int, "gettimeofday", struct timeval *, void *);
    int result = real(now, zone);
    if (result == 0) now->tv_sec += step();
    return result;
}

time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result) *result = now.tv_sec;
    return now.tv_sec;
}
