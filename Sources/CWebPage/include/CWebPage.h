#ifndef CROSSDOCK_CWEBPAGE_H
#define CROSSDOCK_CWEBPAGE_H

#include <stddef.h>

/* A file of the agent's page, as it is below Sources/Web/Page. */
struct xd_page_file {
    const char *name;
    const unsigned char *bytes;
    size_t size;
};

/* The file at an index; its name is NULL behind the last one. */
struct xd_page_file xd_page_file_at(size_t index);

#endif
