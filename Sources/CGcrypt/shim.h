#ifndef CROSSDOCK_CGCRYPT_SHIM_H
#define CROSSDOCK_CGCRYPT_SHIM_H

#include <gcrypt.h>
#include <pthread.h>

/* Each module that includes this has the lock; weak, it is one for the process. */
__attribute__((weak)) pthread_mutex_t xd_gcry_lock = PTHREAD_MUTEX_INITIALIZER;

/* gcry_control is variadic, which Swift cannot call. Secure memory stays off: the keys that libgcrypt holds are wiped
   when a handle is closed, and its pool of locked memory is small. Calling it again changes nothing. libgcrypt aborts when
   two threads initialise it at once. */
static inline void xd_gcry_initialize(void) {
    (void)pthread_mutex_lock(&xd_gcry_lock);
    if (!gcry_control(GCRYCTL_INITIALIZATION_FINISHED_P)) {
        (void)gcry_check_version(NULL);
        (void)gcry_control(GCRYCTL_DISABLE_SECMEM, 0);
        (void)gcry_control(GCRYCTL_INITIALIZATION_FINISHED, 0);
    }
    (void)pthread_mutex_unlock(&xd_gcry_lock);
}

/* Macros around gcry_md_ctl and gcry_cipher_ctl. */
static inline int xd_gcry_md_available(int algorithm) { return gcry_md_test_algo(algorithm) == 0; }
static inline int xd_gcry_cipher_available(int algorithm) { return gcry_cipher_test_algo(algorithm) == 0; }
/* VNC's passwords may be weak keys of DES. */
static inline int xd_gcry_allow_weak_key(gcry_cipher_hd_t handle) {
    return (int)gcry_cipher_ctl(handle, GCRYCTL_SET_ALLOW_WEAK_KEY, NULL, 1);
}
static inline int xd_gcry_md_write(gcry_md_hd_t handle, const void *bytes, size_t count) {
    gcry_md_write(handle, bytes, count);
    return 0;
}

#endif
