#define _GNU_SOURCE
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/sock_diag.h>
#include <linux/unix_diag.h>
#include <sys/timex.h>
#include <sys/mman.h>
#include "CLinux.h"
#include "Confinement.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <linux/openat2.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <linux/vm_sockets.h>
#include <malloc.h>
#include <poll.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <linux/magic.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

int xd_epoll_create(void) { return epoll_create1(EPOLL_CLOEXEC); }

static int epoll_add(int epoll, int fd, uint64_t data, uint32_t flags) {
    struct epoll_event event = {.events = flags, .data.u64 = data};
    return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
}

int xd_epoll_add(int epoll, int fd, uint64_t data) {
    return epoll_add(epoll, fd, data, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET);
}

int xd_epoll_add_level(int epoll, int fd, uint64_t data) { return epoll_add(epoll, fd, data, EPOLLIN); }

int xd_epoll_remove(int epoll, int fd) {
    struct epoll_event event = {0};
    return epoll_ctl(epoll, EPOLL_CTL_DEL, fd, &event);
}

static void convert(const struct epoll_event *raw, xd_event *events, int count) {
    for (int i = 0; i < count; i++) {
        uint32_t flags = 0;
        if (raw[i].events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) flags |= XD_READABLE;
        if (raw[i].events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) flags |= XD_WRITABLE;
        if (raw[i].events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) flags |= XD_HANGUP;
        events[i].data = raw[i].data.u64;
        events[i].flags = flags;
    }
}

int xd_epoll_wait(int epoll, xd_event *events, int capacity, int timeout_ms) {
    struct epoll_event raw[64];
    if (capacity > 64) capacity = 64;
    int count = epoll_wait(epoll, raw, capacity, timeout_ms);
    convert(raw, events, count);
    return count;
}

static int64_t monotonic_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

int xd_epoll_spin(int epoll, xd_event *events, int capacity, int64_t nanoseconds) {
    struct epoll_event raw[64];
    if (capacity > 64) capacity = 64;
    int64_t end = monotonic_ns() + nanoseconds;
    do {
        int count = epoll_wait(epoll, raw, capacity, 0);
        if (count != 0) {
            convert(raw, events, count);
            return count;
        }
        sched_yield();
    } while (monotonic_ns() < end);
    return 0;
}

int xd_eventfd(void) { return eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK); }

int xd_eventfd_signal(int fd) {
    uint64_t one = 1;
    return write(fd, &one, sizeof one) == sizeof one ? 0 : -1;
}

int xd_eventfd_drain(int fd) {
    uint64_t value;
    return read(fd, &value, sizeof value) == sizeof value ? 0 : -1;
}

int xd_accept(int fd, void *peer, uint32_t *length) {
    return accept4(fd, peer, length, SOCK_CLOEXEC | SOCK_NONBLOCK);
}
int xd_socket(int domain, int type) { return socket(domain, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0); }
int xd_socketpair(int descriptors[2]) {
    return socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, descriptors);
}

