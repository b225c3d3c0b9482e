/* collectives.c — all-reduce, all-gather and barrier, written once over transfers.
 *
 * Sums are made in rank order whatever the algorithm, so that all ranks hold the same bits:
 *   one shot                     everybody sends its whole vector to everybody and adds all of them: one delay, (m-1)·n sent
 *   reduce-scatter + all-gather  part k is added by member k and sent back: two delays, 2·(m-1)/m·n sent
 * With two members both send the same amount, so one shot is always better. */
#include <stdlib.h>
#include <string.h>

#include "group.h"

static bool members_fit(const cv_group *g, cv_members m) {
    return m.count >= 1 && m.first <= g->size && m.count <= g->size - m.first && g->rank >= m.first && g->rank - m.first < m.count;
}

static void add(float *restrict sum, const float *restrict x, size_t n) {
    for (size_t i = 0; i < n; i++) sum[i] += x[i];
}

/* sum = Σ over members of their vectors in rank order; others: [count][stride] with this rank's row unused. sum may be mine. */
static void add_in_order(float *sum, const float *mine, const float *others, size_t stride, cv_members m, uint32_t self, size_t n) {
    if (m.count == 2) { /* a + b has the bits of b + a, but the first operand's payload wins where both are not numbers: keep the order */
        const float *a = self == 0 ? mine : others, *b = self == 0 ? others + stride : mine;
        for (size_t i = 0; i < n; i++) sum[i] = a[i] + b[i];
        return;
    }
    /* Piece by piece, so that the sum stays in the first-level cache and mine may be overwritten. */
    float part[1024];
    for (size_t at = 0; at < n; at += 1024) {
        size_t k = n - at < 1024 ? n - at : 1024;
        for (uint32_t r = 0; r < m.count; r++) {
            const float *x = (r == self ? mine : others + r * stride) + at;
            if (r == 0) memcpy(part, x, k * sizeof *part);
            else add(part, x, k);
        }
        memcpy(sum + at, part, k * sizeof *part);
    }
}

/* The transfers of one step of a collective. */
typedef struct {
    cv_transfer t[2 * CV_MAX_RANKS];
    size_t n;
} exchange;

static void with(exchange *e, uint32_t peer, bool sending, void *data, size_t bytes) {
    e->t[e->n++] = (cv_transfer){.peer = peer, .channel = CV_CHANNEL_REDUCE, .sending = sending, .data = data, .bytes = bytes};
}

/* Two members over a transport that adds by itself: x is its own scratch. */
static int one_shot_in_place(cv_group *g, cv_members m, float *x, size_t n, uint64_t until) {
    exchange e;
    e.n = 0;
    uint32_t self = g->rank - m.first, peer = m.first + 1 - self;
    with(&e, peer, true, x, n * sizeof *x);
    with(&e, peer, false, x, n * sizeof *x);
    e.t[1].behind = &e.t[0];
    e.t[1].in_first = self == 1;
    return cv_run(g, g->wire, e.t, e.n, until, "all-reduce");
}

static int one_shot(cv_group *g, cv_members m, float *x, size_t n, float *scratch, uint64_t until) {
    exchange e;
    e.n = 0;
    uint32_t self = g->rank - m.first;
    /* Begin with the next rank, so that not everybody sends to rank 0 first. */
    for (uint32_t k = 1; k < m.count; k++) {
        uint32_t r = (self + k) % m.count;
        with(&e, m.first + r, true, x, n * sizeof *x);
    }
    for (uint32_t k = 1; k < m.count; k++) {
        uint32_t r = (self + k) % m.count;
        with(&e, m.first + r, false, scratch + r * n, n * sizeof *x);
    }
    int code = cv_run(g, g->wire, e.t, e.n, until, "all-reduce");
    if (code == CV_OK) add_in_order(x, x, scratch, n, m, self, n);
    return code;
}

static size_t part_start(size_t n, uint32_t count, uint32_t k) {
    size_t each = n / count, more = n % count; /* the first `more` parts are one longer */
    return each * k + (k < more ? k : more);
}

