/* hand_over_test.c — the host's work in the middle of a step, in every way of waiting: right numbers, one command buffer where the GPU waits,
 * a host that is late or never comes, one that fails, one that another thread stops, a GPU that fails, systems that lack a way.
 * Argument: a way, to test that one alone. */
#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../../../native/backend/metal/device.h"
#include "../../../native/backend/metal/kernels/params.h"
#include "../../../native/test/check.h"

enum { N = 256, JOINS = 6, LIMIT_MS = 20000 };

static uint64_t (*count)(const char *);

typedef struct {
    cv_metal_device *d;
    float *x[2], *norm; /* [N] */
    size_t done;        /* joins that need not be recorded again */
    unsigned recordings;
    double each_work;   /* multiply-adds that a dispatch claims */
    /* the host */
    unsigned calls, late_at, fail_at, stop_at; /* numbers of calls, from 1; 0: none */
    atomic_bool waiting, stopped;
    uint64_t late_until; /* dispatches that the GPU has done without the host */
} rig;

static bool reaches(uint64_t dispatches) {
    const struct timespec pause = {0, 200000};
    for (int i = 0; i < LIMIT_MS * 5; i++) {
        if (count("dispatches") >= dispatches) return true;
        nanosleep(&pause, NULL);
    }
    return false;
}

/* x = 2x + 1, and what a test does to the host. */
static int host(void *context, const void *part, float *x, size_t n) {
    rig *r = context;
    (void)part;
    r->calls++;
    if (r->calls == r->late_at) reaches(r->late_until);
    if (r->calls == r->fail_at) return CV_E_GROUP;
    if (r->calls == r->stop_at) {
        const struct timespec pause = {0, 200000};
        atomic_store(&r->waiting, true);
        for (int i = 0; i < LIMIT_MS * 5 && !atomic_load(&r->stopped); i++) nanosleep(&pause, NULL);
        return atomic_load(&r->stopped) ? CV_E_ABORTED : CV_E_STEP;
    }
    for (size_t i = 0; i < n; i++) x[i] = 2 * x[i] + 1;
    return CV_OK;
}

static float at_start(size_t i) { return (float)((i * 37 + 11) % 23) - 9; }

/* Normalises, then the host: JOINS times. */
static void record(rig *r) {
    cv_metal_constants none;
    memset(&none, 0, sizeof none);
    const cv_norm_params params = {.n = 1, .hidden = N, .eps = 0};
    const size_t groups[3] = {1, 1, 1};
    const cv_host_work work = {host, r, NULL};
    for (size_t k = r->done; k < JOINS; k++) {
        float *from = r->x[k % 2], *to = r->x[(k + 1) % 2];
        cv_metal_use(r->d, "rms_norm_f32", &none);
        cv_metal_bind(r->d, 0, from, N * sizeof(float));
        cv_metal_bind(r->d, 1, r->norm, N * sizeof(float));
        cv_metal_bind(r->d, 2, to, N * sizeof(float));
        cv_metal_bind(r->d, 3, from, N * sizeof(float));
        cv_metal_bytes(r->d, 4, &params, sizeof params);
        cv_metal_dispatch(r->d, groups, 32, r->each_work);
        if (cv_metal_join(r->d, &work, to, N, N)) return;
    }
}

static int run_step(rig *r, char *text, size_t size) {
    int code;
    r->done = r->recordings = r->calls = 0;
    for (size_t i = 0; i < N; i++) r->x[0][i] = at_start(i);
    do {
        size_t joined;
        cv_metal_begin(r->d);
        record(r);
        r->recordings++;
        code = cv_metal_finish(r->d, &joined, (cv_err){text, size});
        r->done += joined;
    } while (code == CV_E_AGAIN);
    return code;
}

static void check_numbers(cv_checks *c, const rig *r) {
    double x[N], worst = 0;
    for (size_t i = 0; i < N; i++) x[i] = (double)at_start(i);
    for (int k = 0; k < JOINS; k++) {
        double squares = 0;
        for (size_t i = 0; i < N; i++) squares += x[i] * x[i];
        for (size_t i = 0; i < N; i++) x[i] = 2 * x[i] / sqrt(squares / N) + 1;
    }
    for (size_t i = 0; i < N; i++) worst = fmax(worst, fabs(x[i] - (double)r->x[JOINS % 2][i]));
    cv_check(c, worst < 1e-4, "numbers differ by %g", worst);
}