static int unix_address(const char *path, struct sockaddr_un *address) {
    memset(address, 0, sizeof *address);
    address->sun_family = AF_UNIX;
    if (strlen(path) >= sizeof address->sun_path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(address->sun_path, path);
    return 0;
}

int xd_unix_connect(int fd, const char *path) {
    struct sockaddr_un address;
    if (unix_address(path, &address) < 0) return -1;
    return connect(fd, (struct sockaddr *)&address, sizeof address);
}

int xd_unix_bind(int fd, const char *path) {
    struct sockaddr_un address;
    if (unix_address(path, &address) < 0) return -1;
    /* The socket's permissions follow the umask at bind time. */
    mode_t old = umask(0177);
    int result = bind(fd, (struct sockaddr *)&address, sizeof address);
    int saved = errno;
    umask(old);
    errno = saved;
    return result;
}

int xd_unix_sockets_of_file(uint64_t file, uint64_t *sockets, int capacity) {
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
    if (fd < 0) return -1;
    struct {
        struct nlmsghdr header;
        struct unix_diag_req request;
    } question = {
        .header = {.nlmsg_len = sizeof question, .nlmsg_type = SOCK_DIAG_BY_FAMILY, .nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP},
        .request = {.sdiag_family = AF_UNIX, .udiag_states = ~0u, .udiag_show = UDIAG_SHOW_VFS},
    };
    int count = send(fd, &question, sizeof question, 0) < 0 ? -1 : 0;
    while (count >= 0) {
        _Alignas(struct nlmsghdr) char answer[32768];
        ssize_t length = recv(fd, answer, sizeof answer, 0);
        if (length <= 0) {
            if (length < 0 && errno == EINTR) continue;
            count = -1;
            break;
        }
        int done = 0;
        for (struct nlmsghdr *h = (struct nlmsghdr *)answer; NLMSG_OK(h, length); h = NLMSG_NEXT(h, length)) {
            if (h->nlmsg_type == NLMSG_DONE) done = 1;
            if (h->nlmsg_type == NLMSG_ERROR) {
                errno = EOPNOTSUPP;
                count = -1;
                done = 1;
            }
            if (done) break;
            struct unix_diag_msg *message = NLMSG_DATA(h);
            int rest = (int)h->nlmsg_len - (int)NLMSG_LENGTH(sizeof *message);
            for (struct rtattr *a = (struct rtattr *)(message + 1); RTA_OK(a, rest); a = RTA_NEXT(a, rest)) {
                if (a->rta_type != UNIX_DIAG_VFS) continue;
                struct unix_diag_vfs *where = RTA_DATA(a);
                /* The kernel gives the lower half of the number only. */
                if (where->udiag_vfs_ino != (uint32_t)file) continue;
                if (count < capacity) sockets[count] = message->udiag_ino;
                count++;
            }
        }
        if (done) break;
    }
    int saved = errno;
    close(fd);
    errno = saved;
    return count;
}

int xd_peer_credentials(int fd, pid_t *pid, uid_t *uid) {
    struct ucred credentials;
    socklen_t length = sizeof credentials;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &length) < 0) return -1;
    *pid = credentials.pid;
    *uid = credentials.uid;
    return 0;
}

int xd_has_untaken(int fd) {
    int bytes = 0;
    return ioctl(fd, TIOCOUTQ, &bytes) == 0 && bytes > 0;
}

void xd_block_sigpipe(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
}

void xd_thread_name(const char *name) { pthread_setname_np(pthread_self(), name); }

ssize_t xd_preadv_nowait(int fd, const void *iov, int count, off_t offset) {
    return preadv2(fd, iov, count, offset, RWF_NOWAIT);
}

ssize_t xd_pwritev_nowait(int fd, const void *iov, int count, off_t offset) {
    return pwritev2(fd, iov, count, offset, RWF_NOWAIT);
}

int xd_punch_hole(int fd, off_t offset, off_t length) {
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
}

int xd_zero_range(int fd, off_t offset, off_t length) {
    return fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length);
}

int xd_reserve(int fd, off_t length) { return fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, length); }

off_t xd_seek_data(int fd, off_t offset) { return lseek(fd, offset, SEEK_DATA); }
off_t xd_seek_hole(int fd, off_t offset) { return lseek(fd, offset, SEEK_HOLE); }

int xd_is_tmpfs(int fd) {
    struct statfs status;
    return fstatfs(fd, &status) == 0 && (status.f_type == TMPFS_MAGIC || status.f_type == RAMFS_MAGIC);
}

int xd_open_create_exclusive(const char *path) {
    return open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
}

int xd_o_direct(void) { return O_DIRECT; }
/* Linux gives each thread its own value, whatever POSIX says. */
void xd_yield_to_others(int niceness) { setpriority(PRIO_PROCESS, 0, niceness); }
int xd_memory_file(const char *name) { return memfd_create(name, MFD_CLOEXEC); }

int xd_direct_block(int fd) {
    int size = 0;
    if (ioctl(fd, BLKSSZGET, &size) == 0) return size;
    return 4096;
}

int xd_is_rotational(int fd) {
    unsigned short value = 0;
    return ioctl(fd, BLKROTATIONAL, &value) == 0 && value != 0;
}

int xd_block_device_size(int fd, uint64_t *size) { return ioctl(fd, BLKGETSIZE64, size); }

