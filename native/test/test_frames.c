/* test_frames.c — hostile bytes: what reaches a connection between ranks after its handshake, and what reaches a listening port while
 * a group connects. Nothing false is ever taken, and strangers never disturb the group. */
#include <arpa/inet.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/socket.h>

#include "../transport/conn.h"
#include "check.h"
#include "ranks.h"

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

/* ---- frames ---- */

static atomic_uint_fast64_t mac_ns;

typedef struct {
    cv_conn a, b; /* rank 0's and rank 1's end */
} pair;

static void set_keys(cv_conn *c, unsigned char send, unsigned char receive) {
    memset(c->send_key, send, sizeof c->send_key);
    memset(c->recv_key, receive, sizeof c->recv_key);
}

static void pair_open(pair *p) {
    int fd[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, fd)) exit(3);
    cv_conn_init(&p->a, fd[0], 0, 1, CV_CHANNEL_STEP, 5, &mac_ns);
    cv_conn_init(&p->b, fd[1], 1, 0, CV_CHANNEL_STEP, 5, &mac_ns);
    set_keys(&p->a, 1, 2);
    set_keys(&p->b, 2, 1);
}

static void pair_close(pair *p) {
    cv_conn_close(&p->a);
    cv_conn_close(&p->b);
}

/* The bytes of one message as the sender puts them on the wire. */
static size_t record(pair *p, uint8_t *data, size_t bytes, uint8_t *out, size_t room) {
    cv_transfer t = {.peer = 1, .channel = CV_CHANNEL_STEP, .sending = true, .data = data, .bytes = bytes};
    cv_conn_progress(&p->a, &t);
    size_t n = 0;
    for (ssize_t k; n < room && (k = recv(p->b.fd, out + n, room - n, MSG_DONTWAIT)) > 0;) n += (size_t)k;
    return t.finished ? n : 0;
}

/* Lets rank 1 read `n` bytes as if the network had brought them. The result of progress; *t says what was taken. */
static int feed(pair *p, const uint8_t *bytes, size_t n, cv_transfer *t) {
    if (n && send(p->a.fd, bytes, n, 0) != (ssize_t)n) exit(3);
    return cv_conn_progress(&p->b, t);
}

static cv_transfer expect(uint8_t *data, size_t bytes) { return (cv_transfer){.peer = 0, .channel = CV_CHANNEL_STEP, .data = data, .bytes = bytes}; }

typedef enum { AS_IS, REPEATED, SKIPPED, FLIPPED, OTHER_KEY, OTHER_EPOCH, OTHER_CHANNEL, OTHER_RANK, OVERSIZED, LONGER, RANDOM, BACKWARDS } change;
static const char *const change_names[] = {"as it is", "repeated", "after a lost one", "with one bit changed", "under another key", "of another epoch", "of another channel", "of another rank",
                                           "that says it is oversized", "longer than its message", "of random bytes", "sent back to its sender"};

static void frames(cv_checks *c, change what) {
    char name[100];
    snprintf(name, sizeof name, "a frame %s is %s", change_names[what], what == AS_IS ? "taken" : "refused");
    cv_case(c, name);
    unsigned long long seed = 77 + what;
    for (int turn = 0; turn < 200; turn++) {
        pair p;
        pair_open(&p);
        uint8_t data[400], got[400], wire[1024];
        size_t bytes = 1 + cv_random(&seed) % 300;
        for (size_t i = 0; i < bytes; i++) data[i] = (uint8_t)cv_random(&seed);
        if (what == OTHER_KEY) set_keys(&p.a, 3, 2);
        if (what == OTHER_EPOCH) p.a.epoch = 4;
        if (what == OTHER_CHANNEL) p.a.channel = CV_CHANNEL_RESULT;
        if (what == OTHER_RANK) p.a.self = 2;
        if (what == SKIPPED) record(&p, data, bytes, wire, sizeof wire);
        size_t n = record(&p, data, bytes, wire, sizeof wire);
        cv_transfer t = expect(got, bytes);
        memset(got, 0, sizeof got);
        if (what == REPEATED) {
            if (feed(&p, wire, n, &t) != 1 || !t.finished) cv_check(c, false, "the first frame was refused: %s", p.b.why);
            t = expect(got, bytes);
        }
        if (what == FLIPPED) wire[cv_random(&seed) % n] ^= (uint8_t)(1u << cv_random(&seed) % 8);
        if (what == OVERSIZED) memcpy(wire + 8, &(uint32_t){CV_FRAME_MAX + 1 + (uint32_t)(cv_random(&seed) >> 40)}, 4);
        if (what == LONGER) memcpy(wire + 8, &(uint32_t){(uint32_t)bytes + 1}, 4);
        if (what == RANDOM)
            for (size_t i = 0; i < n; i++) wire[i] = (uint8_t)cv_random(&seed);
        int r = 0;
        if (what == BACKWARDS) {
            cv_transfer back = {.peer = 1, .channel = CV_CHANNEL_STEP, .data = got, .bytes = bytes};
            if (send(p.b.fd, wire, n, 0) != (ssize_t)n) exit(3);
            r = cv_conn_progress(&p.a, &back);
            t.finished = back.finished;
        } else r = feed(&p, wire, n, &t);
        if (what == AS_IS) cv_check(c, r == 1 && t.finished && memcmp(data, got, bytes) == 0, "turn %d: %d %s", turn, r, p.b.why);
        else cv_check(c, r == CV_CONN_BROKEN && !t.finished, "turn %d: result %d, taken %d", turn, r, t.finished);
        pair_close(&p);
    }
    cv_end_case(c);
}

