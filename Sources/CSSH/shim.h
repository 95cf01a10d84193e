#ifndef CROSSDOCK_CSSH_SHIM_H
#define CROSSDOCK_CSSH_SHIM_H

#include <libssh/libssh.h>
#include <libssh/server.h>

/* Swift does not import functions whose names are macros or that are marked deprecated in some versions. */
static inline int xd_ssh_option_string(ssh_session session, enum ssh_options_e option, const char *value) {
    return ssh_options_set(session, option, value);
}
static inline int xd_ssh_option_long(ssh_session session, enum ssh_options_e option, long value) {
    return ssh_options_set(session, option, &value);
}
static inline int xd_ssh_option_port(ssh_session session, unsigned int value) {
    return ssh_options_set(session, SSH_OPTIONS_PORT, &value);
}
static inline int xd_ssh_option_flag(ssh_session session, enum ssh_options_e option, int value) {
    return ssh_options_set(session, option, &value);
}
static inline int xd_ssh_option_descriptor(ssh_session session, socket_t value) {
    return ssh_options_set(session, SSH_OPTIONS_FD, &value);
}

#endif
