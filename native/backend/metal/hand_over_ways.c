/* hand_over_ways.c — measures on this GPU how long a hand-over to the host and back takes in each way, and takes the quickest. A way that
 * does not work here (a kernel that does not compile, an event that does not come, numbers that are not seen) is not taken. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../include/caravan.h"
#include "device_state.h"
#include "kernels/params.h"

/* Hand-overs of a trial; looks of a kernel whose time is taken. */
enum { ROUNDS = 8, TRIALS = 4, FIRST_LOOKS = 2000, LEAST_LOOKS = 1000, MOST_LOOKS = 300 * 1000 * 1000 };
/* How long the GPU waits for the host: longer than ranks that are well wait for each other, shorter than systems let a command hang. */
static const uint64_t PATIENCE_NS = 100 * 1000 * 1000;

const char *cv_metal_way_name(cv_metal_way way) {
    static const char *const names[CV_METAL_WAYS] = {"wait", "look", "event", "spin"};
    return names[way];
}

cv_metal_way cv_metal_quickest_way(const cv_metal_hand_overs *h, int except) {
    cv_metal_way best = CV_METAL_WAIT;
    for (int way = 0; way < CV_METAL_WAYS; way++)
        if (way != except && h->ns[way] && (!h->ns[best] || h->ns[way] < h->ns[best])) best = (cv_metal_way)way;
    return best;
}

static int add_one(void *context, const void *part, float *x, size_t n) {
    (void)part;
    ++*(unsigned *)context;
    for (size_t i = 0; i < n; i++) x[i] += 1;
    return CV_OK;
}

static void forget_failure(cv_metal_device *d) {
    d->code = CV_OK;
    d->text[0] = 0;
    cv_metal_begin_hand_overs(d);
}

/* A hand-over in a command buffer of its own, and one more for the way back: what a sum costs where command buffers end at it. */
static uint64_t measure_plain(cv_metal_device *d, cv_metal_way way) {
    uint64_t best = 0;
    for (int i = 0; i < ROUNDS; i++) {
        uint64_t start = cv_metal_now_ns();
        cv_metal_open_commands(d);
        cv_metal_settle(d, way);
        uint64_t ns = cv_metal_now_ns() - start;
        if (d->code) return 0;
        if (!best || ns < best) best = ns;
    }
    cv_metal_wait_for_commands(d, d->n_commands);
    return d->code ? 0 : best;
}

/* ROUNDS of them in one command buffer, the numbers checked. A trial that was late, on a busy machine, counts for nothing. */
static uint64_t measure_within(cv_metal_device *d, cv_metal_way way, float *x, size_t n) {
    cv_metal_hand_overs *h = &d->hand_overs;
    uint64_t best = 0;
    for (int trial = 0; trial < TRIALS; trial++) {
        unsigned times = 0;
        h->way = way; /* one that is late twice is given up else */
        h->stale = 0;
        const cv_host_work work = {add_one, &times, NULL};
        memset(x, 0, n * sizeof *x);
        cv_metal_begin_hand_overs(d);
        cv_metal_open_commands(d);
        for (int i = 0; i < ROUNDS; i++) cv_metal_encode_hand_over(d, &work, x, n);
        uint64_t start = cv_metal_now_ns();
        cv_metal_complete(d);
        uint64_t ns = (cv_metal_now_ns() - start) / ROUNDS;
        bool works = !d->code && (h->late || times == ROUNDS);
        for (size_t i = 0; works && !h->late && i < n; i++) works = x[i] == ROUNDS;
        if (!works) return 0;
        if (!h->late && (!best || ns < best)) best = ns;
    }
    return best;
}

/* Nanoseconds that a kernel with so many looks takes when nobody comes. */
static uint64_t time_looks(cv_metal_device *d, float *x, uint32_t looks) {
    cv_metal_hand_overs *h = &d->hand_overs;
    const cv_host_work nothing = {NULL, NULL, NULL};
    uint64_t best = 0;
    h->patience = looks;
    for (int i = 0; i < 3 && !d->code; i++) {
        h->way = CV_METAL_SPIN;
        cv_metal_begin_hand_overs(d);
        cv_metal_open_commands(d);
        cv_metal_encode_hand_over(d, &nothing, x, 1);
        h->n_joins = 0; /* nobody serves it */
        uint64_t start = cv_metal_now_ns();
        cv_metal_complete(d);
        uint64_t ns = cv_metal_now_ns() - start;
        if (!best || ns < best) best = ns;
    }
    return best;
}

/* How many looks take the time that the GPU is to wait. A GPU at a low clock now will wait for less time later. */
static uint32_t calibrate(cv_metal_device *d, float *x) {
    cv_metal_hand_overs *h = &d->hand_overs;
    const uint64_t enough_ns = 2 * 1000 * 1000;
    uint64_t few = time_looks(d, x, 1), many = 0;
    uint32_t looks = FIRST_LOOKS;
    for (; looks < MOST_LOOKS / 2 && !d->code; looks *= 2) {
        many = time_looks(d, x, looks);
        if (many > few && many - few > enough_ns) break;
    }
    double each = many > few ? (double)(many - few) / looks : 1, all = (double)h->patience_ns / each;
    looks = all < LEAST_LOOKS ? LEAST_LOOKS : all > MOST_LOOKS ? MOST_LOOKS : (uint32_t)all;
    h->spin_ns = (uint64_t)((double)looks * each);
    return looks;
}

