/* monitor.c — the thread that owns the control connections of a connected group: it sends a heartbeat to every rank, notices ranks that
 * end, fall silent or say goodbye, and tells the others about this rank's first error. It runs beside the compute threads, so a
 * step of ten seconds raises no false alarm, and a stopped process (whose monitor is stopped with it) is noticed all the same. */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "group.h"

#define BEATS_A_SILENCE 5
#define FAREWELL_NS (300 * CV_MS) /* how long closing waits for the others to see the goodbye */

typedef struct {
    cv_transfer in, out;
    uint8_t bytes[sizeof(cv_control_head) + CV_ERROR_BYTES]; /* of the message that `out` sends */
    uint64_t heard_ns;
    bool sending, over; /* over: its connection has ended */
    bool told, bye_sent, bye_seen, owes_seen;
} contact;

typedef struct {
    cv_group *g;
    contact c[CV_MAX_RANKS];
    uint64_t beat_ns, next_beat, last_turn, farewell_until;
} watch;

void cv_monitor_look(cv_group *g) {
    if (write(g->monitor_wake[1], "x", 1) < 0) { /* full: it will look anyway */
    }
}

static size_t compose(uint8_t *out, uint32_t kind, int culprit, const char *text) {
    cv_control_head head = {kind, culprit};
    memcpy(out, &head, sizeof head);
    size_t n = text ? strlen(text) : 0;
    if (n > CV_ERROR_BYTES) n = CV_ERROR_BYTES;
    if (n) memcpy(out + sizeof head, text, n);
    return sizeof head + n;
}

/* The text in which the other ranks hear of this rank's first error. */
static size_t compose_abort(cv_group *g, uint8_t *out) {
    char text[CV_ERROR_BYTES], said[CV_ERROR_BYTES + 64];
    cv_group_error(g, text, sizeof text);
    int culprit = g->culprit;
    if (atomic_load(&g->code) == CV_E_ABORTED) snprintf(said, sizeof said, "rank %u aborted: %s", g->rank, text);
    else snprintf(said, sizeof said, "%s", text);
    return compose(out, CV_CONTROL_ABORT, culprit, said);
}

/* Chooses the next message to a rank, the most urgent first. */
static void choose(watch *w, uint32_t r, bool beat) {
    cv_group *g = w->g;
    contact *c = &w->c[r];
    size_t n = 0;
    if (atomic_load(&g->code) != CV_OK) {
        if (!c->told) n = compose_abort(g, c->bytes);
        c->told = true;
    } else if (atomic_load(&g->closing) && !c->bye_sent) {
        n = compose(c->bytes, CV_CONTROL_BYE, -1, NULL);
        c->bye_sent = true;
    }
    if (!n && c->owes_seen) {
        n = compose(c->bytes, CV_CONTROL_BYE_SEEN, -1, NULL);
        c->owes_seen = false;
    }
    if (!n && beat && atomic_load(&g->code) == CV_OK) n = compose(c->bytes, CV_CONTROL_BEAT, -1, NULL);
    if (!n) return;
    c->out = (cv_transfer){.peer = r, .channel = CV_CHANNEL_CONTROL, .sending = true, .data = c->bytes, .bytes = n};
    c->sending = true;
}

static void ended(watch *w, uint32_t r, int result) {
    cv_group *g = w->g;
    contact *c = &w->c[r];
    c->over = true;
    c->sending = false;
    if (atomic_load(&g->peers[r].left) || atomic_load(&g->closing)) return;
    if (result == CV_CONN_BROKEN) cv_group_fail(g, CV_E_GROUP, (int)r, "rank %u broke the protocol: %s", r, g->peers[r].control.why);
    else cv_group_fail(g, CV_E_GROUP, (int)r, "rank %u is gone: its process ended or its connection broke (%s)", r, g->peers[r].control.why);
}

static void heard(watch *w, uint32_t r) {
    cv_group *g = w->g;
    contact *c = &w->c[r];
    cv_control_head head = {0, -1};
    if (c->in.bytes >= sizeof head) memcpy(&head, c->in.data, sizeof head);
    switch (head.kind) {
    case CV_CONTROL_BEAT: break;
    case CV_CONTROL_BYE:
        atomic_store(&g->peers[r].left_ns, cv_now());
        atomic_store(&g->peers[r].left, true);
        c->owes_seen = true;
        break;
    case CV_CONTROL_BYE_SEEN: c->bye_seen = true; break;
    case CV_CONTROL_ABORT: {
        size_t n = c->in.bytes - sizeof head;
        cv_group_fail(g, CV_E_GROUP, head.culprit, "%.*s", (int)(n < CV_ERROR_BYTES ? n : CV_ERROR_BYTES), (const char *)c->in.data + sizeof head);
        break;
    }
    default: cv_group_fail(g, CV_E_GROUP, (int)r, "rank %u broke the protocol: a control message of kind %u", r, head.kind);
    }
}

static void listen_to(watch *w, uint32_t r) {
    contact *c = &w->c[r];
    for (;;) {
        int n = cv_conn_progress(&w->g->peers[r].control, &c->in);
        if (n < 0) {
            ended(w, r, n);
            return;
        }
        if (n > 0) c->heard_ns = cv_now();
        if (!c->in.finished) {
            if (n == 0) return;
            continue;
        }
        heard(w, r);
        free(c->in.data);
        c->in = (cv_transfer){.peer = r, .channel = CV_CHANNEL_CONTROL, .any = true, .most = CV_CONTROL_MOST};
    }
}

