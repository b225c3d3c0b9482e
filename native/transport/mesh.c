/* mesh.c — connections between all ranks: each rank dials the lower ones and answers the higher ones on its listening port. A connection
 * counts after three authenticated messages; whoever cannot make them (a port scan, another cluster, another epoch) is dropped
 * after a short time, counted, and never stops the others.
 *
 *   dialler → listener   hello    who, to whom, channel, epoch, instance, nonce; tag under the session key
 *   listener → dialler   reply    taken or why not, nonce; tag over hello and reply
 *   dialler → listener   confirm  tag over hello and reply: the hello was no recording
 *
 * Keys of the two directions are derived from both messages, so frames of one connection mean nothing on another one. */
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "group.h"

#define MAX_ARRIVALS 128
#define STRANGER_NS (2000 * CV_MS)  /* for a hello to arrive, and for one attempt to dial */
#define MEMBER_NS (10000 * CV_MS)   /* for the rest, once the hello is a member's */
#define RETRY_NS (30 * CV_MS)

typedef struct {
    char magic[8];
    uint32_t from, to, channel, version;
    uint64_t epoch;
    uint8_t instance[16];
    uint8_t nonce[32];
    uint8_t tag[32];
} hello; /* 112 bytes */

enum { REPLY_TAKEN = 0, REPLY_OTHER_GROUP = 1, REPLY_DOUBLE = 2 };

typedef struct {
    char magic[8];
    uint32_t status, from;
    uint64_t epoch;
    uint8_t nonce[32];
    uint8_t tag[32];
} reply; /* 88 bytes */

_Static_assert(sizeof(hello) == 112 && sizeof(reply) == 88, "handshake records have no padding");
static const char HELLO_MAGIC[8] = "CVHELO2", REPLY_MAGIC[8] = "CVREPL2";

/* What keys and tags are derived from. */
typedef struct {
    hello h;
    reply r;
} talk;

typedef enum { IDLE, DIALLING, AWAIT_REPLY, AWAIT_HELLO, AWAIT_CONFIRM, DONE } state;

typedef struct {
    state state;
    int fd;
    uint32_t peer, channel;
    uint64_t until, retry_at;
    talk talk;
    uint8_t in[sizeof(hello)];
    size_t got;
    char why[96];
} attempt;

typedef struct {
    cv_group *g;
    uint32_t first, last;
    cv_conn *const *conns;
    attempt *dials; /* [n_dials] */
    size_t n_dials, n_arrivals, missing;
    attempt arrivals[MAX_ARRIVALS];
    uint64_t until;
} mesh;

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

/* ---- one attempt ---- */

static bool send_whole(int fd, const void *data, size_t bytes) {
    return send(fd, data, bytes, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)bytes; /* a fresh socket's buffer holds it, or something is wrong */
}

/* 1: `bytes` have arrived in a->in, 0: not yet, -1: the connection ended. Reads nothing behind them. */
static int read_whole(attempt *a, size_t bytes) {
    while (a->got < bytes) {
        ssize_t n = recv(a->fd, a->in + a->got, bytes - a->got, MSG_DONTWAIT);
        if (n > 0) a->got += (size_t)n;
        else if (n < 0 && errno == EINTR) continue;
        else if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return 0;
        else return -1;
    }
    return 1;
}

static void drop(attempt *a, const char *why) {
    if (a->fd >= 0) close(a->fd);
    a->fd = -1;
    a->got = 0;
    a->state = IDLE;
    snprintf(a->why, sizeof a->why, "%s", why);
}

static void sign_hello(const cv_group *g, const hello *h, uint8_t tag[32]) { cv_mac_derive(tag, g->options.key, "caravan hello", h, offsetof(hello, tag)); }
static void sign_reply(const cv_group *g, const talk *t, uint8_t tag[32]) { cv_mac_derive(tag, g->options.key, "caravan reply", t, sizeof t->h + offsetof(reply, tag)); }
static void sign_confirm(const cv_group *g, const talk *t, uint8_t tag[32]) { cv_mac_derive(tag, g->options.key, "caravan confirm", t, sizeof *t); }