/* Whether the environment asks for this way or none. CARAVAN_METAL_HAND_OVER: wait, look, event or spin. */
static bool may_take(cv_metal_way way) {
    const char *asked = getenv("CARAVAN_METAL_HAND_OVER");
    return !asked || !*asked || !strcmp(asked, cv_metal_way_name(way));
}

static void measure_spin(cv_metal_device *d, float *x, size_t n) {
    cv_metal_hand_overs *h = &d->hand_overs;
    h->patience = calibrate(d, x);
    h->ns[CV_METAL_SPIN] = d->code ? 0 : measure_within(d, CV_METAL_SPIN, x, n);
}

static void measure_event(cv_metal_device *d, float *x, size_t n) {
    cv_metal_hand_overs *h = &d->hand_overs;
    h->watch = cv_metal_watch_open(d);
    if (h->watch) h->ns[CV_METAL_EVENT] = measure_within(d, CV_METAL_EVENT, x, n);
}

/* Memory for n numbers and the words, with what a trial adds to. False: hand-overs end command buffers. */
static bool open_memory(cv_metal_device *d, size_t n, float **x) {
    cv_metal_hand_overs *h = &d->hand_overs;
    const cv_err ignored = {NULL, 0};
    void *staging = NULL, *words = NULL, *trial = NULL;
    bool there = !cv_metal_alloc(d, n * sizeof(float), &staging, ignored) && !cv_metal_alloc(d, CV_HAND_OVER_WORDS * sizeof(uint32_t), &words, ignored) && !cv_metal_alloc(d, n * sizeof(float), &trial, ignored);
    h->staging = staging;
    h->words = words;
    *x = trial;
    if (there) h->room = n;
    return there;
}

void cv_metal_choose_way(cv_metal_device *d, size_t n) {
    cv_metal_hand_overs *h = &d->hand_overs;
    const char *patience = getenv("CARAVAN_METAL_PATIENCE_MS");
    float *x = NULL;
    h->chosen = true;
    h->patience_ns = patience && *patience ? strtoull(patience, NULL, 10) * 1000000u : PATIENCE_NS;
    h->arrivals = CV_SEND0(&d->objc, id, d->device, new_event);
    h->releases = CV_SEND0(&d->objc, id, d->device, new_event);
    bool events = h->arrivals && h->releases, memory = open_memory(d, n, &x);
    h->ns[CV_METAL_WAIT] = measure_plain(d, CV_METAL_WAIT);
    if (events) h->ns[CV_METAL_LOOK] = measure_plain(d, CV_METAL_LOOK);
    h->way = CV_METAL_WAIT;
    h->plain = h->ns[CV_METAL_LOOK] && (h->ns[CV_METAL_LOOK] < h->ns[CV_METAL_WAIT]) && !d->code ? CV_METAL_LOOK : CV_METAL_WAIT;
    forget_failure(d);
    if (memory && may_take(CV_METAL_SPIN)) measure_spin(d, x, n);
    forget_failure(d);
    if (memory && events && may_take(CV_METAL_EVENT)) measure_event(d, x, n);
    forget_failure(d);
    h->calm = h->stale = 0;
    h->way = CV_METAL_WAIT;
    for (int way = 0; way < CV_METAL_WAYS; way++)
        if (!may_take((cv_metal_way)way)) h->ns[way] = 0;
    if (may_take(CV_METAL_LOOK) && !may_take(CV_METAL_WAIT) && h->ns[CV_METAL_LOOK]) h->plain = CV_METAL_LOOK;
    if (may_take(CV_METAL_WAIT) && !may_take(CV_METAL_LOOK)) h->plain = CV_METAL_WAIT;
    h->way = cv_metal_quickest_way(h, -1);
    cv_metal_free(d, x);
}

cv_metal_way cv_metal_measure_ways(cv_metal_device *d, size_t n, uint64_t ns[CV_METAL_WAYS]) {
    void *pool = d->objc.pool_push();
    cv_metal_begin_hand_overs(d);
    if (!d->hand_overs.chosen) cv_metal_choose_way(d, n);
    memcpy(ns, d->hand_overs.ns, sizeof d->hand_overs.ns);
    d->objc.pool_pop(pool);
    return d->hand_overs.way;
}

int cv_metal_hand_over_times(char *out, size_t out_size, char *text, size_t text_size) {
    enum { NUMBERS = 5120 };
    cv_err err = {text, text_size};
    cv_metal_device *d;
    uint64_t ns[CV_METAL_WAYS];
    if (!out || !out_size) return cv_fail(err, CV_E_ARGUMENT, "nowhere to put the times");
    int code = cv_metal_device_open(&d, err);
    if (code) return code;
    cv_metal_way taken = cv_metal_measure_ways(d, NUMBERS, ns);
    size_t at = 0;
    for (int way = 0; way < CV_METAL_WAYS && at < out_size; way++) at += (size_t)snprintf(out + at, out_size - at, "%s=%llu\n", cv_metal_way_name((cv_metal_way)way), (unsigned long long)ns[way]);
    if (at < out_size) at += (size_t)snprintf(out + at, out_size - at, "taken=%s\n", cv_metal_way_name(taken));
    cv_metal_device_close(d);
    return at < out_size ? CV_OK : cv_fail(err, CV_E_BUFFER, "the times do not fit into %zu bytes", out_size);
}
