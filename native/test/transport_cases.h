/* transport_cases.h — what any transport must do, as bodies of ranks (ranks.h) and the checks around them: sums with the bits of a sum in rank
 * order, messages whole and in order, channels at the same time, killed and stopped ranks. */
#ifndef CV_TEST_TRANSPORT_CASES_H
#define CV_TEST_TRANSPORT_CASES_H

#include <pthread.h>

#include "check.h"
#include "ranks.h"

static inline const char *kind_name(uint32_t kind) { return kind == CV_TRANSPORT_SHM ? "shared memory" : kind == CV_TRANSPORT_TCP ? "TCP" : "RDMA"; }

enum { BAD_SUM = -100, BAD_BYTES = -101, BAD_CODE = -102, LATE = -103 };

static inline float value(uint32_t rank, size_t i, size_t turn) {
    unsigned long long s = (rank + 1) * 0x9e3779b97f4a7c15ull + i * 0xbf58476d1ce4e5b9ull + turn * 0x94d049bb133111ebull + 1;
    return (float)(long long)(cv_random(&s) >> 40) * 1e-3f - 8000.0f;
}

/* One all-reduce whose result must have the bits of a sum in rank order. */
static inline int reduce_once(cv_group *g, cv_members m, size_t n, size_t turn) {
    float *x = malloc((n + 1) * sizeof *x);
    uint32_t self = cv_group_rank(g);
    for (size_t i = 0; i < n; i++) x[i] = value(self, i, turn);
    x[n] = 42;
    int code = cv_all_reduce(g, m, x, n, RANKS_PATIENCE_MS);
    for (size_t i = 0; i < n && code == CV_OK; i++) {
        float sum = value(m.first, i, turn);
        for (uint32_t r = 1; r < m.count; r++) sum += value(m.first + r, i, turn);
        if (memcmp(&sum, &x[i], sizeof sum)) code = BAD_SUM;
    }
    if (x[n] != 42) code = BAD_SUM;
    free(x);
    return code;
}

static const size_t reduce_sizes[] = {0, 1, 2, 3, 5, 31, 1000, 2047, 2048, 2049, 4097, 5120, 65536, 65537, 300001};
#define N_REDUCE_SIZES (sizeof reduce_sizes / sizeof *reduce_sizes)

static inline int body_sums(cv_group *g, uint32_t rank, rank_world *w) {
    cv_members all = {0, w->size};
    for (size_t k = 0; k < N_REDUCE_SIZES; k++) {
        if (w->largest && reduce_sizes[k] * sizeof(float) > w->largest) continue;
        int code = reduce_once(g, all, reduce_sizes[k], k);
        if (code != CV_OK) return code;
    }
    /* Tensor groups of a pipeline: two halves at once, then everybody, then this rank alone. */
    for (size_t turn = 0; w->size >= 2 && turn < 40; turn++) {
        uint32_t half = w->size / 2;
        cv_members m = rank < half ? (cv_members){0, half} : (cv_members){half, w->size - half};
        int code = reduce_once(g, m, 100 + turn * 37, turn);
        if (code == CV_OK && turn % 10 == 0) code = reduce_once(g, all, RANKS_PATIENCE_MS, turn);
        if (code == CV_OK) code = reduce_once(g, (cv_members){rank, 1}, 10, turn);
        if (code != CV_OK) return code;
    }
    uint32_t mine[3] = {rank, rank * rank, 7}, out[3 * RANKS_MOST];
    int code = cv_all_gather(g, all, mine, sizeof mine, out, RANKS_PATIENCE_MS);
    for (uint32_t r = 0; r < w->size && code == CV_OK; r++)
        if (out[3 * r] != r || out[3 * r + 1] != r * r || out[3 * r + 2] != 7) code = BAD_BYTES;
    cv_group_stats_record s;
    cv_group_stats(g, &s, NULL, 0);
    w->rank[rank].number = s.reduces;
    return code != CV_OK ? code : cv_group_barrier(g, RANKS_PATIENCE_MS);
}

static inline void fill(unsigned char *p, size_t n, uint64_t seed) {
    unsigned long long s = seed * 2 + 1;
    for (size_t i = 0; i < n; i++) p[i] = (unsigned char)(i % 64 == 0 ? (s = cv_random(&s)) : s >> (i % 8));
}

/* Both ranks measure their connection, twice, and give the same figures; then it still works. */
static inline int body_measure(cv_group *g, uint32_t rank, rank_world *w) {
    double trip = 0, bandwidth = 0, both[4];
    char why[200] = "";
    for (int turn = 0; turn < 2; turn++) {
        int code = cv_group_measure(g, 60, &trip, &bandwidth, why, sizeof why);
        snprintf(w->rank[rank].words, sizeof w->rank[rank].words, "%.1f us, %.1f MB/s %.80s", trip, bandwidth / 1e6, why);
        if (code != CV_OK) return code;
    }
    double mine[2] = {trip, bandwidth};
    int code = cv_all_gather(g, (cv_members){0, 2}, mine, sizeof mine, both, RANKS_PATIENCE_MS);
    if (code != CV_OK) return code;
    if (trip <= 0 || bandwidth <= 0 || both[0] != both[2] || both[1] != both[3]) return BAD_BYTES;
    return cv_group_measure(g, 0, &trip, &bandwidth, why, sizeof why) == CV_E_ARGUMENT ? CV_OK : BAD_CODE;
}

