/* What a program gives up between fork and exec: limits, users, capabilities, and files by Landlock (landlock(7)). */
#ifndef CROSSDOCK_CONFINEMENT_H
#define CROSSDOCK_CONFINEMENT_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* The step of a confinement that failed. */
enum {
    XD_STEP_NONE = 0,
    XD_STEP_LIMITS = 1,
    XD_STEP_CAPABILITIES = 2,
    XD_STEP_USER = 3,
    XD_STEP_PRIVILEGES = 4,
    XD_STEP_FILES = 5,
};

typedef struct {
    /* A ruleset of Landlock, or -1 where the kernel has none. */
    int landlock;
    /* The user and group that it becomes, with these further groups and no others; -1 to stay who it is. */
    int64_t user;
    const uint32_t *groups;
    int group_count;
    /* Whether it gets a network of its own, in which there is nothing; without the privilege for that it keeps the host's. */
    int isolates_network;
    /* RLIMIT_NOFILE and RLIMIT_MEMLOCK in their units; 0 leaves them alone. A limit that cannot be raised so far stays lower. */
    uint64_t descriptors;
    uint64_t locked;
} xd_confinement;

/* Both run in the child and return the step that failed, with errno. The first keeps what the second and exec need. */
int xd_confine_process(const xd_confinement *confinement);
int xd_confine_files(int landlock);

/* The version of the kernel's Landlock, from 1 on; -1 with errno where there is none. */
int xd_landlock_version(void);
/* A ruleset that handles these rights; the numbers are those of linux/landlock.h. */
int xd_landlock_ruleset(uint64_t files, uint64_t ports, uint64_t scopes);
/* Allows rights below a directory, or of a file. */
int xd_landlock_allow(int ruleset, int path, uint64_t rights);
int xd_landlock_allow_port(int ruleset, uint16_t port, uint64_t rights);
/* A name for a file that gives no access to it (O_PATH). */
int xd_open_name(const char *path);
/* Whether the calling thread has a capability in effect (capabilities(7) has the numbers). */
int xd_has_capability(int number);

#endif