/* Turns a finished attempt into the connection of its peer and channel. */
static int adopt(mesh *m, attempt *a, bool dialler) {
    cv_group *g = m->g;
    cv_conn *c = &m->conns[a->peer][a->channel - m->first];
    if (cv_conn_init(c, a->fd, g->rank, a->peer, a->channel, g->options.epoch, &g->mac_ns)) return cv_group_fail(g, CV_E_MEMORY, (int)g->rank, "rank %u has no memory to connect", g->rank);
    cv_mac_derive(dialler ? c->send_key : c->recv_key, g->options.key, "caravan frames of the dialler", &a->talk, sizeof a->talk);
    cv_mac_derive(dialler ? c->recv_key : c->send_key, g->options.key, "caravan frames of the listener", &a->talk, sizeof a->talk);
    a->fd = -1;
    a->state = DONE;
    m->missing--;
    return CV_OK;
}

/* ---- dialling ---- */

static void dial(mesh *m, attempt *a) {
    cv_group *g = m->g;
    struct sockaddr_storage where;
    socklen_t size = cv_socket_address(&g->addresses[a->peer], &where);
    uint64_t now = cv_now();
    a->retry_at = now + RETRY_NS;
    a->until = now + STRANGER_NS;
    a->got = 0;
    a->fd = socket(where.ss_family, SOCK_STREAM, 0);
    if (a->fd < 0) {
        drop(a, strerror(errno));
        return;
    }
    cv_socket_prepare(a->fd);
    if (connect(a->fd, (struct sockaddr *)&where, size) && errno != EINPROGRESS && errno != EINTR) drop(a, strerror(errno));
    else a->state = DIALLING;
}

static int say_hello(mesh *m, attempt *a) {
    cv_group *g = m->g;
    hello *h = &a->talk.h;
    *h = (hello){.from = g->rank, .to = a->peer, .channel = a->channel, .version = CV_ABI_VERSION, .epoch = g->options.epoch};
    memcpy(h->magic, HELLO_MAGIC, sizeof h->magic);
    memcpy(h->instance, g->options.instance, sizeof h->instance);
    if (cv_random_fill(h->nonce, sizeof h->nonce)) return cv_group_fail(g, CV_E_IO, (int)g->rank, "rank %u gets no random numbers from its system", g->rank);
    sign_hello(g, h, h->tag);
    if (!send_whole(a->fd, h, sizeof *h)) drop(a, "its connection closed");
    else {
        a->state = AWAIT_REPLY;
        a->until = cv_now() + MEMBER_NS;
    }
    return CV_OK;
}

static int take_reply(mesh *m, attempt *a) {
    cv_group *g = m->g;
    int r = read_whole(a, sizeof(reply));
    if (r == 0) return CV_OK;
    if (r < 0) {
        drop(a, "it does not take this rank for a member (another key, or not listening yet)");
        return CV_OK;
    }
    memcpy(&a->talk.r, a->in, sizeof(reply));
    uint8_t tag[32];
    sign_reply(g, &a->talk, tag);
    if (memcmp(a->talk.r.magic, REPLY_MAGIC, sizeof REPLY_MAGIC) || a->talk.r.from != a->peer || !cv_mac_equal32(tag, a->talk.r.tag)) {
        drop(a, "what answers there is not that rank");
        return CV_OK;
    }
    if (a->talk.r.status == REPLY_OTHER_GROUP)
        return cv_group_fail(g, CV_E_GROUP, (int)a->peer, "rank %u is in another instance or epoch (%llu, here %llu)", a->peer, (unsigned long long)a->talk.r.epoch,
                             (unsigned long long)g->options.epoch);
    if (a->talk.r.status != REPLY_TAKEN) return cv_group_fail(g, CV_E_GROUP, (int)a->peer, "rank %u is connected with another process that says it is rank %u", a->peer, g->rank);
    uint8_t confirm[32];
    sign_confirm(g, &a->talk, confirm);
    if (!send_whole(a->fd, confirm, sizeof confirm)) {
        drop(a, "its connection closed");
        return CV_OK;
    }
    return adopt(m, a, true);
}

static int progress_dial(mesh *m, attempt *a, bool ready) {
    if (a->state == DIALLING && ready) {
        int error = 0;
        socklen_t size = sizeof error;
        if (getsockopt(a->fd, SOL_SOCKET, SO_ERROR, &error, &size)) error = errno;
        if (error) drop(a, strerror(error));
        else return say_hello(m, a);
    } else if (a->state == AWAIT_REPLY && ready) return take_reply(m, a);
    if ((a->state == DIALLING || a->state == AWAIT_REPLY) && cv_now() >= a->until) drop(a, a->state == DIALLING ? "its address does not answer" : "it took the connection but says nothing");
    return CV_OK;
}

