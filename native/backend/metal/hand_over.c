/* hand_over.c — work of the host in the middle of a step (sums over ranks), and how GPU and host wait for each other.
 *
 * In the ways EVENT and SPIN a step of a few tokens stays one command buffer: all hand-overs are recorded before it is committed, and the host
 * comes to them in order while it runs. The host adds to a copy of the numbers. So a GPU that has waited long enough may go on and compute
 * nonsense to the end of the step: what it spoils is written again when the step is recorded once more from behind the last sum, in a way
 * in which the GPU waits for nobody. A late rank costs time, never an answer; one that never comes is the transport's to report. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../../include/caravan.h"
#include "device_state.h"
#include "kernels/params.h"

/* The host looks for the GPU without a pause at first, then now and then, and looks whether it has failed. */
enum { LOOK_NS = 20 * 1000 * 1000, PAUSE_NS = 50 * 1000, LOOKS_A_CLOCK = 64 };
/* Steps in the plain way after a late one; times that the GPU may miss the host's word before the way is given up. */
enum { CALM_STEPS = 16, MOST_STALE = 2, FORGET_STEPS = 1000 };

typedef enum { CAME, GAVE_UP, FAILED } arrival;

static uint32_t word(const cv_metal_hand_overs *h, int i) { return __atomic_load_n(&h->words[i], __ATOMIC_ACQUIRE); }
static void set_word(cv_metal_hand_overs *h, int i, uint32_t value) { __atomic_store_n(&h->words[i], value, __ATOMIC_RELEASE); }

uint64_t cv_metal_next_number(cv_metal_hand_overs *h) {
    do h->number++;
    while (!(uint32_t)h->number);
    return h->number;
}

void cv_metal_begin_hand_overs(cv_metal_device *d) {
    cv_metal_hand_overs *h = &d->hand_overs;
    h->n_joins = h->served = h->joined = 0;
    h->late = false;
    if (h->words) set_word(h, CV_WORD_GAVE_UP, 0);
}

/* ---- recording ---- */

static bool reserve(cv_metal_hand_overs *h) {
    if (h->n_joins < h->room_joins) return true;
    size_t room = h->room_joins ? 2 * h->room_joins : 128;
    cv_metal_hand_over *list = realloc(h->joins, room * sizeof *list);
    if (!list) return false;
    h->joins = list;
    h->room_joins = room;
    return true;
}

static void encode_spin(cv_metal_device *d, const cv_metal_hand_over *j) {
    cv_metal_hand_overs *h = &d->hand_overs;
    cv_metal_constants none;
    memset(&none, 0, sizeof none);
    const cv_hand_over_params params = {.n = (uint32_t)j->n, .number = (uint32_t)j->number, .patience = h->patience};
    const size_t groups[3] = {1, 1, 1};
    cv_metal_use(d, "hand_over", &none);
    cv_metal_bind(d, 0, j->x, j->n * sizeof *j->x);
    cv_metal_bind(d, 1, h->staging, j->n * sizeof *j->x);
    cv_metal_bind(d, 2, h->words, CV_HAND_OVER_WORDS * sizeof *h->words);
    cv_metal_bytes(d, 3, &params, sizeof params);
    cv_metal_dispatch(d, groups, CV_HAND_OVER_THREADS, 0);
}

static void encode_event(cv_metal_device *d, const cv_metal_hand_over *j) {
    id commands = d->commands[d->n_commands - 1];
    cv_metal_end_encoder(d);
    CV_SEND(&d->objc, void, commands, signal, (id, uint64_t), d->hand_overs.arrivals, j->number);
    CV_SEND(&d->objc, void, commands, wait_event, (id, uint64_t), d->hand_overs.releases, j->number);
    cv_metal_open_encoder(d);
}