static int scatter_gather(cv_group *g, cv_members m, float *x, size_t n, float *scratch, uint64_t until) {
    exchange e;
    e.n = 0;
    uint32_t self = g->rank - m.first;
    size_t mine = part_start(n, m.count, self), stride = part_start(n, m.count, self + 1) - mine;
    for (uint32_t k = 1; k < m.count; k++) {
        uint32_t r = (self + k) % m.count;
        size_t from = part_start(n, m.count, r), to = part_start(n, m.count, r + 1);
        with(&e, m.first + r, true, x + from, (to - from) * sizeof *x);
    }
    for (uint32_t k = 1; k < m.count; k++) {
        uint32_t r = (self + k) % m.count;
        with(&e, m.first + r, false, scratch + r * stride, stride * sizeof *x);
    }
    int code = cv_run(g, g->wire, e.t, e.n, until, "all-reduce");
    if (code != CV_OK) return code;
    add_in_order(x + mine, x + mine, scratch, stride, m, self, stride);
    e.n = 0;
    for (uint32_t k = 1; k < m.count; k++) {
        uint32_t r = (self + k) % m.count;
        with(&e, m.first + r, true, x + mine, stride * sizeof *x);
    }
    for (uint32_t k = 1; k < m.count; k++) {
        uint32_t r = (self + k) % m.count;
        size_t from = part_start(n, m.count, r), to = part_start(n, m.count, r + 1);
        with(&e, m.first + r, false, x + from, (to - from) * sizeof *x);
    }
    return cv_run(g, g->wire, e.t, e.n, until, "all-reduce");
}

/* The group's scratch, or a block of its own while another thread uses it. */
static float *take_scratch(cv_group *g, size_t floats, bool *own) {
    *own = pthread_mutex_trylock(&g->scratch_lock) != 0;
    if (*own) return malloc(floats * sizeof(float));
    if (g->scratch_floats < floats) {
        free(g->scratch);
        g->scratch = malloc(floats * sizeof(float));
        g->scratch_floats = g->scratch ? floats : 0;
        if (!g->scratch) pthread_mutex_unlock(&g->scratch_lock);
    }
    return g->scratch;
}

static void give_scratch(cv_group *g, float *scratch, bool own) {
    if (own) free(scratch);
    else pthread_mutex_unlock(&g->scratch_lock);
}

int cv_all_reduce(cv_group *g, cv_members m, float *x, size_t n, uint32_t timeout_ms) {
    if (!g || !members_fit(g, m) || (!x && n) || timeout_ms == 0 || n > g->options.max_message / sizeof *x) return CV_E_ARGUMENT;
    int code = cv_begin(g);
    if (code != CV_OK) return code;
    uint64_t start = cv_now(), until = start + timeout_ms * CV_MS;
    if (m.count == 2 && n > 0 && g->wire->adds) {
        code = one_shot_in_place(g, m, x, n, until);
    } else if (m.count > 1 && n > 0) {
        bool shot = m.count == 2 || n * sizeof *x <= g->wire->one_shot_bytes || n < m.count, own;
        float *scratch = take_scratch(g, shot ? m.count * n : (size_t)m.count * (n / m.count + 1), &own);
        if (!scratch) code = cv_group_fail(g, CV_E_MEMORY, (int)g->rank, "rank %u has no memory for an all-reduce of %zu numbers", g->rank, n);
        else {
            code = shot ? one_shot(g, m, x, n, scratch, until) : scatter_gather(g, m, x, n, scratch, until);
            give_scratch(g, scratch, own);
        }
    }
    if (code == CV_OK) {
        atomic_fetch_add(&g->reduces, 1);
        atomic_fetch_add(&g->reduce_ns, cv_now() - start);
        atomic_fetch_add(&g->reduce_bytes, n * sizeof *x);
    }
    cv_end(g);
    return code;
}

static int gather(cv_group *g, cv_members m, const void *mine, size_t bytes, uint8_t *out, uint32_t timeout_ms, const char *what) {
    int code = cv_begin(g);
    if (code != CV_OK) return code;
    exchange e;
    e.n = 0;
    uint32_t self = g->rank - m.first;
    if (bytes) memmove(out + self * bytes, mine, bytes);
    for (uint32_t k = 1; k < m.count; k++) with(&e, m.first + (self + k) % m.count, true, out + self * bytes, bytes);
    for (uint32_t k = 1; k < m.count; k++) {
        uint32_t r = (self + k) % m.count;
        with(&e, m.first + r, false, out + r * bytes, bytes);
    }
    if (e.n) code = cv_run(g, g->wire, e.t, e.n, cv_now() + timeout_ms * CV_MS, what);
    cv_end(g);
    return code;
}

int cv_all_gather(cv_group *g, cv_members m, const void *mine, size_t bytes, void *out, uint32_t timeout_ms) {
    if (!g || !members_fit(g, m) || ((!mine || !out) && bytes) || timeout_ms == 0 || bytes > g->options.max_message / m.count) return CV_E_ARGUMENT;
    return gather(g, m, mine, bytes, out, timeout_ms, "all-gather");
}

int cv_group_barrier(cv_group *g, uint32_t timeout_ms) {
    if (!g || timeout_ms == 0) return CV_E_ARGUMENT;
    uint8_t bytes[CV_MAX_RANKS] = {0};
    return gather(g, (cv_members){0, g->size}, &bytes[g->rank], 1, bytes, timeout_ms, "barrier");
}