/* ---- answering ---- */

static void turn_away(mesh *m, attempt *a) {
    drop(a, "");
    atomic_fetch_add(&m->g->strangers, 1);
}

static void take_hello(mesh *m, attempt *a) {
    cv_group *g = m->g;
    int r = read_whole(a, sizeof(hello));
    if (r == 0) return;
    hello *h = &a->talk.h;
    uint8_t tag[32];
    if (r > 0) {
        memcpy(h, a->in, sizeof *h);
        sign_hello(g, h, tag);
    }
    /* Strangers get no answer at all, whatever they sent. */
    if (r < 0 || memcmp(h->magic, HELLO_MAGIC, sizeof HELLO_MAGIC) || !cv_mac_equal32(tag, h->tag) || h->to != g->rank || h->from <= g->rank || h->from >= g->size ||
        h->channel < m->first || h->channel > m->last) {
        turn_away(m, a);
        return;
    }
    a->peer = h->from;
    a->channel = h->channel;
    a->got = 0;
    bool same = h->version == CV_ABI_VERSION && h->epoch == g->options.epoch && memcmp(h->instance, g->options.instance, sizeof h->instance) == 0;
    bool twice = m->conns[a->peer][a->channel - m->first].fd >= 0;
    reply *answer = &a->talk.r;
    *answer = (reply){.status = !same ? REPLY_OTHER_GROUP : twice ? REPLY_DOUBLE : REPLY_TAKEN, .from = g->rank, .epoch = g->options.epoch};
    memcpy(answer->magic, REPLY_MAGIC, sizeof answer->magic);
    if (cv_random_fill(answer->nonce, sizeof answer->nonce)) {
        turn_away(m, a);
        return;
    }
    sign_reply(g, &a->talk, answer->tag);
    if (!send_whole(a->fd, answer, sizeof *answer) || answer->status != REPLY_TAKEN) {
        turn_away(m, a);
        return;
    }
    a->state = AWAIT_CONFIRM;
    a->until = cv_now() + MEMBER_NS;
}

static int take_confirm(mesh *m, attempt *a) {
    int r = read_whole(a, 32);
    if (r == 0) return CV_OK;
    uint8_t tag[32];
    sign_confirm(m->g, &a->talk, tag);
    if (r < 0 || !cv_mac_equal32(tag, a->in) || m->conns[a->peer][a->channel - m->first].fd >= 0) {
        turn_away(m, a);
        return CV_OK;
    }
    return adopt(m, a, false);
}

static int progress_arrival(mesh *m, attempt *a, bool ready) {
    int code = CV_OK;
    if (ready && a->state == AWAIT_HELLO) take_hello(m, a);
    else if (ready && a->state == AWAIT_CONFIRM) code = take_confirm(m, a);
    if ((a->state == AWAIT_HELLO || a->state == AWAIT_CONFIRM) && cv_now() >= a->until) turn_away(m, a);
    return code;
}

/* Room for one more arrival: a free place, else the oldest that has shown no key. NULL when all are members. */
static attempt *place_for_arrival(mesh *m) {
    attempt *oldest = NULL;
    for (size_t i = 0; i < MAX_ARRIVALS; i++) {
        attempt *a = &m->arrivals[i];
        if (a->state == IDLE || a->state == DONE) return a;
        if (a->state == AWAIT_HELLO && (!oldest || a->until < oldest->until)) oldest = a;
    }
    if (oldest) turn_away(m, oldest);
    return oldest;
}

static void take_arrivals(mesh *m) {
    for (int i = 0; i < 32; i++) { /* then look at the others: a flood must not keep them waiting */
        int fd = accept(m->g->listener, NULL, NULL);
        if (fd < 0) {
            if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) poll(NULL, 0, 5); /* the listener stays readable: do not spin */
            return;
        }
        cv_socket_prepare(fd);
        attempt *a = place_for_arrival(m);
        if (!a) {
            close(fd);
            atomic_fetch_add(&m->g->strangers, 1);
            continue;
        }
        *a = (attempt){.state = AWAIT_HELLO, .fd = fd, .until = cv_now() + STRANGER_NS};
    }
}

/* ---- all of them ---- */

