#ifndef CROSSDOCK_CGCRYPT_SHIM_H
#define CROSSDOCK_CGCRYPT_SHIM_H

#include <gcrypt.h>

/* gcry_control is variadic, which Swift cannot call. */
static inline int xd_gcry_finish_initialization(void) {
    return (int)gcry_control(GCRYCTL_INITIALIZATION_FINISHED, 0);
}
static inline int xd_gcry_disable_secure_memory(void) { return (int)gcry_control(GCRYCTL_DISABLE_SECMEM, 0); }

#endif