void cv_metal_encode_hand_over(cv_metal_device *d, const cv_host_work *work, float *x, size_t n) {
    cv_metal_hand_overs *h = &d->hand_overs;
    if (d->code) return;
    if (!reserve(h)) {
        cv_metal_refuse(d, CV_E_MEMORY, "no memory for the step's hand-overs");
        return;
    }
    cv_metal_hand_over *j = &h->joins[h->n_joins++];
    *j = (cv_metal_hand_over){*work, x, n, cv_metal_next_number(h)};
    if (h->way == CV_METAL_SPIN) encode_spin(d, j);
    else encode_event(d, j);
}

void cv_metal_settle(cv_metal_device *d, cv_metal_way way) {
    cv_metal_hand_overs *h = &d->hand_overs;
    bool look = way == CV_METAL_LOOK && h->arrivals && !h->n_joins && !d->code;
    if (!look) {
        cv_metal_complete(d);
        return;
    }
    uint64_t number = cv_metal_next_number(h), start = cv_metal_now_ns();
    cv_metal_end_encoder(d);
    CV_SEND(&d->objc, void, d->commands[d->n_commands - 1], signal, (id, uint64_t), h->arrivals, number);
    cv_metal_commit(d);
    /* A GPU that failed signals nothing: then the command buffers are waited for, and say why. */
    while (CV_SEND0(&d->objc, uint64_t, h->arrivals, signaled) < number)
        if (cv_metal_now_ns() - start > LOOK_NS) {
            cv_metal_wait_for_commands(d, d->n_commands);
            return;
        }
    if (d->n_commands + 1 >= CV_METAL_OPEN_COMMANDS) cv_metal_wait_for_commands(d, d->n_commands);
}

/* The host's part between two command buffers. */
static int join_now(cv_metal_device *d, const cv_host_work *work, float *x, size_t n) {
    int code = d->code ? CV_OK : work->run(work->context, work->part, x, n);
    if (code) cv_metal_refuse(d, code, "the host's work between two parts of a step failed");
    d->hand_overs.joined += !d->code;
    if (!d->code) cv_metal_open_commands(d);
    return d->code;
}

int cv_metal_join(cv_metal_device *d, const cv_host_work *work, float *x, size_t n, size_t most) {
    cv_metal_hand_overs *h = &d->hand_overs;
    if (d->code) return d->code;
    if (!h->chosen) {
        cv_metal_settle(d, CV_METAL_WAIT);
        if (!d->code) cv_metal_choose_way(d, most);
        return join_now(d, work, x, n);
    }
    bool within = (h->way == CV_METAL_EVENT || h->way == CV_METAL_SPIN) && n <= h->room && !h->calm;
    if (within) {
        cv_metal_encode_hand_over(d, work, x, n);
        return d->code;
    }
    cv_metal_settle(d, h->plain);
    return join_now(d, work, x, n);
}

/* ---- serving ---- */

static bool has_come(const cv_metal_device *d, uint64_t number) {
    const cv_metal_hand_overs *h = &d->hand_overs;
    if (h->way == CV_METAL_EVENT) return CV_SEND0(&d->objc, uint64_t, h->arrivals, signaled) >= number;
    return (int32_t)(word(h, CV_WORD_ARRIVED) - (uint32_t)number) >= 0;
}

static bool has_failed(const cv_metal_device *d) {
    enum { STATUS_ERROR = 5 };
    for (size_t i = 0; i < d->n_commands; i++)
        if (CV_SEND0(&d->objc, NSUInteger, d->commands[i], status) == STATUS_ERROR) return true;
    return false;
}

/* Looks until the GPU has come to the hand-over. The system ends commands that hang; then they have failed. */
static arrival wait_for_gpu(const cv_metal_device *d, uint64_t number) {
    const cv_metal_hand_overs *h = &d->hand_overs;
    const struct timespec pause = {0, PAUSE_NS};
    uint64_t start = cv_metal_now_ns();
    for (uint64_t looks = 1;; looks++) {
        if (has_come(d, number)) return CAME;
        if (h->way == CV_METAL_SPIN && word(h, CV_WORD_GAVE_UP)) return has_come(d, number) ? CAME : GAVE_UP; /* it may have come, and waited, since the look above */
        if (looks % LOOKS_A_CLOCK || cv_metal_now_ns() - start < LOOK_NS) continue;
        if (has_failed(d)) return FAILED;
        nanosleep(&pause, NULL);
    }
}