int xd_is_block_device(int fd) {
    struct stat status;
    return fstat(fd, &status) == 0 && S_ISBLK(status.st_mode);
}

static struct flock ofd_range(off_t offset, off_t length, int exclusive) {
    struct flock lock = {0};
    lock.l_type = exclusive ? F_WRLCK : F_RDLCK;
    lock.l_whence = SEEK_SET;
    lock.l_start = offset;
    lock.l_len = length;
    return lock;
}

int xd_lock_ofd(int fd, off_t offset, off_t length, int exclusive) {
    struct flock lock = ofd_range(offset, length, exclusive);
    return fcntl(fd, F_OFD_SETLK, &lock);
}

int xd_unlock_ofd(int fd, off_t offset, off_t length) {
    struct flock lock = ofd_range(offset, length, 0);
    lock.l_type = F_UNLCK;
    return fcntl(fd, F_OFD_SETLK, &lock);
}

int xd_test_ofd(int fd, off_t offset, off_t length, int exclusive) {
    struct flock lock = ofd_range(offset, length, exclusive);
    if (fcntl(fd, F_OFD_GETLK, &lock) < 0) return -1;
    return lock.l_type == F_UNLCK ? 0 : 1;
}

int xd_flock_exclusive(int fd) { return flock(fd, LOCK_EX | LOCK_NB); }

uint64_t xd_free_bytes(const char *path) {
    struct statvfs status;
    if (statvfs(path, &status) < 0) return 0;
    return (uint64_t)status.f_bavail * status.f_frsize;
}

uint64_t xd_total_bytes(const char *path) {
    struct statvfs status;
    if (statvfs(path, &status) < 0) return 0;
    return (uint64_t)(status.f_blocks - status.f_bfree + status.f_bavail) * status.f_frsize;
}

int xd_is_memory_file_system(const char *path) {
    struct statfs status;
    return statfs(path, &status) == 0 && status.f_type == TMPFS_MAGIC;
}

int xd_is_huge_page_file_system(const char *path) {
    struct statfs status;
    return statfs(path, &status) == 0 && status.f_type == HUGETLBFS_MAGIC;
}

int xd_is_zero(const void *bytes, size_t length) {
    const unsigned char *cursor = bytes;
    if (length == 0) return 1;
    if (cursor[0] != 0) return 0;
    return memcmp(cursor, cursor + 1, length - 1) == 0;
}

static void reset_signals(void) {
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    for (int number = 1; number < 32; number++) signal(number, SIG_DFL);
}

static int kept(int fd, const int *keep, int count) {
    for (int i = 0; i < count; i++)
        if (keep[i] == fd) return 1;
    return 0;
}

static void close_others(const int *keep, int count) {
    int last = 2;
    for (int i = 0; i < count; i++)
        if (keep[i] > last) last = keep[i];
    for (int fd = 3; fd <= last; fd++)
        if (!kept(fd, keep, count)) close(fd);
    close_range(last + 1, ~0U, 0);
}

static void run_child(char *const argv[], char *const envp[], const char *directory, int in, int out, int err,
                      const int *keep, int keep_count, int report, pid_t parent, const xd_confinement *confinement) {
    reset_signals();
    /* The sources may overlap 0..2, so they are moved out of the way first. */
    int a = fcntl(in, F_DUPFD, 64), b = fcntl(out, F_DUPFD, 64), c = fcntl(err, F_DUPFD, 64);
    int r = fcntl(report, F_DUPFD_CLOEXEC, 64);
    dup2(a, 0);
    dup2(b, 1);
    dup2(c, 2);
    int all[XD_MAX_KEPT + 2];
    int count = 0;
    int step = 0;
    /* Where the descriptors of the standard streams do not reach. */
    int rules = confinement && confinement->landlock >= 0 ? fcntl(confinement->landlock, F_DUPFD_CLOEXEC, 64) : -1;
    if (rules >= 0) all[count++] = rules;
    for (int i = 0; i < keep_count && count < XD_MAX_KEPT; i++) {
        fcntl(keep[i], F_SETFD, 0);
        all[count++] = keep[i];
    }
    all[count++] = r;
    close_others(all, count);
    if (directory && chdir(directory) < 0) goto fail;
    if (confinement && (step = xd_confine_process(confinement)) != 0) goto fail;
    if (parent) {
        /* Not earlier: a change of user forgets it. */
        prctl(PR_SET_PDEATHSIG, SIGTERM);
        if (getppid() != parent) _exit(127);
    }
    if (confinement && (step = xd_confine_files(rules)) != 0) goto fail;
    execvpe(argv[0], argv, envp);
fail:;
    int message[3] = {-2, step, errno};
    (void)!write(r, message, sizeof message);
    _exit(127);
}

