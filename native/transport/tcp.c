/* tcp.c — the transport over TCP: one authenticated connection for each pair of ranks and channel, so that a large hidden state never
 * stands in the way of a small sum. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

#include "group.h"

typedef struct {
    cv_conn conns[CV_MAX_RANKS][CV_CHANNEL_COUNT];
} tcp;

static cv_conn *conn_of(cv_group *g, const cv_transfer *t) { return &((tcp *)g->wire_state)->conns[t->peer][t->channel]; }

static int progress(cv_group *g, cv_transfer *t) {
    cv_conn *c = conn_of(g, t);
    int r = cv_conn_progress(c, t);
    if (r >= 0) return r;
    if (r == CV_CONN_BROKEN) return cv_group_fail(g, CV_E_GROUP, (int)t->peer, "rank %u broke the protocol: %s", t->peer, c->why);
    return cv_group_suspect(g, t->peer, c->why);
}

static void wait_for(cv_group *g, cv_transfer *t, size_t n, uint64_t until_ns, uint64_t idle_ns) {
    (void)idle_ns;
    cv_wait_for_conns(g, conn_of, t, n, until_ns);
}

static void close_all(cv_group *g) {
    tcp *s = g->wire_state;
    for (uint32_t r = 0; r < CV_MAX_RANKS; r++)
        for (uint32_t ch = 0; ch < CV_CHANNEL_COUNT; ch++) {
            cv_conn *c = &s->conns[r][ch];
            /* Unread bytes would turn the close into a reset, which may overtake what this rank sent last. */
            if (c->fd >= 0) {
                char unread[4096];
                shutdown(c->fd, SHUT_WR);
                for (int i = 0; i < 256 && recv(c->fd, unread, sizeof unread, MSG_DONTWAIT) > 0; i++) {
                }
            }
            cv_conn_close(c);
        }
    free(s);
    g->wire_state = NULL;
}

static const cv_wire wire = {.kind = CV_TRANSPORT_TCP, .progress = progress, .wait = wait_for, .close = close_all, .one_shot_bytes = 8u << 10, .adds = true};

int cv_tcp_try(cv_group *g, uint64_t until_ns, char *why, size_t why_size) {
    (void)why, (void)why_size; /* TCP works or the group is over */
    tcp *s = calloc(1, sizeof *s);
    if (!s) return cv_group_fail(g, CV_E_MEMORY, (int)g->rank, "rank %u has no memory to connect", g->rank);
    cv_conn *conns[CV_MAX_RANKS];
    for (uint32_t r = 0; r < CV_MAX_RANKS; r++) {
        conns[r] = s->conns[r];
        for (uint32_t ch = 0; ch < CV_CHANNEL_COUNT; ch++) s->conns[r][ch].fd = -1;
    }
    g->wire_state = s;
    int code = cv_mesh_connect(g, 0, CV_CHANNEL_COUNT - 1, conns, until_ns);
    if (code != CV_OK) {
        close_all(g);
        return code;
    }
    pthread_mutex_lock(&g->lock);
    g->wire = &wire;
    pthread_mutex_unlock(&g->lock);
    return 1;
}
