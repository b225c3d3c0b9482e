/* listen.c — a rank's listening socket, and what all sockets between ranks have in common: addresses, no delay, no blocking. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "group.h"

void cv_socket_prepare(int fd) {
    int one = 1;
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
#ifdef SO_NOSIGPIPE
    setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &one, sizeof one);
#endif
}

socklen_t cv_socket_address(const cv_address *a, struct sockaddr_storage *out) {
    memset(out, 0, sizeof *out);
    if (a->family == 6) {
        struct sockaddr_in6 *s = (struct sockaddr_in6 *)out;
        s->sin6_family = AF_INET6;
        s->sin6_port = htons((uint16_t)a->port);
        memcpy(&s->sin6_addr, a->ip, 16);
        return sizeof *s;
    }
    struct sockaddr_in *s = (struct sockaddr_in *)out;
    s->sin_family = AF_INET;
    s->sin_port = htons((uint16_t)a->port);
    memcpy(&s->sin_addr, a->ip, 4);
    return sizeof *s;
}

int cv_listen(cv_group *g, cv_err err) {
    struct sockaddr_storage where;
    socklen_t size = cv_socket_address(&g->self, &where);
    int fd = socket(g->self.family == 6 ? AF_INET6 : AF_INET, SOCK_STREAM, 0);
    if (fd < 0) return cv_fail(err, CV_E_IO, "cannot make a socket: %s", strerror(errno));
    cv_socket_prepare(fd);
    if (bind(fd, (struct sockaddr *)&where, size)) {
        /* An address that others use for this host but that no interface has (translated): listen on all of them. */
        int why = errno;
        cv_address any = g->self;
        memset(any.ip, 0, sizeof any.ip);
        size = cv_socket_address(&any, &where);
        if (why != EADDRNOTAVAIL || bind(fd, (struct sockaddr *)&where, size)) {
            close(fd);
            return cv_fail(err, CV_E_IO, "cannot listen on %s: %s", g->options.host, strerror(why));
        }
    }
    size = sizeof where;
    if (listen(fd, 128) || getsockname(fd, (struct sockaddr *)&where, &size)) {
        int why = errno;
        close(fd);
        return cv_fail(err, CV_E_IO, "cannot listen on %s: %s", g->options.host, strerror(why));
    }
    g->self.port = ntohs(g->self.family == 6 ? ((struct sockaddr_in6 *)&where)->sin6_port : ((struct sockaddr_in *)&where)->sin_port);
    g->listener = fd;
    return CV_OK;
}