static pid_t spawn(char *const argv[], char *const envp[], const char *directory, int in, int out, int err,
                   const int *keep, int keep_count, int detached, int bound, const xd_confinement *confinement, int *step) {
    int report[2];
    if (step) *step = 0;
    pid_t parent = bound ? getpid() : 0;
    if (pipe2(report, O_CLOEXEC) < 0) return -1;
    pid_t child = fork();
    if (child < 0) {
        close(report[0]);
        close(report[1]);
        return -1;
    }
    if (child == 0) {
        if (!detached) {
            setpgid(0, 0);
            run_child(argv, envp, directory, in, out, err, keep, keep_count, report[1], parent, confinement);
        }
        setsid();
        pid_t grandchild = fork();
        if (grandchild == 0) run_child(argv, envp, directory, in, out, err, keep, keep_count, report[1], 0, confinement);
        int message[2] = {-1, (int)grandchild};
        if (grandchild < 0) message[1] = -errno;
        (void)!write(report[1], message, sizeof message);
        _exit(0);
    }
    close(report[1]);
    pid_t result = child;
    int failure = 0;
    /* A detached start reports its pid as the pair {-1, pid}; a failure before exec is {-2, step, errno}. */
    int word;
    while (read(report[0], &word, sizeof word) == (ssize_t)sizeof word) {
        if (word == -1) {
            if (read(report[0], &word, sizeof word) == (ssize_t)sizeof word) {
                if (word < 0)
                    failure = -word;
                else
                    result = (pid_t)word;
            }
        } else if (word == -2) {
            int failed[2];
            if (read(report[0], failed, sizeof failed) == (ssize_t)sizeof failed) {
                if (step) *step = failed[0];
                failure = failed[1];
            }
        }
    }
    close(report[0]);
    if (detached) {
        while (waitpid(child, NULL, 0) < 0 && errno == EINTR) {}
    }
    if (failure) {
        if (!detached) {
            while (waitpid(child, NULL, 0) < 0 && errno == EINTR) {}
        }
        errno = failure;
        return -1;
    }
    return result;
}

pid_t xd_spawn_detached(char *const argv[], char *const envp[], const char *directory, int in, int out, int err,
                        const int *keep, int keep_count, const xd_confinement *confinement, int *step) {
    return spawn(argv, envp, directory, in, out, err, keep, keep_count, 1, 0, confinement, step);
}

pid_t xd_spawn_child(char *const argv[], char *const envp[], const char *directory, int in, int out, int err) {
    return spawn(argv, envp, directory, in, out, err, NULL, 0, 0, 0, NULL, NULL);
}

pid_t xd_spawn_bound(char *const argv[], char *const envp[], const char *directory, int in, int out, int err,
                     const xd_confinement *confinement, int *step) {
    return spawn(argv, envp, directory, in, out, err, NULL, 0, 0, 1, confinement, step);
}

int xd_wait_nohang(pid_t pid, int *status) { return (int)waitpid(pid, status, WNOHANG); }

int xd_exit_code(int status) {
    if (WIFEXITED(status)) return WEXITSTATUS(status);
    return 128 + WTERMSIG(status);
}

int xd_pidfd_open(pid_t pid) { return (int)syscall(SYS_pidfd_open, pid, 0); }
int xd_pidfd_signal(int pidfd, int number) { return (int)syscall(SYS_pidfd_send_signal, pidfd, number, NULL, 0); }

static int signal_pipe[2] = {-1, -1};

static void note_signal(int number) {
    int saved = errno;
    unsigned char byte = (unsigned char)number;
    (void)!write(signal_pipe[1], &byte, 1);
    errno = saved;
}

