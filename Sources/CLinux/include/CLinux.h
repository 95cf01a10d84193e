/* What Swift's Glibc module does not offer: epoll, eventfd, GNU-only calls and casted macros. No logic. */
#ifndef CROSSDOCK_CLINUX_H
#define CROSSDOCK_CLINUX_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/xattr.h>

#include "Confinement.h"

enum {
    XD_READABLE = 1,
    XD_WRITABLE = 2,
    XD_HANGUP = 4,
};

typedef struct {
    uint64_t data;
    uint32_t flags;
} xd_event;

int xd_epoll_create(void);
int xd_epoll_add(int epoll, int fd, uint64_t data);
int xd_epoll_add_level(int epoll, int fd, uint64_t data);
int xd_epoll_remove(int epoll, int fd);
int xd_epoll_wait(int epoll, xd_event *events, int capacity, int timeout_ms);
/* Asks again and again, and lets other threads run in between, for at most so long; 0 when nothing happened. */
int xd_epoll_spin(int epoll, xd_event *events, int capacity, int64_t nanoseconds);
int xd_eventfd(void);
int xd_eventfd_signal(int fd);
int xd_eventfd_drain(int fd);

/* What was freed and is kept by the allocator goes back to the system (malloc_trim): 1 when anything did. */
int xd_give_back_freed(void);

int xd_accept(int fd, void *peer, uint32_t *length);
int xd_socket(int domain, int type);
int xd_socketpair(int descriptors[2]);
int xd_unix_connect(int fd, const char *path);
int xd_unix_bind(int fd, const char *path);
/* sendmsg and recvmsg with SCM_RIGHTS. Received descriptors are close-on-exec; *count is the capacity on the way in and the
   number on the way out. *lost tells that some did not fit; the kernel has closed those. */
ssize_t xd_send_with_descriptors(int fd, const void *iov, int iov_count, const int *descriptors, int count);
ssize_t xd_receive_with_descriptors(int fd, const void *iov, int iov_count, int *descriptors, int *count, int *lost);
int xd_vsock_connect(int fd, uint32_t cid, uint32_t port);
int xd_vsock_bind(int fd, uint32_t cid, uint32_t port);
int xd_vsock_name(int fd, int peer, uint32_t *cid, uint32_t *port);
int xd_is_readable(int fd);
int xd_set_nonblocking(int fd);
/* The same open file with a status of its own, so that O_NONBLOCK does not reach whoever shares it; -1 for sockets. */
int xd_reopen(int fd, int writing);
int xd_pipe(int ends[2]);
/* The inode numbers of the Unix sockets that are bound to a file with this inode number (sock_diag(7)); how many there are,
   which may be more than `capacity`, or -1 with errno. */
int xd_unix_sockets_of_file(uint64_t file, uint64_t *sockets, int capacity);
int xd_peer_credentials(int fd, pid_t *pid, uid_t *uid);
/* Whether the other end of a Unix socket has not taken all that was written. */
int xd_has_untaken(int fd);
/* Writing to a pipe that nobody reads raises SIGPIPE in the writing thread, unless that blocks it; it still gets EPIPE. */
void xd_block_sigpipe(void);
void xd_thread_name(const char *name);

ssize_t xd_preadv_nowait(int fd, const void *iov, int count, off_t offset);
ssize_t xd_pwritev_nowait(int fd, const void *iov, int count, off_t offset);
int xd_punch_hole(int fd, off_t offset, off_t length);
int xd_reserve(int fd, off_t length);
int xd_zero_range(int fd, off_t offset, off_t length);
off_t xd_seek_data(int fd, off_t offset);
off_t xd_seek_hole(int fd, off_t offset);
int xd_is_tmpfs(int fd);
int xd_open_create_exclusive(const char *path);
int xd_o_direct(void);
/* The calling thread goes after others when processors are busy: 19 for what may as well be done later. */
void xd_yield_to_others(int niceness);
/* An anonymous file in memory (memfd_create). */
int xd_memory_file(const char *name);
/* The unit of direct I/O on a device; 4096 for files. */
int xd_direct_block(int fd);
int xd_is_rotational(int fd);
int xd_block_device_size(int fd, uint64_t *size);
int xd_is_block_device(int fd);
int xd_lock_ofd(int fd, off_t offset, off_t length, int exclusive);
int xd_unlock_ofd(int fd, off_t offset, off_t length);
int xd_test_ofd(int fd, off_t offset, off_t length, int exclusive);
int xd_flock_exclusive(int fd);
uint64_t xd_free_bytes(const char *path);
/* What is used of a file system and what users may have of the rest, together. */
uint64_t xd_total_bytes(const char *path);
int xd_is_memory_file_system(const char *path);
/* Whether a path is in a file system of huge pages: 1 or 0. */
int xd_is_huge_page_file_system(const char *path);
int xd_is_zero(const void *bytes, size_t length);

