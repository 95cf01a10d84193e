#define _GNU_SOURCE
#include "CCount.h"

#include <arpa/inet.h>
#include <gnutls/gnutls.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define PRIORITY "NORMAL:-VERS-ALL:+VERS-TLS1.3:-CIPHER-ALL:+AES-128-GCM"

struct end {
    gnutls_session_t session;
    gnutls_certificate_credentials_t credentials;
    size_t total, message;
    int fd, is_server, result;
};

static int set_up(struct end *end, const char *directory) {
    char path[3][4096];
    const char *name = end->is_server ? "server" : "client";
    snprintf(path[0], sizeof path[0], "%s/ca-cert.pem", directory);
    snprintf(path[1], sizeof path[1], "%s/%s-cert.pem", directory, name);
    snprintf(path[2], sizeof path[2], "%s/%s-key.pem", directory, name);
    if (gnutls_certificate_allocate_credentials(&end->credentials) < 0) return -1;
    if (gnutls_certificate_set_x509_trust_file(end->credentials, path[0], GNUTLS_X509_FMT_PEM) < 1) return -1;
    if (gnutls_certificate_set_x509_key_file(end->credentials, path[1], path[2], GNUTLS_X509_FMT_PEM) < 0) return -1;
    if (gnutls_init(&end->session, end->is_server ? GNUTLS_SERVER : GNUTLS_CLIENT) < 0) return -1;
    if (gnutls_priority_set_direct(end->session, PRIORITY, NULL) < 0) return -1;
    if (gnutls_credentials_set(end->session, GNUTLS_CRD_CERTIFICATE, end->credentials) < 0) return -1;
    if (end->is_server) gnutls_certificate_server_set_request(end->session, GNUTLS_CERT_REQUIRE);
    else gnutls_session_set_verify_cert(end->session, "localhost", 0);
    gnutls_transport_set_int(end->session, end->fd);
    return 0;
}

static void *run(void *argument) {
    struct end *end = argument;
    end->result = -1;
    int code;
    do code = gnutls_handshake(end->session);
    while (code < 0 && !gnutls_error_is_fatal(code));
    if (code < 0) return NULL;
    char *buffer = malloc(end->message);
    if (!buffer) return NULL;
    memset(buffer, 7, end->message);
    size_t done = 0;
    while (done < end->total) {
        if (end->is_server) {
            ssize_t count = gnutls_record_recv(end->session, buffer, end->message);
            if (count <= 0) break;
            done += (size_t)count;
        } else {
            size_t sent = 0;
            while (sent < end->message) {
                ssize_t count = gnutls_record_send(end->session, buffer + sent, end->message - sent);
                if (count <= 0) break;
                sent += (size_t)count;
            }
            if (sent < end->message) break;
            done += sent;
        }
    }
    free(buffer);
    end->result = done >= end->total ? 0 : -1;
    return NULL;
}

int bench_naive_tls(const char *directory, size_t total, size_t message) {
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    if (bind(listener, (struct sockaddr *)&address, length) || listen(listener, 1)
        || getsockname(listener, (struct sockaddr *)&address, &length))
        return -1;
    int one = 1;
    struct end client = {.total = total, .message = message, .fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
    if (connect(client.fd, (struct sockaddr *)&address, length)) return -1;
    struct end server = {.total = total, .message = message, .fd = accept(listener, NULL, NULL), .is_server = 1};
    setsockopt(client.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(server.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    close(listener);
    if (set_up(&client, directory) || set_up(&server, directory)) return -1;
    pthread_t thread;
    if (pthread_create(&thread, NULL, run, &server)) return -1;
    run(&client);
    pthread_join(thread, NULL);
    gnutls_deinit(client.session);
    gnutls_deinit(server.session);
    gnutls_certificate_free_credentials(client.credentials);
    gnutls_certificate_free_credentials(server.credentials);
    close(client.fd);
    close(server.fd);
    return client.result || server.result ? -1 : 0;
}
