/* exchange.c — sends and receives messages: many transfers at once, with spinning, yielding and sleeping, deadlines, and the failure
 * of the group in between. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "group.h"

/* A message between two computing ranks takes some 10 µs: spin a few times that long, then sleep. With more ranks than cores pure spinning
 * costs a time slice (16 ms measured) a message. Yielding instead would give the core away until the next tick to whatever runs in the
 * background, at the lowest priority too; who sleeps is woken at once. */
#define SPIN_NS 50000ull
/* Results are taken by a thread beside the one that computes: spinning it would only take that one's core. */
static uint64_t spin_ns(const cv_transfer *t) { return t->channel == CV_CHANNEL_RESULT && !t->sending ? 0 : SPIN_NS; }
/* How long data may still come from a rank that said goodbye, after the last byte. */
#define LEFT_NS (300 * CV_MS)
#define LONGEST_SLEEP_NS (100 * CV_MS)

static int code_of(cv_group *g) { return atomic_load_explicit(&g->code, memory_order_acquire); }

void cv_add_floats(float *x, const float *in, size_t n, bool in_first) {
    const float *a = in_first ? in : x, *b = in_first ? x : in;
    for (size_t i = 0; i < n; i++) x[i] = a[i] + b[i];
}

int cv_begin(cv_group *g) {
    atomic_fetch_add(&g->calls, 1);
    int code = code_of(g);
    if (code == CV_OK && atomic_load(&g->state) == CV_GROUP_READY) return CV_OK;
    atomic_fetch_sub(&g->calls, 1);
    return code != CV_OK ? code : CV_E_ARGUMENT;
}

void cv_end(cv_group *g) { atomic_fetch_sub(&g->calls, 1); }

/* Names the ranks that a call still waits for. */
static int timed_out(cv_group *g, const cv_transfer *t, size_t n, uint64_t waited_ns, const char *what) {
    char ranks[256];
    size_t used = 0;
    uint64_t named = 0;
    int count = 0, culprit = -1;
    for (size_t i = 0; i < n; i++) {
        if (t[i].finished || (named >> t[i].peer & 1)) continue;
        named |= 1ull << t[i].peer;
        if (count++ == 0) culprit = (int)t[i].peer;
        int k = snprintf(ranks + used, sizeof ranks - used, "%s%u", used ? ", " : "", t[i].peer);
        if (k > 0 && used + (size_t)k < sizeof ranks) used += (size_t)k;
    }
    return cv_group_fail(g, CV_E_GROUP, count == 1 ? culprit : -1, "rank%s %s did not answer within %llu ms (%s)", count == 1 ? "" : "s", ranks,
                         (unsigned long long)(waited_ns / CV_MS), what);
}

static int left_behind(cv_group *g, const cv_transfer *t, size_t n, uint64_t now, uint64_t moved_at) {
    for (size_t i = 0; i < n; i++) {
        cv_peer *p = &g->peers[t[i].peer];
        if (t[i].finished || !atomic_load(&p->left)) continue;
        uint64_t since = atomic_load(&p->left_ns);
        if (since < moved_at) since = moved_at;
        if (now > since + LEFT_NS) return cv_group_fail(g, CV_E_GROUP, (int)t[i].peer, "rank %u left the group", t[i].peer);
    }
    return CV_OK;
}

static int run(cv_group *g, const cv_wire *wire, cv_transfer *t, size_t n, uint64_t until, const char *what) {
    uint64_t began = cv_now(), moved_at = began, idle_since = 0;
    for (;;) {
        int code = code_of(g);
        if (code != CV_OK) return code;
        size_t open = 0;
        bool moved = false;
        for (size_t i = 0; i < n; i++) {
            if (t[i].finished) continue;
            int r = wire->progress(g, &t[i]);
            if (r < 0) return r;
            moved |= r > 0;
            open += !t[i].finished;
        }
        if (!open) return CV_OK;
        if (moved) {
            idle_since = 0;
            if (until == CV_NEVER) continue;
        }
        uint64_t now = cv_now();
        if (now >= until) return timed_out(g, t, n, now - began, what);
        if (moved) {
            moved_at = now;
            continue;
        }
        code = left_behind(g, t, n, now, moved_at);
        if (code != CV_OK) return code;
        if (!idle_since) idle_since = now;
        if (now - idle_since < spin_ns(t)) cv_cpu_relax();
        else wire->wait(g, t, n, until < now + LONGEST_SLEEP_NS ? until : now + LONGEST_SLEEP_NS, now - idle_since);
    }
}

int cv_run(cv_group *g, const cv_wire *wire, cv_transfer *t, size_t n, uint64_t until, const char *what) {
    if (until == CV_NEVER) return run(g, wire, t, n, until, what);
    atomic_fetch_add(&g->waiting, 1);
    int code = run(g, wire, t, n, until, what);
    atomic_fetch_sub(&g->waiting, 1);
    return code;
}

/* One message with one peer. any: *t gives size and data back. */
static int one(cv_group *g, cv_transfer *t, uint32_t timeout_ms, bool may_wait_for_ever, const char *what) {
    if (!g || t->peer >= g->size || t->peer == g->rank || t->channel >= CV_CHANNEL_COUNT || (!t->data && t->bytes && !t->any) ||
        t->bytes > g->options.max_message || (timeout_ms == 0 && !may_wait_for_ever))
        return CV_E_ARGUMENT;
    int code = cv_begin(g);
    if (code != CV_OK) return code;
    uint64_t until = timeout_ms ? cv_now() + timeout_ms * CV_MS : CV_NEVER;
    code = cv_run(g, g->wire, t, 1, until, what);
    if (code == CV_OK && t->sending) {
        atomic_fetch_add(&g->messages, 1);
        atomic_fetch_add(&g->message_bytes, t->bytes);
    }
    cv_end(g);
    return code;
}

int cv_send(cv_group *g, uint32_t peer, uint32_t channel, const void *data, size_t bytes, uint32_t timeout_ms) {
    cv_transfer t = {.peer = peer, .channel = channel, .sending = true, .data = (uint8_t *)data, .bytes = bytes};
    return one(g, &t, timeout_ms, false, "sending");
}

int cv_recv(cv_group *g, uint32_t peer, uint32_t channel, void *data, size_t bytes, uint32_t timeout_ms) {
    cv_transfer t = {.peer = peer, .channel = channel, .data = data, .bytes = bytes};
    return one(g, &t, timeout_ms, false, "receiving");
}

int cv_send_any(cv_group *g, uint32_t peer, uint32_t channel, const void *data, size_t bytes, uint32_t timeout_ms) {
    return cv_send(g, peer, channel, data, bytes, timeout_ms);
}

int cv_recv_any(cv_group *g, uint32_t peer, uint32_t channel, void **data, size_t *bytes, size_t most, uint32_t timeout_ms) {
    if (!data || !bytes) return CV_E_ARGUMENT;
    *data = NULL;
    *bytes = 0;
    cv_transfer t = {.peer = peer, .channel = channel, .any = true, .most = most};
    int code = one(g, &t, timeout_ms, true, "waiting for a message");
    if (code != CV_OK) {
        free(t.data);
        return code;
    }
    *data = t.data;
    *bytes = t.bytes;
    return CV_OK;
}