/* Rank 0 sends messages of all sizes to each other rank, and they send them back. */
static inline int body_messages(cv_group *g, uint32_t rank, rank_world *w) {
    static const size_t bytes[] = {0, 1, 63, 64, 65, 1000, 4096, 65535, 65536, 65537, 262144, 262145, 700001, 3000000};
    for (uint32_t peer = 1; peer < w->size; peer++)
        for (size_t k = 0; k < 2 * sizeof bytes / sizeof *bytes; k++) {
            size_t n = bytes[k / 2];
            if ((rank != 0 && rank != peer) || (w->largest && n > w->largest)) continue;
            unsigned char *want = malloc(n + 1), *got = malloc(n + 1);
            fill(want, n, k + peer);
            int code;
            if (rank == 0) {
                code = k % 2 ? cv_send_any(g, peer, CV_CHANNEL_STEP, want, n, RANKS_PATIENCE_MS) : cv_send(g, peer, CV_CHANNEL_STEP, want, n, RANKS_PATIENCE_MS);
                if (code == CV_OK) code = cv_recv(g, peer, CV_CHANNEL_RESULT, got, n, RANKS_PATIENCE_MS);
            } else {
                void *data = NULL;
                size_t size = 0;
                code = k % 2 ? cv_recv_any(g, 0, CV_CHANNEL_STEP, &data, &size, 4 << 20, k % 4 == 1 ? 0 : RANKS_PATIENCE_MS) : cv_recv(g, 0, CV_CHANNEL_STEP, got, n, RANKS_PATIENCE_MS);
                if (data) {
                    if (size == n) memcpy(got, data, n);
                    else code = BAD_BYTES;
                    free(data);
                }
                if (code == CV_OK) code = cv_send(g, 0, CV_CHANNEL_RESULT, got, n, RANKS_PATIENCE_MS);
            }
            if (code == CV_OK && memcmp(want, got, n)) code = BAD_BYTES;
            free(want);
            free(got);
            if (code != CV_OK) return code;
        }
    /* Order: a burst that is read later. */
    for (uint32_t i = 0; i < 300; i++) {
        int code = CV_OK;
        uint32_t got = 0, from = (rank + w->size - 1) % w->size;
        if (i < 150) code = cv_send(g, (rank + 1) % w->size, CV_CHANNEL_HIDDEN, &i, sizeof i, RANKS_PATIENCE_MS);
        if (i >= 150) code = cv_recv(g, from, CV_CHANNEL_HIDDEN, &got, sizeof got, RANKS_PATIENCE_MS);
        if (code != CV_OK) return code;
        if (i >= 150 && got != i - 150) return BAD_BYTES;
    }
    return CV_OK;
}

typedef struct {
    cv_group *g;
    uint32_t channel, size;
    int code;
} lane_job;

/* Passes numbers round the ring of ranks on one channel. */
static inline void *run_lane(void *arg) {
    lane_job *j = arg;
    uint32_t rank = cv_group_rank(j->g), next = (rank + 1) % j->size, before = (rank + j->size - 1) % j->size;
    size_t n = j->channel == CV_CHANNEL_HIDDEN ? 40000 : 100;
    uint32_t *out = calloc(n, sizeof *out), *in = calloc(n, sizeof *in);
    for (uint32_t i = 0; i < 60 && j->code == CV_OK; i++) {
        out[0] = rank * 1000 + i;
        out[n - 1] = j->channel;
        j->code = cv_send(j->g, next, j->channel, out, n * sizeof *out, RANKS_PATIENCE_MS);
        if (j->code == CV_OK) j->code = cv_recv(j->g, before, j->channel, in, n * sizeof *in, RANKS_PATIENCE_MS);
        if (j->code == CV_OK && (in[0] != before * 1000 + i || in[n - 1] != j->channel)) j->code = BAD_BYTES;
    }
    free(out);
    free(in);
    return NULL;
}

static inline int body_channels(cv_group *g, uint32_t rank, rank_world *w) {
    (void)rank;
    pthread_t threads[3];
    lane_job jobs[3];
    for (uint32_t i = 0; i < 3; i++) {
        jobs[i] = (lane_job){g, CV_CHANNEL_HIDDEN + i, w->size, CV_OK};
        pthread_create(&threads[i], NULL, run_lane, &jobs[i]);
    }
    int code = CV_OK;
    for (size_t turn = 0; turn < 60 && code == CV_OK; turn++) code = reduce_once(g, (cv_members){0, w->size}, 3000, turn);
    for (uint32_t i = 0; i < 3; i++) {
        pthread_join(threads[i], NULL);
        if (code == CV_OK) code = jobs[i].code;
    }
    return code;
}