/* way: asked for; NULL: measured. */
static bool open_rig(cv_checks *c, rig *r, const char *way, const char *patience_ms) {
    char text[512] = "";
    void *memory = NULL;
    *r = (rig){0};
    if (way) setenv("CARAVAN_METAL_HAND_OVER", way, 1);
    else unsetenv("CARAVAN_METAL_HAND_OVER");
    setenv("CARAVAN_METAL_PATIENCE_MS", patience_ms, 1);
    int code = cv_metal_device_open(&r->d, (cv_err){text, sizeof text});
    float **const buffers[3] = {&r->x[0], &r->x[1], &r->norm}; /* of their own, as a model's are: a kernel writes to one of them only */
    for (int i = 0; i < 3 && !code; i++) {
        code = cv_metal_alloc(r->d, 4096, &memory, (cv_err){text, sizeof text});
        *buffers[i] = memory;
    }
    if (!cv_check(c, !code, "%s", text)) return false;
    for (size_t i = 0; i < N; i++) r->norm[i] = 1;
    return true;
}

/* The first step of a device measures the ways. A busy machine is late by itself, and then some steps are made in the plain way. */
static bool warm(cv_checks *c, rig *r) {
    enum { CALM_STEPS = 18 };
    for (int steps = 1; steps > 0; steps--) {
        char text[512] = "";
        int code = run_step(r, text, sizeof text);
        if (!cv_check(c, !code && r->calls == JOINS, "%d %s, %u calls", code, text, r->calls)) return false;
        check_numbers(c, r);
        if (r->recordings > 1) steps = CALM_STEPS;
    }
    return true;
}

static bool within(const char *way) { return !strcmp(way, "event") || !strcmp(way, "spin"); }

/* ---- cases, one for each way ---- */

/* False: the machine was too busy to say, the host came late. */
static bool counts_of_a_step(cv_checks *c, rig *r, const char *way, bool last) {
    char text[512] = "";
    uint64_t before[5], after[5];
    const char *const what[5] = {"command_buffers", "waits", "dispatches", "event_waits", "allocations"};
    for (int i = 0; i < 5; i++) before[i] = count(what[i]);
    int code = run_step(r, text, sizeof text);
    for (int i = 0; i < 5; i++) after[i] = count(what[i]) - before[i];
    check_numbers(c, r);
    if (!code && r->recordings > 1 && !last) return false;
    cv_check(c, !code && r->recordings == 1 && r->calls == JOINS, "%d %s, recorded %u times, %u calls", code, text, r->recordings, r->calls);
    cv_check(c, after[0] == (within(way) ? 1 : JOINS + 1), "%llu command buffers", (unsigned long long)after[0]);
    cv_check(c, after[1] == (strcmp(way, "wait") ? 1 : JOINS + 1), "%llu waits", (unsigned long long)after[1]);
    cv_check(c, after[2] == (strcmp(way, "spin") ? JOINS : 2 * JOINS), "%llu dispatches", (unsigned long long)after[2]);
    cv_check(c, after[3] == (strcmp(way, "event") ? 0 : JOINS), "%llu waits for events", (unsigned long long)after[3]);
    cv_check(c, after[4] == 0, "%llu allocations", (unsigned long long)after[4]);
    return true;
}

static void counted(cv_checks *c, const char *way) {
    enum { ATTEMPTS = 4 };
    bool counted = false;
    for (int i = 1; !counted && i <= ATTEMPTS; i++) {
        rig r;
        if (!open_rig(c, &r, way, "5000")) return;
        counted = !warm(c, &r) || counts_of_a_step(c, &r, way, i == ATTEMPTS);
        cv_metal_device_close(r.d);
    }
}

/* Recorded hand-overs in several command buffers. */
static void long_steps(cv_checks *c, const char *way) {
    rig r;
    if (!open_rig(c, &r, way, "5000")) return;
    if (warm(c, &r)) {
        r.each_work = 1.1e11;
        char text[512] = "";
        uint64_t before = count("command_buffers");
        int code = run_step(&r, text, sizeof text);
        cv_check(c, !code && count("command_buffers") - before >= JOINS / 2, "%d %s, %llu command buffers", code, text, (unsigned long long)(count("command_buffers") - before));
        check_numbers(c, &r);
    }
    cv_metal_device_close(r.d);
}