/* How many descriptors a detached program can inherit. */
enum { XD_MAX_KEPT = 64 };
/* Starts argv[0] detached: new session, the three descriptors as standard streams, everything else closed,
   signals reset, and confined when `confinement` is given. Returns the pid, or -1 with errno; failures in the child are
   reported through errno too, and `step`, where given, says in which step of its confinement (0: in none). */
pid_t xd_spawn_detached(char *const argv[], char *const envp[], const char *directory, int in, int out, int err,
                        const int *keep, int keep_count, const xd_confinement *confinement, int *step);
/* Starts argv[0] as an ordinary child in its own process group. */
pid_t xd_spawn_child(char *const argv[], char *const envp[], const char *directory, int in, int out, int err);
/* The same, ended with SIGTERM when the thread that started it ends, and confined when `confinement` is given. */
pid_t xd_spawn_bound(char *const argv[], char *const envp[], const char *directory, int in, int out, int err,
                     const xd_confinement *confinement, int *step);
/* How many bytes wait to be read from a socket or pipe; negative when that cannot be known. */
int xd_unread(int fd);

int xd_wait_nohang(pid_t pid, int *status);
int xd_exit_code(int status);
int xd_pidfd_open(pid_t pid);
int xd_pidfd_signal(int pidfd, int signal);
/* Turns signals into bytes: returns a descriptor from which the number of each signal that comes can be read. */
int xd_signal_pipe(const int *signals, int count);
/* Raises the soft limit of open descriptors to the hard one. */
void xd_raise_descriptor_limit(void);
int xd_terminal_width(int fd);
/* Whether the kernel's clock is kept right by somebody (adjtimex(2)); -1 when that is not known. */
int xd_clock_is_synchronised(void);
int xd_open_directory(const char *path);

/* Which file a name leads to, without asking the server of a remote file system. `device` is the file system's number,
   `special` the device's own if the file is one. */
typedef struct {
    uint64_t device;
    uint64_t inode;
    uint64_t special;
    uint64_t links;
    uint32_t mode;
    uint32_t owner;
} xd_identity;
int xd_identify(int directory, const char *name, int follow, xd_identity *identity);
uint64_t xd_device_number(uint32_t major, uint32_t minor);
uint32_t xd_device_major(uint64_t number);
uint32_t xd_device_minor(uint64_t number);
/* renameat2 with RENAME_NOREPLACE. */
int xd_rename_no_replace(int old_directory, const char *old_name, int new_directory, const char *new_name);
/* Whether a file or directory is immutable or append-only (chattr +i, +a); 0 where the file system has no such thing. */
int xd_is_immutable(int fd);

/* Whether nobody but the owner of this descriptor has the file open (a lease is taken for a moment): 0, or -1 with errno: EAGAIN when
   somebody has, something else when that cannot be known. */
int xd_is_only_opener(int fd);
/* Gives a file the contents of another one, which share their blocks until one changes (FICLONE): 0, or -1 with errno. */
int xd_clone(int target, int source);
/* Copies bytes of a file at the same place of another one (copy_file_range): how many, 0 at the end, or -1 with errno. */
ssize_t xd_copy_range(int source, int target, off_t offset, size_t count);
/* Opens a file by a path that may not lead out of a directory, nor through a symbolic link (openat2): -1 with errno. */
int xd_open_beneath(int directory, const char *path);

/* Pages for secrets: left out of core dumps and not inherited by children; locked when the limit allows it. */
void *xd_secret_pages(size_t length);
void xd_secret_pages_free(void *pages, size_t length);
void xd_wipe(void *bytes, size_t length);
/* keyctl(2): the payload of a key of the kernel's keyring; returns its length, or -1 with errno. */
long xd_keyring_read(int32_t serial, void *buffer, size_t capacity);

/* Tells ThreadSanitizer who holds a lock that it cannot see; nothing in other builds. */
void xd_tsan_acquire(void *lock);
void xd_tsan_release(void *lock);

/* A tap interface that stays, in the calling thread's network namespace, for a user and root: -1 with errno. With `is_new` it must
   not be there yet. */
int xd_tap_make(const char *name, uint32_t owner, int has_queues, int is_new);
/* Makes an interface a port of a bridge and puts it up, with an address and a note of its own (rtnetlink(7)); 0 for the MTU that it
   has. */
int xd_link_join(const char *name, const char *bridge, uint32_t mtu, const uint8_t address[6], const char *alias);
int xd_link_remove(const char *name);

#endif