int xd_signal_pipe(const int *signals, int count) {
    if (signal_pipe[0] < 0 && pipe2(signal_pipe, O_CLOEXEC) < 0) return -1;
    struct sigaction action = {.sa_handler = note_signal, .sa_flags = SA_RESTART};
    for (int i = 0; i < count; i++) sigaction(signals[i], &action, NULL);
    signal(SIGPIPE, SIG_IGN);
    return signal_pipe[0];
}

void xd_raise_descriptor_limit(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

int xd_clock_is_synchronised(void) {
    struct timex state = {0};
    int code = adjtimex(&state);
    if (code < 0) return -1;
    return code != TIME_ERROR && !(state.status & STA_UNSYNC);
}

int xd_terminal_width(int fd) {
    struct winsize size;
    return ioctl(fd, TIOCGWINSZ, &size) == 0 ? size.ws_col : 0;
}

int xd_open_directory(const char *path) { return open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC); }

int xd_identify(int directory, const char *name, int follow, xd_identity *identity) {
    struct statx found;
    int flags = AT_STATX_DONT_SYNC | AT_NO_AUTOMOUNT | (follow ? 0 : AT_SYMLINK_NOFOLLOW) | (*name ? 0 : AT_EMPTY_PATH);
    if (statx(directory, name, flags, STATX_TYPE | STATX_MODE | STATX_INO | STATX_NLINK | STATX_UID, &found) < 0) return -1;
    identity->device = makedev(found.stx_dev_major, found.stx_dev_minor);
    identity->inode = found.stx_ino;
    identity->special = makedev(found.stx_rdev_major, found.stx_rdev_minor);
    identity->links = found.stx_nlink;
    identity->mode = found.stx_mode;
    identity->owner = found.stx_uid;
    return 0;
}

uint64_t xd_device_number(uint32_t major_number, uint32_t minor_number) { return makedev(major_number, minor_number); }
uint32_t xd_device_major(uint64_t number) { return major(number); }
uint32_t xd_device_minor(uint64_t number) { return minor(number); }

int xd_rename_no_replace(int old_directory, const char *old_name, int new_directory, const char *new_name) {
    return renameat2(old_directory, old_name, new_directory, new_name, RENAME_NOREPLACE);
}

int xd_is_immutable(int fd) {
    int flags = 0;
    return ioctl(fd, FS_IOC_GETFLAGS, &flags) == 0 && flags & (FS_IMMUTABLE_FL | FS_APPEND_FL);
}

int xd_is_only_opener(int fd) {
    // Whoever opens the file meanwhile waits, and this process is told by a signal: one that is ignored, not SIGIO, which would end it.
    if (fcntl(fd, F_SETSIG, SIGURG) < 0 || fcntl(fd, F_SETLEASE, F_WRLCK) < 0) return -1;
    return fcntl(fd, F_SETLEASE, F_UNLCK);
}

int xd_clone(int target, int source) { return ioctl(target, FICLONE, source); }

ssize_t xd_copy_range(int source, int target, off_t offset, size_t count) {
    off_t from = offset, to = offset;
    return copy_file_range(source, &from, target, &to, count, 0);
}

int xd_open_beneath(int directory, const char *path) {
    struct open_how how = {
        .flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK,
        .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS,
    };
    return (int)syscall(SYS_openat2, directory, path, &how, sizeof how);
}

void *xd_secret_pages(size_t length) {
    void *pages = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) return NULL;
    (void)madvise(pages, length, MADV_DONTDUMP);
    (void)madvise(pages, length, MADV_WIPEONFORK);
    (void)mlock(pages, length);
    return pages;
}

void xd_secret_pages_free(void *pages, size_t length) {
    explicit_bzero(pages, length);
    munmap(pages, length);
}

void xd_wipe(void *bytes, size_t length) { explicit_bzero(bytes, length); }

long xd_keyring_read(int32_t serial, void *buffer, size_t capacity) {
    return syscall(SYS_keyctl, 11 /* KEYCTL_READ */, serial, buffer, capacity, 0);
}

#define XD_MAX_DESCRIPTORS 253 /* SCM_MAX_FD */

