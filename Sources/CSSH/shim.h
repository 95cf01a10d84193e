#ifndef CROSSDOCK_CSSH_SHIM_H
#define CROSSDOCK_CSSH_SHIM_H

#include <libssh/libssh.h>

#endif