static void truncated(cv_checks *c) {
    cv_case(c, "a truncated frame is never taken, at any length, and a closed connection ends the wait");
    for (size_t cut = 0; cut < 200; cut++) {
        pair p;
        pair_open(&p);
        uint8_t data[136], got[136], wire[1024];
        memset(data, 9, sizeof data);
        size_t n = record(&p, data, sizeof data, wire, sizeof wire);
        cv_transfer t = expect(got, sizeof got);
        int r = feed(&p, wire, cut < n ? cut : n - 1, &t);
        cv_check(c, r >= 0 && !t.finished, "%zu bytes: %d", cut, r);
        shutdown(p.a.fd, SHUT_RDWR);
        cv_check(c, cv_conn_progress(&p.b, &t) == CV_CONN_CLOSED && !t.finished, "%zu bytes, then closed", cut);
        pair_close(&p);
    }
    cv_end_case(c);
}

static void in_pieces(cv_checks *c) {
    cv_case(c, "messages that arrive in pieces of any size are put together");
    unsigned long long seed = 5;
    pair p;
    pair_open(&p);
    static uint8_t data[700000], got[700000], wire[800000];
    for (int turn = 0; turn < 60; turn++) {
        size_t bytes = cv_random(&seed) % (turn % 6 ? 3000 : sizeof data);
        for (size_t i = 0; i < bytes; i++) data[i] = (uint8_t)(i * 31 + (size_t)turn);
        cv_transfer out = {.peer = 1, .channel = CV_CHANNEL_STEP, .sending = true, .data = data, .bytes = bytes}, in = expect(got, bytes);
        while (!in.finished) {
            if (!out.finished && cv_conn_progress(&p.a, &out) < 0) break;
            /* Take what is on the wire out and bring it back in pieces. */
            size_t n = 0;
            for (ssize_t k; (k = recv(p.b.fd, wire + n, sizeof wire - n, MSG_DONTWAIT)) > 0;) n += (size_t)k;
            bool bad = false;
            for (size_t at = 0; at < n && !bad;) {
                size_t piece = 1 + cv_random(&seed) % 5000;
                if (piece > n - at) piece = n - at;
                if (send(p.a.fd, wire + at, piece, 0) != (ssize_t)piece) exit(3);
                bad = cv_conn_progress(&p.b, &in) < 0;
                at += piece;
            }
            if (bad || (out.finished && n == 0 && !in.finished)) break;
        }
        cv_check(c, in.finished && memcmp(data, got, bytes) == 0, "turn %d, %zu bytes: %s", turn, bytes, p.b.why);
    }
    pair_close(&p);
    cv_end_case(c);
}

static void too_large(cv_checks *c) {
    cv_case(c, "a message larger than the receiver takes is refused before memory is taken for it");
    pair p;
    pair_open(&p);
    uint8_t data[200] = {0}, wire[400];
    size_t n = record(&p, data, sizeof data, wire, sizeof wire);
    cv_transfer t = {.peer = 0, .channel = CV_CHANNEL_STEP, .any = true, .most = 199};
    cv_check(c, feed(&p, wire, n, &t) == CV_CONN_BROKEN && !t.data, "%s", p.b.why);
    pair_close(&p);
    cv_end_case(c);
}

/* ---- strangers ---- */

static int dial(int port) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&to, sizeof to)) {
        close(fd);
        fd = -1;
    }
    return fd;
}

static int port_of(const rank_report *r) {
    uint32_t port; /* cv_address.port: see group.h; the address is opaque to everybody else */
    memcpy(&port, r->address + 60, sizeof port);
    return (int)port;
}

typedef struct {
    rank_world *w;
    atomic_int stop;
    int calls;
    uint8_t recorded[112]; /* a true hello of rank 1 to rank 0, played again */
    bool has_recorded;
} intruder;