/* All ranks ended with `want`, over `kind`. */
static inline void check_all(cv_checks *c, rank_world *w, int want) {
    cv_check(c, ranks_finish(w), "a rank did not end in time, or badly");
    for (uint32_t r = 0; r < w->size; r++)
        cv_check(c, w->rank[r].ended && w->rank[r].code == want, "rank %u: ended %d, code %d: %s %s", r, w->rank[r].ended, w->rank[r].code, w->rank[r].text, w->rank[r].note);
}

/* The body on a world that the caller has made; frees it. */
static inline void works_in(cv_checks *c, const char *what, rank_body body, rank_world *w) {
    char name[120];
    snprintf(name, sizeof name, "%s (%u ranks, %s)", what, w->size, kind_name(w->transport));
    cv_case(c, name);
    ranks_start(w, body);
    check_all(c, w, CV_OK);
    for (uint32_t r = 0; r < w->size; r++) cv_check(c, w->size == 1 || w->rank[r].transport == w->transport, "rank %u took transport %u", r, w->rank[r].transport);
    ranks_free(w);
    cv_end_case(c);
}

static inline void works(cv_checks *c, const char *what, rank_body body, uint32_t size, uint32_t kind) { works_in(c, what, body, kind == CV_TRANSPORT_RDMA ? ranks_new(size, kind) : ranks_patient(size, kind)); }

/* What a rank saw of a fault: code, text, and the time since w->stamp_ns. */
static inline void check_fault(cv_checks *c, rank_world *w, uint32_t rank, int code, const char *words, double limit_s) {
    const rank_report *r = &w->rank[rank];
    double s = ((double)r->ended_ns - (double)atomic_load(&w->stamp_ns)) * 1e-9;
    cv_check(c, r->ended && r->code == code && strstr(r->text, words), "rank %u: ended %d, code %d, not %d with \"%s\": %s", rank, r->ended, r->code, code, words, r->text);
    limit_s += ranks_allowance(w);
    cv_check(c, s <= limit_s, "rank %u needed %.2f s, not %.2f: %s", rank, s, limit_s, r->text);
}

/* Reduces for ever, or waits for ever; the test does something to a rank meanwhile. */
static inline int body_busy(cv_group *g, uint32_t rank, rank_world *w) {
    (void)rank;
    for (size_t turn = 0;; turn++) {
        int code = reduce_once(g, (cv_members){0, w->size}, RANKS_PATIENCE_MS, turn);
        if (code != CV_OK) return code;
        if (turn == 20) atomic_fetch_add(&w->count, 1);
    }
}

static inline int body_idle(cv_group *g, uint32_t rank, rank_world *w) {
    int code = cv_group_barrier(g, RANKS_PATIENCE_MS);
    if (code != CV_OK) return code;
    atomic_fetch_add(&w->count, 1);
    void *data;
    size_t bytes;
    return cv_recv_any(g, (rank + 1) % w->size, CV_CHANNEL_STEP, &data, &bytes, 100, 0);
}

/* The last rank gets a signal when all are at it; the others must end in time and name it. Frees the world. */
static inline void fault_in(cv_checks *c, const char *what, rank_body body, rank_world *w, int signal_number, double limit_s) {
    char name[120];
    snprintf(name, sizeof name, "%s (%u ranks, %s)", what, w->size, kind_name(w->transport));
    cv_case(c, name);
    uint32_t victim = w->size - 1;
    ranks_start(w, body);
    cv_check(c, ranks_await(&w->count, (int)w->size, RANKS_PATIENCE_MS), "the ranks did not begin");
    atomic_store(&w->stamp_ns, cv_now());
    kill(w->pid[victim], signal_number);
    for (uint32_t r = 0; r < victim; r++) ranks_await(&w->rank[r].ended, 1, RANKS_PATIENCE_MS);
    if (signal_number == SIGSTOP) kill(w->pid[victim], SIGKILL);
    cv_check(c, ranks_finish(w), "a rank did not end in time, or badly");
    char words[40];
    snprintf(words, sizeof words, "rank %u", victim);
    for (uint32_t r = 0; r < victim; r++) check_fault(c, w, r, CV_E_GROUP, words, limit_s);
    ranks_free(w);
    cv_end_case(c);
}

static inline void fault(cv_checks *c, const char *what, rank_body body, uint32_t size, uint32_t kind, int signal_number, double limit_s) {
    fault_in(c, what, body, signal_number == SIGSTOP ? ranks_new(size, kind) : ranks_patient(size, kind), signal_number, limit_s);
}

#endif