/* Late at each of the hand-overs in turn: what the GPU has computed without the host does no harm. */
static void late(cv_checks *c, const char *way) {
    for (unsigned at = 1; at <= JOINS; at++) {
        rig r;
        char text[512] = "";
        if (!open_rig(c, &r, way, "300")) return;
        if (warm(c, &r)) {
            bool spins = !strcmp(way, "spin");
            r.late_at = at;
            /* the GPU has gone on: what is behind the hand-over has run; behind the last one nothing is, but the kernel itself ends */
            r.late_until = count("dispatches") + (spins ? 2 * at : at) + (at < JOINS ? 1 : 0);
            int code = run_step(&r, text, sizeof text);
            cv_check(c, !code && r.recordings <= 2 && r.calls == JOINS, "late at %u: %d %s, recorded %u times, %u calls", at, code, text, r.recordings, r.calls);
            cv_check(c, at == JOINS || r.recordings == 2, "late at %u: recorded %u times", at, r.recordings);
            check_numbers(c, &r);
            r.late_at = 0;
            code = run_step(&r, text, sizeof text); /* and the next step */
            cv_check(c, !code, "%d %s", code, text);
            check_numbers(c, &r);
        }
        cv_metal_device_close(r.d);
    }
}

/* The host's work ends with an error: so does the step, soon, and the next one can be computed. */
static void host_fails(cv_checks *c, const char *way) {
    rig r;
    char text[512] = "";
    if (!open_rig(c, &r, way, "5000")) return;
    for (unsigned at = 1; warm(c, &r) && at <= JOINS; at += 2) {
        r.fail_at = at;
        int code = run_step(&r, text, sizeof text);
        cv_check(c, code == CV_E_GROUP && text[0] && r.calls == at, "failing at %u: %d %s, %u calls", at, code, text, r.calls);
        r.fail_at = 0;
    }
    cv_metal_device_close(r.d);
}

static void *stop_it(void *context) {
    rig *r = context;
    const struct timespec pause = {0, 200000};
    for (int i = 0; i < LIMIT_MS * 5 && !atomic_load(&r->waiting); i++) nanosleep(&pause, NULL);
    atomic_store(&r->stopped, true);
    return NULL;
}

/* Another thread ends the host's wait, as cv_abort does. */
static void stopped(cv_checks *c, const char *way) {
    rig r;
    char text[512] = "";
    pthread_t thread;
    if (!open_rig(c, &r, way, "5000")) return;
    if (warm(c, &r)) {
        r.stop_at = 3;
        if (cv_check(c, !pthread_create(&thread, NULL, stop_it, &r), "no thread")) {
            int code = run_step(&r, text, sizeof text);
            pthread_join(thread, NULL);
            cv_check(c, code == CV_E_ABORTED && r.calls == 3, "%d %s, %u calls", code, text, r.calls);
        }
    }
    cv_metal_device_close(r.d);
}

/* The GPU fails before it comes to the host. */
static void gpu_fails(cv_checks *c, const char *way) {
    rig r;
    char text[512] = "";
    if (!open_rig(c, &r, way, "5000")) return;
    if (warm(c, &r)) {
        setenv("FAKEMETAL_WORKING_SET", "1", 1);
        int code = run_step(&r, text, sizeof text);
        unsetenv("FAKEMETAL_WORKING_SET");
        cv_check(c, code == CV_E_STEP && strstr(text, "Insufficient Memory") && r.calls == 0, "%d %s, %u calls", code, text, r.calls);
        warm(c, &r);
    }
    cv_metal_device_close(r.d);
}

/* A device that is closed while nothing runs, with and without a step before. */
static void closes(cv_checks *c, const char *way) {
    rig r;
    if (open_rig(c, &r, way, "5000")) cv_metal_device_close(r.d);
    if (!open_rig(c, &r, way, "5000")) return;
    warm(c, &r);
    cv_metal_device_close(r.d);
}

/* ---- cases of their own ---- */