static int out_of_time(mesh *m) {
    cv_group *g = m->g;
    for (uint32_t r = 0; r < g->size; r++) {
        if (r == g->rank) continue;
        for (uint32_t ch = m->first; ch <= m->last; ch++) {
            if (m->conns[r][ch - m->first].fd >= 0) continue;
            const char *why = "it has not called";
            for (size_t i = 0; i < m->n_dials; i++)
                if (m->dials[i].peer == r && m->dials[i].channel == ch && m->dials[i].why[0]) why = m->dials[i].why;
            return cv_group_fail(g, CV_E_GROUP, (int)r, "rank %u did not connect in time: %s", r, why);
        }
    }
    return cv_group_fail(g, CV_E_GROUP, -1, "connecting took too long");
}

/* A rank whose control connection ended while other channels are being connected. */
static int check_controls(mesh *m) {
    cv_group *g = m->g;
    if (m->first == CV_CHANNEL_CONTROL) return CV_OK;
    for (uint32_t r = 0; r < g->size; r++) {
        char byte;
        if (r == g->rank || recv(g->peers[r].control.fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) != 0) continue;
        return cv_group_fail(g, CV_E_GROUP, (int)r, "rank %u ended while the group connected", r);
    }
    return CV_OK;
}

static int mesh_turn(mesh *m, struct pollfd *fds) {
    cv_group *g = m->g;
    uint64_t now = cv_now(), next = m->until;
    if (now >= m->until) return out_of_time(m);
    nfds_t n = 0;
    fds[n++] = (struct pollfd){.fd = g->wake[0], .events = POLLIN};
    fds[n++] = (struct pollfd){.fd = g->listener, .events = POLLIN};
    for (size_t i = 0; i < m->n_dials; i++) {
        attempt *a = &m->dials[i];
        if (a->state == IDLE && now >= a->retry_at) dial(m, a);
        if (a->state == IDLE && a->retry_at < next) next = a->retry_at;
        fds[n++] = (struct pollfd){.fd = a->fd, .events = a->state == DIALLING ? POLLOUT : POLLIN};
    }
    for (size_t i = 0; i < MAX_ARRIVALS; i++) fds[n++] = (struct pollfd){.fd = m->arrivals[i].fd, .events = POLLIN};
    poll(fds, n, cv_ms_until(next, 50));
    int code = atomic_load(&g->code);
    if (code == CV_OK) code = check_controls(m);
    for (size_t i = 0; i < m->n_dials && code == CV_OK; i++) code = progress_dial(m, &m->dials[i], fds[2 + i].revents != 0);
    for (size_t i = 0; i < MAX_ARRIVALS && code == CV_OK; i++) code = progress_arrival(m, &m->arrivals[i], fds[2 + m->n_dials + i].revents != 0);
    if (code == CV_OK && fds[1].revents) take_arrivals(m);
    return code;
}

int cv_mesh_connect(cv_group *g, uint32_t first, uint32_t last, cv_conn *const *conns, uint64_t until_ns) {
    size_t channels = last - first + 1;
    mesh *m = calloc(1, sizeof *m);
    attempt *dials = calloc(g->rank * channels + 1, sizeof *dials);
    struct pollfd *fds = calloc(2 + g->rank * channels + MAX_ARRIVALS, sizeof *fds);
    int code = CV_OK;
    if (!m || !dials || !fds) code = cv_group_fail(g, CV_E_MEMORY, (int)g->rank, "rank %u has no memory to connect", g->rank);
    else {
        *m = (mesh){.g = g, .first = first, .last = last, .conns = conns, .dials = dials, .until = until_ns, .missing = (g->size - 1) * channels};
        for (size_t i = 0; i < MAX_ARRIVALS; i++) m->arrivals[i].fd = -1;
        for (uint32_t r = 0; r < g->rank; r++)
            for (uint32_t ch = first; ch <= last; ch++) dials[m->n_dials++] = (attempt){.fd = -1, .peer = r, .channel = ch};
        while (code == CV_OK && m->missing > 0) code = mesh_turn(m, fds);
        for (size_t i = 0; i < m->n_dials; i++) drop(&dials[i], "");
        for (size_t i = 0; i < MAX_ARRIVALS; i++) drop(&m->arrivals[i], "");
    }
    free(m);
    free(dials);
    free(fds);
    return code;
}