ssize_t xd_send_with_descriptors(int fd, const void *iov, int iov_count, const int *descriptors, int count) {
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * XD_MAX_DESCRIPTORS)];
    } control;
    if (count > XD_MAX_DESCRIPTORS) {
        errno = EINVAL;
        return -1;
    }
    struct msghdr message = {.msg_iov = (struct iovec *)iov, .msg_iovlen = (size_t)iov_count};
    if (count > 0) {
        memset(&control, 0, sizeof control);
        message.msg_control = control.bytes;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * (size_t)count);
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int) * (size_t)count);
        memcpy(CMSG_DATA(header), descriptors, sizeof(int) * (size_t)count);
    }
    return sendmsg(fd, &message, MSG_NOSIGNAL);
}

ssize_t xd_receive_with_descriptors(int fd, const void *iov, int iov_count, int *descriptors, int *count, int *lost) {
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * XD_MAX_DESCRIPTORS)];
    } control;
    int capacity = *count;
    struct msghdr message = {
        .msg_iov = (struct iovec *)iov,
        .msg_iovlen = (size_t)iov_count,
        .msg_control = control.bytes,
        .msg_controllen = sizeof control.bytes,
    };
    *count = 0;
    *lost = 0;
    ssize_t result = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
    if (result < 0) return result;
    if (message.msg_flags & MSG_CTRUNC) *lost = 1;
    for (struct cmsghdr *header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header)) {
        if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
        size_t number = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < number; i++) {
            int descriptor;
            memcpy(&descriptor, CMSG_DATA(header) + i * sizeof(int), sizeof descriptor);
            if (*count < capacity) {
                descriptors[(*count)++] = descriptor;
            } else {
                close(descriptor);
                *lost = 1;
            }
        }
    }
    return result;
}

static void vsock_address(struct sockaddr_vm *address, uint32_t cid, uint32_t port) {
    memset(address, 0, sizeof *address);
    address->svm_family = AF_VSOCK;
    address->svm_cid = cid;
    address->svm_port = port;
}

int xd_vsock_connect(int fd, uint32_t cid, uint32_t port) {
    struct sockaddr_vm address;
    vsock_address(&address, cid, port);
    return connect(fd, (struct sockaddr *)&address, sizeof address);
}

int xd_vsock_bind(int fd, uint32_t cid, uint32_t port) {
    struct sockaddr_vm address;
    vsock_address(&address, cid, port);
    return bind(fd, (struct sockaddr *)&address, sizeof address);
}

int xd_vsock_name(int fd, int peer, uint32_t *cid, uint32_t *port) {
    struct sockaddr_vm address;
    socklen_t length = sizeof address;
    int result = peer ? getpeername(fd, (struct sockaddr *)&address, &length)
                      : getsockname(fd, (struct sockaddr *)&address, &length);
    if (result == 0) {
        *cid = address.svm_cid;
        *port = address.svm_port;
    }
    return result;
}

int xd_is_readable(int fd) {
    struct pollfd waiting = {.fd = fd, .events = POLLIN};
    return poll(&waiting, 1, 0) > 0;
}

int xd_set_nonblocking(int fd) {
    int flags = fcntl(fd, F_GETFL);
    return flags < 0 ? -1 : fcntl(fd, F_SETFL, flags | O_NONBLOCK);
}

int xd_reopen(int fd, int writing) {
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return open(path, (writing ? O_WRONLY | O_APPEND : O_RDONLY) | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
}

int xd_pipe(int ends[2]) { return pipe2(ends, O_CLOEXEC); }

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define XD_TSAN 1
#endif
#endif

#ifdef XD_TSAN
void __tsan_acquire(void *lock);
void __tsan_release(void *lock);
void xd_tsan_acquire(void *lock) { __tsan_acquire(lock); }
void xd_tsan_release(void *lock) { __tsan_release(lock); }
#else
void xd_tsan_acquire(void *lock) { (void)lock; }
void xd_tsan_release(void *lock) { (void)lock; }
#endif

int xd_unread(int fd) {
    int count = 0;
    return ioctl(fd, FIONREAD, &count) == 0 ? count : -1;
}

int xd_give_back_freed(void) { return malloc_trim(0); }