static void talk_to(watch *w, uint32_t r, bool beat) {
    contact *c = &w->c[r];
    for (int i = 0; i < 4; i++) {
        if (!c->sending) choose(w, r, beat);
        if (!c->sending) return;
        beat = false;
        int n = cv_conn_progress(&w->g->peers[r].control, &c->out);
        if (n < 0) {
            /* What it sent before it ended may say why. */
            listen_to(w, r);
            if (!c->over) ended(w, r, n);
            return;
        }
        if (!c->out.finished) return;
        c->sending = false;
    }
}

/* A rank may be silent for silence_ms while a call with a deadline runs here, twice that while nothing waits for it. */
static uint64_t silence_ns(cv_group *g) {
    uint64_t ns = g->options.silence_ms * CV_MS;
    return atomic_load(&g->waiting) > 0 ? ns : 2 * ns;
}

static void check_silence(watch *w) {
    cv_group *g = w->g;
    if (atomic_load(&g->code) != CV_OK || atomic_load(&g->closing)) return;
    uint64_t now = cv_now(), limit = silence_ns(g);
    for (uint32_t r = 0; r < g->size; r++) {
        contact *c = &w->c[r];
        if (r == g->rank || c->over || atomic_load(&g->peers[r].left) || now - c->heard_ns <= limit) continue;
        cv_group_fail(g, CV_E_GROUP, (int)r, "rank %u has been silent for %llu ms: its process is stopped, its host is down or its cable is out", r,
                      (unsigned long long)((now - c->heard_ns) / CV_MS));
        return;
    }
}

/* Closing: true when everybody has seen the goodbye (or the error), or has ended, or time is up. */
static bool may_end(watch *w) {
    cv_group *g = w->g;
    if (!atomic_load(&g->closing)) return false;
    uint64_t now = cv_now();
    if (!w->farewell_until) w->farewell_until = now + FAREWELL_NS;
    if (now >= w->farewell_until) return true;
    bool failed = atomic_load(&g->code) != CV_OK;
    for (uint32_t r = 0; r < g->size; r++) {
        contact *c = &w->c[r];
        if (r == g->rank || c->over) continue;
        if (c->sending || (failed ? !c->told : !c->bye_seen && !atomic_load(&g->peers[r].left)) || c->owes_seen) return false;
    }
    return true;
}

static void turn(watch *w) {
    cv_group *g = w->g;
    struct pollfd fds[CV_MAX_RANKS + 1];
    nfds_t n = 0;
    fds[n++] = (struct pollfd){.fd = g->monitor_wake[0], .events = POLLIN};
    for (uint32_t r = 0; r < g->size; r++)
        if (r != g->rank && !w->c[r].over) fds[n++] = (struct pollfd){.fd = g->peers[r].control.fd, .events = (short)(POLLIN | (w->c[r].sending ? POLLOUT : 0))};
    uint64_t until = w->next_beat;
    if (w->farewell_until && w->farewell_until < until) until = w->farewell_until;
    poll(fds, n, cv_ms_until(until, 1000));
    char drain[64];
    while (read(g->monitor_wake[0], drain, sizeof drain) > 0) {
    }
    uint64_t now = cv_now();
    /* This process itself did not run (stopped, asleep, starved): that is not the others' silence. */
    if (now - w->last_turn > 2 * w->beat_ns)
        for (uint32_t r = 0; r < g->size; r++) {
            uint64_t heard_ns = w->c[r].heard_ns + (now - w->last_turn - w->beat_ns);
            w->c[r].heard_ns = heard_ns < now ? heard_ns : now;
        }
    w->last_turn = now;
    bool beat = now >= w->next_beat;
    if (beat) w->next_beat = now + w->beat_ns;
    for (uint32_t r = 0; r < g->size; r++)
        if (r != g->rank && !w->c[r].over) listen_to(w, r);
    for (uint32_t r = 0; r < g->size; r++)
        if (r != g->rank && !w->c[r].over) talk_to(w, r, beat);
    if (beat && g->wire->beat) g->wire->beat(g);
    check_silence(w);
}

static void *monitor(void *arg) {
    watch *w = arg;
    do turn(w);
    while (!may_end(w));
    for (uint32_t r = 0; r < w->g->size; r++) free(w->c[r].in.data);
    free(w);
    return NULL;
}

int cv_monitor_start(cv_group *g) {
    watch *w = calloc(1, sizeof *w);
    if (!w) return cv_group_fail(g, CV_E_MEMORY, (int)g->rank, "rank %u has no memory to watch the others", g->rank);
    w->g = g;
    w->beat_ns = g->options.silence_ms * CV_MS / BEATS_A_SILENCE;
    w->last_turn = w->next_beat = cv_now();
    for (uint32_t r = 0; r < g->size; r++) {
        w->c[r].heard_ns = w->last_turn;
        w->c[r].in = (cv_transfer){.peer = r, .channel = CV_CHANNEL_CONTROL, .any = true, .most = CV_CONTROL_MOST};
    }
    if (pthread_create(&g->monitor, NULL, monitor, w)) {
        free(w);
        return cv_group_fail(g, CV_E_MEMORY, (int)g->rank, "rank %u cannot start its monitor", g->rank);
    }
    g->monitor_running = true;
    return CV_OK;
}

void cv_monitor_tell_all(cv_group *g) {
    if (g->monitor_running) return; /* it does */
    uint8_t bytes[sizeof(cv_control_head) + CV_ERROR_BYTES];
    size_t n = compose_abort(g, bytes);
    for (uint32_t r = 0; r < g->size; r++) {
        cv_conn *c = &g->peers[r].control;
        if (r == g->rank || c->fd < 0 || c->out_open) continue;
        cv_transfer t = {.peer = r, .channel = CV_CHANNEL_CONTROL, .sending = true, .data = bytes, .bytes = n};
        cv_conn_progress(c, &t); /* one attempt: a rank that does not take it sees the connection close */
    }
}