/* No number that has been given holds the GPU any more. */
static void let_go(cv_metal_device *d) {
    cv_metal_hand_overs *h = &d->hand_overs;
    if (h->way == CV_METAL_EVENT) {
        CV_SEND(&d->objc, void, h->releases, set_signaled, (uint64_t), h->number);
        return;
    }
    set_word(h, CV_WORD_GAVE_UP, (uint32_t)h->number); /* what follows does not stop at all */
    set_word(h, CV_WORD_RELEASED, (uint32_t)h->number);
}

/* The host's part of a hand-over to which the GPU has come. */
static int serve(cv_metal_device *d, const cv_metal_hand_over *j) {
    cv_metal_hand_overs *h = &d->hand_overs;
    uint64_t start = cv_metal_now_ns();
    bool event = h->way == CV_METAL_EVENT;
    if (event) {
        memcpy(h->staging, j->x, j->n * sizeof *j->x);
        cv_metal_watch_start(h->watch, h->number, h->patience_ns);
    }
    int code = j->work.run(j->work.context, j->work.part, h->staging, j->n);
    if (event && !cv_metal_watch_stop(h->watch)) h->late = true;
    h->took_ns = cv_metal_now_ns() - start;
    if (code) return code;
    h->served++;
    h->joined++;
    if (h->late) return CV_OK;
    if (!event) {
        set_word(h, CV_WORD_RELEASED, (uint32_t)j->number);
        return CV_OK;
    }
    memcpy(j->x, h->staging, j->n * sizeof *j->x);
    CV_SEND(&d->objc, void, h->releases, set_signaled, (uint64_t), j->number);
    return CV_OK;
}

void cv_metal_serve(cv_metal_device *d) {
    cv_metal_hand_overs *h = &d->hand_overs;
    arrival came = CAME;
    while (!d->code && !h->late && h->served < h->n_joins) {
        const cv_metal_hand_over *j = &h->joins[h->served];
        came = wait_for_gpu(d, j->number);
        if (came != CAME) break;
        int code = serve(d, j);
        if (code) cv_metal_refuse(d, code, "the host's work between two parts of a step failed");
    }
    if (h->n_joins && (d->code || came == FAILED)) let_go(d);
}

void cv_metal_end_hand_overs(cv_metal_device *d) {
    cv_metal_hand_overs *h = &d->hand_overs;
    if (d->code) return;
    if (h->n_joins && h->way == CV_METAL_SPIN && word(h, CV_WORD_GAVE_UP)) h->late = true;
    if (!h->late && h->n_joins && h->stale && ++h->seen >= FORGET_STEPS) h->stale = 0;
    if (!h->late || !h->served) return;
    h->seen = 0;
    const cv_metal_hand_over *last = &h->joins[h->served - 1]; /* the GPU gives up only where it has come to */
    memcpy(last->x, h->staging, last->n * sizeof *last->x);
    h->calm = CALM_STEPS + 1;
    uint64_t patience_ns = h->way == CV_METAL_SPIN ? h->spin_ns : h->patience_ns;
    if (h->took_ns < patience_ns / 2 && ++h->stale >= MOST_STALE) {
        h->ns[h->way] = 0;
        h->way = cv_metal_quickest_way(h, h->way);
    }
}

void cv_metal_close_hand_overs(cv_metal_device *d) {
    cv_metal_hand_overs *h = &d->hand_overs;
    cv_metal_watch_close(h->watch);
    cv_metal_release(d, h->arrivals);
    cv_metal_release(d, h->releases);
    free(h->joins);
}
