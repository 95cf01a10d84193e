#ifndef CROSSDOCK_CGNUTLS_SHIM_H
#define CROSSDOCK_CGNUTLS_SHIM_H

#include <gnutls/gnutls.h>
#include <gnutls/x509.h>
#include <gnutls/crypto.h>
#include <gnutls/abstract.h>

/* gnutls_free is a mutable global function pointer, which Swift 6 refuses to read. */
static inline void xd_gnutls_free(void *pointer) { gnutls_free(pointer); }
static inline void *xd_gnutls_malloc(size_t size) { return gnutls_malloc(size); }

#endif
