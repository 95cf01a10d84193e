#ifndef CSHA256_H
#define CSHA256_H

#include <stddef.h>

/* SHA-256 (FIPS 180-4) of several messages of one length at a time. A message by itself waits for itself: each round needs the one before it. */

/* Ways to do that, by the instructions that they need. */
enum { XD_SHA256_AVX512, XD_SHA256_SHANI, XD_SHA256_WAYS };

/* How many messages a way takes at a time; 0 when this processor, or its system, does not have it. */
int xd_sha256_width(int way);

/* Takes the digests of exactly as many messages as the way takes. The length is a multiple of 64 bytes; the digests have 32 bytes each and
 * lie one after the other. */
void xd_sha256_hash(int way, const void *const *messages, size_t length, unsigned char *digests);

#endif
