/* Counts the calls of malloc of the whole process, and GnuTLS used the naive way, as a yardstick. */
#ifndef CROSSDOCK_CCOUNT_H
#define CROSSDOCK_CCOUNT_H

#include <stddef.h>
#include <stdint.h>

uint64_t bench_allocations(void);

/* Moves `total` bytes over a TCP connection on loopback in messages of `message` bytes, each record its own send, with one
   thread for each end. Returns 0, or -1 when something failed. */
int bench_naive_tls(const char *directory, size_t total, size_t message);

#endif