/* Calls every rank's port with garbage, silence, half a hello and a recorded one, until the group stands. */
static void *intrude(void *arg) {
    intruder *in = arg;
    unsigned long long seed = 99;
    int silent[64], n_silent = 0;
    while (!atomic_load(&in->stop)) {
        for (uint32_t r = 0; r < in->w->size; r++) {
            if (!atomic_load(&in->w->rank[r].ready)) continue;
            int fd = dial(port_of(&in->w->rank[r]));
            if (fd < 0) continue;
            in->calls++;
            uint8_t junk[4096];
            for (size_t i = 0; i < sizeof junk; i++) junk[i] = (uint8_t)cv_random(&seed);
            memcpy(junk, "CVHELO2", 8);
            size_t n = in->calls % 4 == 0 ? 0 : in->calls % 4 == 1 ? 50 : in->calls % 4 == 2 ? 112 : sizeof junk;
            const void *what = in->has_recorded && in->calls % 4 == 2 ? in->recorded : junk;
            if (n && send(fd, what, n, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) n = 0;
            if (n < 112 && n_silent < 64) silent[n_silent++] = fd; /* stays open and says no more */
            else close(fd);
        }
        usleep(200);
    }
    for (int i = 0; i < n_silent; i++) close(silent[i]);
    return NULL;
}

static int body_with_strangers(cv_group *g, uint32_t rank, rank_world *w) {
    cv_group_stats_record s;
    cv_group_stats(g, &s, NULL, 0);
    w->rank[rank].number = s.strangers;
    float x[1000];
    for (int turn = 0; turn < 50; turn++) {
        for (int i = 0; i < 1000; i++) x[i] = (float)rank;
        int code = cv_all_reduce(g, (cv_members){0, w->size}, x, 1000, RANKS_PATIENCE_MS);
        if (code != CV_OK) return code;
        if (x[7] != 3) return -100;
    }
    return CV_OK;
}

/* Plays rank 0 for a real rank 1 and keeps the hello that it sends. */
static bool record_hello(const rank_world *w, uint8_t out[112]) {
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof at;
    if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 4) || getsockname(listener, (struct sockaddr *)&at, &size)) exit(3);
    uint8_t all[3 * 4096];
    size_t bytes = 4096;
    char err[512];
    cv_group_options o = ranks_options(w, 1);
    cv_group *g = NULL;
    if (cv_group_open(&o, sizeof o, all, &bytes, &g, err, sizeof err) != CV_OK) exit(3);
    uint32_t port = ntohs(at.sin_port);
    uint64_t sizes[3] = {bytes, bytes, bytes};
    for (uint32_t r = 3; r-- > 0;) {
        memmove(all + r * bytes, all, bytes);
        memcpy(all + r * bytes + 8, &r, sizeof r); /* cv_address.rank */
    }
    memcpy(all + 60, &port, sizeof port); /* rank 0 is here */
    bool ok = cv_group_connect_start(g, all, sizes, RANKS_PATIENCE_MS, err, sizeof err) == CV_OK;
    int fd = ok ? accept(listener, NULL, NULL) : -1;
    ok = fd >= 0 && recv(fd, out, 112, MSG_WAITALL) == 112;
    if (fd >= 0) close(fd);
    cv_group_close(g); /* while it connects: must end at once */
    close(listener);
    return ok;
}

static void strangers(cv_checks *c, uint32_t kind) {
    char name[120];
    snprintf(name, sizeof name, "a group connects and computes while strangers call its ports (%s)", kind == CV_TRANSPORT_TCP ? "TCP" : "shared memory");
    cv_case(c, name);
    rank_world *w = ranks_patient(3, kind);
    intruder in = {.w = w};
    in.has_recorded = record_hello(w, in.recorded);
    cv_check(c, in.has_recorded, "no hello was sent");
    w->hold_ms = 300; /* meanwhile the strangers have the other ranks' ports for themselves */
    pthread_t t;
    ranks_start(w, body_with_strangers);
    pthread_create(&t, NULL, intrude, &in);
    for (uint32_t r = 0; r < 3; r++) ranks_await(&w->rank[r].ended, 1, RANKS_PATIENCE_MS);
    atomic_store(&in.stop, 1);
    pthread_join(t, NULL);
    cv_check(c, ranks_finish(w), "a rank did not end in time, or badly");
    for (uint32_t r = 0; r < 3; r++) cv_check(c, w->rank[r].code == CV_OK, "rank %u: %d %s", r, w->rank[r].code, w->rank[r].text);
    cv_check(c, in.calls > 0 && w->rank[0].number + w->rank[1].number + w->rank[2].number > 0, "%d calls of strangers, none was turned away", in.calls);
    ranks_free(w);
    cv_end_case(c);
}

int main(void) {
    cv_checks c = {0};
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (change what = AS_IS; what <= BACKWARDS; what++) frames(&c, what);
    truncated(&c);
    in_pieces(&c);
    too_large(&c);
    strangers(&c, CV_TRANSPORT_TCP);
    strangers(&c, CV_TRANSPORT_SHM);
    return cv_report(&c);
}
