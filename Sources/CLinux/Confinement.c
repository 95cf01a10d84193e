#define _GNU_SOURCE
#include "Confinement.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/securebits.h>
#include <sched.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The numbers are the same on all architectures; older headers lack them. */
#ifndef SYS_landlock_create_ruleset
#define SYS_landlock_create_ruleset 444
#define SYS_landlock_add_rule 445
#define SYS_landlock_restrict_self 446
#endif

/* As in linux/landlock.h, whose older versions have fewer members. The kernel takes a longer one when the rest is 0. */
struct ruleset_attributes {
    uint64_t files;
    uint64_t ports;
    uint64_t scopes;
};
struct path_attributes {
    uint64_t rights;
    int32_t path;
} __attribute__((packed));
struct port_attributes {
    uint64_t rights;
    uint64_t port;
};
enum { RULE_PATH = 1, RULE_PORT = 2, QUERY_VERSION = 1 };

int xd_landlock_version(void) { return (int)syscall(SYS_landlock_create_ruleset, NULL, 0, QUERY_VERSION); }

int xd_landlock_ruleset(uint64_t files, uint64_t ports, uint64_t scopes) {
    struct ruleset_attributes attributes = {.files = files, .ports = ports, .scopes = scopes};
    return (int)syscall(SYS_landlock_create_ruleset, &attributes, sizeof attributes, 0);
}

int xd_landlock_allow(int ruleset, int path, uint64_t rights) {
    struct path_attributes attributes = {.rights = rights, .path = path};
    return (int)syscall(SYS_landlock_add_rule, ruleset, RULE_PATH, &attributes, 0);
}

int xd_landlock_allow_port(int ruleset, uint16_t port, uint64_t rights) {
    struct port_attributes attributes = {.rights = rights, .port = port};
    return (int)syscall(SYS_landlock_add_rule, ruleset, RULE_PORT, &attributes, 0);
}

int xd_open_name(const char *path) { return open(path, O_PATH | O_CLOEXEC); }

/* The system calls themselves: the library's wrappers would ask threads that a forked child does not have. */
static int get_capabilities(struct __user_cap_data_struct data[2]) {
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    return (int)syscall(SYS_capget, &header, data);
}

static int drop_capabilities(void) {
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[2] = {{0}};
    return (int)syscall(SYS_capset, &header, none);
}

int xd_has_capability(int number) {
    struct __user_cap_data_struct data[2] = {{0}};
    if (number < 0 || number > 63 || get_capabilities(data) < 0) return 0;
    return (data[number / 32].effective >> (number % 32)) & 1;
}

static int limit(int resource, uint64_t wanted) {
    struct rlimit limit;
    if (getrlimit(resource, &limit) < 0) return -1;
    if (wanted > limit.rlim_max) {
        struct rlimit higher = {.rlim_cur = wanted, .rlim_max = wanted};
        if (setrlimit(resource, &higher) == 0) return 0;
        wanted = limit.rlim_max;
    }
    struct rlimit exact = {.rlim_cur = wanted, .rlim_max = wanted};
    return setrlimit(resource, &exact);
}

static int set_limits(const xd_confinement *confinement) {
    if (limit(RLIMIT_CORE, 0) < 0) return -1;
    if (confinement->descriptors && limit(RLIMIT_NOFILE, confinement->descriptors) < 0) return -1;
    if (confinement->locked && limit(RLIMIT_MEMLOCK, confinement->locked) < 0) return -1;
    return 0;
}

/* Without CAP_SETPCAP neither can be done, and little is lost: no_new_privs keeps exec from giving anything back. */
static int bar_capabilities(void) {
    for (int number = 0; number < 64; number++) {
        if (prctl(PR_CAPBSET_DROP, number, 0, 0, 0) < 0 && errno == EINVAL) break;
    }
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    int bits = SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | SECBIT_NO_SETUID_FIXUP_LOCKED | SECBIT_KEEP_CAPS_LOCKED;
    if (prctl(PR_SET_SECUREBITS, bits, 0, 0, 0) < 0 && errno != EPERM) return -1;
    return 0;
}

static int become(const xd_confinement *confinement) {
    uint32_t user = (uint32_t)confinement->user;
    if (syscall(SYS_setgroups, confinement->group_count, confinement->groups) < 0) return -1;
    if (syscall(SYS_setresgid, user, user, user) < 0) return -1;
    return (int)syscall(SYS_setresuid, user, user, user);
}

int xd_confine_process(const xd_confinement *confinement) {
    if (set_limits(confinement) < 0) return XD_STEP_LIMITS;
    if (confinement->isolates_network) (void)!unshare(CLONE_NEWNET);
    if (bar_capabilities() < 0) return XD_STEP_CAPABILITIES;
    if (confinement->user >= 0 && become(confinement) < 0) return XD_STEP_USER;
    if (drop_capabilities() < 0) return XD_STEP_CAPABILITIES;
    return XD_STEP_NONE;
}

int xd_confine_files(int landlock) {
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) return XD_STEP_PRIVILEGES;
    if (landlock >= 0 && syscall(SYS_landlock_restrict_self, landlock, 0) < 0) return XD_STEP_FILES;
    return XD_STEP_NONE;
}
