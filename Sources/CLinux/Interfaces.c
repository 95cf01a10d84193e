#define _GNU_SOURCE
#include "CLinux.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef IFF_TUN_EXCL
#define IFF_TUN_EXCL 0x8000
#endif

int xd_tap_make(const char *name, uint32_t owner, int has_queues, int is_new) {
    int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
    if (fd < 0) return -1;
    struct ifreq request = {0};
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    /* The kernel wants these in a short, in which the last one is its sign. */
    request.ifr_flags = (short)(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (has_queues ? IFF_MULTI_QUEUE : 0) | (is_new ? IFF_TUN_EXCL : 0));
    int code = ioctl(fd, TUNSETIFF, &request);
    if (code == 0) code = ioctl(fd, TUNSETOWNER, (unsigned long)owner);
    if (code == 0) code = ioctl(fd, TUNSETPERSIST, 1ul);
    int saved = errno;
    close(fd);
    errno = saved;
    return code;
}

typedef struct {
    struct nlmsghdr header;
    struct ifinfomsg link;
    char attributes[512]; /* Room for an alias, whose length the kernel bounds at 255, and the rest. */
} xd_link_request;

static void xd_add(xd_link_request *request, unsigned short type, const void *value, size_t length) {
    struct rtattr *attribute = (struct rtattr *)((char *)request + NLMSG_ALIGN(request->header.nlmsg_len));
    attribute->rta_type = type;
    attribute->rta_len = RTA_LENGTH(length);
    memcpy(RTA_DATA(attribute), value, length);
    request->header.nlmsg_len = NLMSG_ALIGN(request->header.nlmsg_len) + RTA_ALIGN(attribute->rta_len);
}

static int xd_ask_route(xd_link_request *request) {
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (fd < 0) return -1;
    int code = -1;
    _Alignas(struct nlmsghdr) char answer[4096];
    if (send(fd, request, request->header.nlmsg_len, 0) >= 0) {
        ssize_t length;
        do length = recv(fd, answer, sizeof answer, 0);
        while (length < 0 && errno == EINTR);
        struct nlmsghdr *header = (struct nlmsghdr *)answer;
        if (length >= 0 && NLMSG_OK(header, length) && header->nlmsg_type == NLMSG_ERROR) {
            errno = -((struct nlmsgerr *)NLMSG_DATA(header))->error;
            code = errno == 0 ? 0 : -1;
        } else if (length >= 0) {
            errno = EPROTO;
        }
    }
    int saved = errno;
    close(fd);
    errno = saved;
    return code;
}

static xd_link_request xd_link_request_about(const char *name, unsigned short type) {
    xd_link_request request = {
        .header = {.nlmsg_len = NLMSG_LENGTH(sizeof(struct ifinfomsg)), .nlmsg_type = type, .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK},
        .link = {.ifi_family = AF_UNSPEC, .ifi_index = (int)if_nametoindex(name)},
    };
    return request;
}

int xd_link_join(const char *name, const char *bridge, uint32_t mtu, const uint8_t address[6], const char *alias) {
    unsigned int master = if_nametoindex(bridge);
    if (master == 0 || if_nametoindex(name) == 0) {
        errno = ENODEV;
        return -1;
    }
    if (strlen(alias) > 255) {
        errno = EINVAL;
        return -1;
    }
    /* What it is belongs to it before it is a port, and it is a port before it is up. */
    xd_link_request request = xd_link_request_about(name, RTM_NEWLINK);
    xd_add(&request, IFLA_IFALIAS, alias, strlen(alias));
    xd_add(&request, IFLA_ADDRESS, address, 6);
    if (mtu > 0) xd_add(&request, IFLA_MTU, &mtu, sizeof mtu);
    if (xd_ask_route(&request) < 0) return -1;
    request = xd_link_request_about(name, RTM_NEWLINK);
    request.link.ifi_flags = request.link.ifi_change = IFF_UP;
    xd_add(&request, IFLA_MASTER, &master, sizeof master);
    return xd_ask_route(&request);
}

int xd_link_remove(const char *name) {
    if (if_nametoindex(name) == 0) {
        errno = ENODEV;
        return -1;
    }
    xd_link_request request = xd_link_request_about(name, RTM_DELLINK);
    return xd_ask_route(&request);
}