static void measures(cv_checks *c) {
    rig r;
    uint64_t ns[CV_METAL_WAYS];
    if (!open_rig(c, &r, NULL, "5000")) return;
    cv_metal_way way = cv_metal_measure_ways(r.d, N, ns);
    for (int i = 0; i < CV_METAL_WAYS; i++) cv_check(c, ns[i] > 0 && ns[way] <= ns[i], "%s takes %llu ns, %s, which was taken, %llu", cv_metal_way_name((cv_metal_way)i), (unsigned long long)ns[i], cv_metal_way_name(way), (unsigned long long)ns[way]);
    warm(c, &r);
    cv_metal_device_close(r.d);
}

static void old_system(cv_checks *c) {
    rig r;
    uint64_t ns[CV_METAL_WAYS];
    setenv("FAKEMETAL_MACOS", "14.5", 1);
    if (open_rig(c, &r, NULL, "5000")) {
        cv_metal_way way = cv_metal_measure_ways(r.d, N, ns);
        cv_check(c, ns[CV_METAL_SPIN] == 0 && ns[CV_METAL_EVENT] > 0 && way != CV_METAL_SPIN, "%s was taken; spinning takes %llu ns", cv_metal_way_name(way), (unsigned long long)ns[CV_METAL_SPIN]);
        warm(c, &r);
        cv_metal_device_close(r.d);
    }
    unsetenv("FAKEMETAL_MACOS");
}

/* A kernel that never sees the host's word, and an event that a system does not signal, are not taken. */
static void broken_ways(cv_checks *c) {
    rig r;
    uint64_t ns[CV_METAL_WAYS];
    setenv("FAKEMETAL_EDIT", "released = int(words[CV_WORD_RELEASED] - p.number) >= 0=>released = int(words[CV_WORD_RELEASED] - p.number) >= 1000", 1);
    setenv("FAKEMETAL_NO_EVENTS", "1", 1);
    if (open_rig(c, &r, NULL, "5000")) {
        cv_metal_way way = cv_metal_measure_ways(r.d, N, ns);
        cv_check(c, way == CV_METAL_WAIT && !ns[CV_METAL_SPIN] && !ns[CV_METAL_EVENT] && !ns[CV_METAL_LOOK], "%s was taken", cv_metal_way_name(way));
        warm(c, &r);
        cv_metal_device_close(r.d);
    }
    unsetenv("FAKEMETAL_EDIT");
    unsetenv("FAKEMETAL_NO_EVENTS");
}

int main(int argc, char **argv) {
    const char *only = argc > 1 ? argv[1] : NULL; /* this way alone */
    static const struct {
        const char *name;
        void (*run)(cv_checks *, const char *);
        bool within; /* only where the GPU waits */
    } cases[] = {
        {"the host's part of a step is done in order, once, and counted", counted, false},
        {"a step of several command buffers", long_steps, false},
        {"a host that is late costs time, not numbers", late, true},
        {"an error of the host ends the step, not the device", host_fails, false},
        {"another thread ends the host's wait", stopped, false},
        {"a GPU that fails ends the step with its reason", gpu_fails, false},
        {"a device can be closed", closes, false},
    };
    static const char *const ways[] = {"wait", "look", "event", "spin"};
    const char *library = getenv("CARAVAN_METAL_LIBRARY");
    void *fake = library ? dlopen(library, RTLD_NOW) : NULL;
    if (fake) *(void **)&count = dlsym(fake, "fakemetal_count");
    if (!count) {
        fprintf(stderr, "CARAVAN_METAL_LIBRARY must name the fake runtime\n");
        return 3;
    }
    cv_checks c = {0};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (size_t w = 0; w < 4; w++) {
            if ((cases[i].within && !within(ways[w])) || (only && strcmp(only, ways[w]))) continue;
            char name[128];
            snprintf(name, sizeof name, "%s: %s", ways[w], cases[i].name);
            cv_case(&c, name);
            cases[i].run(&c, ways[w]);
            cv_end_case(&c);
        }
    if (only) return cv_report(&c);
    cv_case(&c, "all ways are measured and the quickest is taken");
    measures(&c);
    cv_end_case(&c);
    cv_case(&c, "macOS 14 has no kernels that look at the host: another way is taken");
    old_system(&c);
    cv_end_case(&c);
    cv_case(&c, "ways that do not work are not taken");
    broken_ways(&c);
    cv_end_case(&c);
    return cv_report(&c);
}
