/* test_transport.c — groups of ranks over every transport: sums with equal bits, messages in order, channels that do not disturb each other,
 * and faults: every wait ends within its limit and names the rank. Ranks are forked processes (ranks.h). */
#include <pthread.h>

#include "check.h"
#include "ranks.h"

static const char *kind_name(uint32_t kind) { return kind == CV_TRANSPORT_SHM ? "shared memory" : kind == CV_TRANSPORT_TCP ? "TCP" : "RDMA"; }

enum { BAD_SUM = -100, BAD_BYTES = -101, BAD_CODE = -102, LATE = -103 };

static float value(uint32_t rank, size_t i, size_t turn) {
    unsigned long long s = (rank + 1) * 0x9e3779b97f4a7c15ull + i * 0xbf58476d1ce4e5b9ull + turn * 0x94d049bb133111ebull + 1;
    return (float)(long long)(cv_random(&s) >> 40) * 1e-3f - 8000.0f;
}

/* One all-reduce whose result must have the bits of a sum in rank order. */
static int reduce_once(cv_group *g, cv_members m, size_t n, size_t turn) {
    float *x = malloc((n + 1) * sizeof *x);
    uint32_t self = cv_group_rank(g);
    for (size_t i = 0; i < n; i++) x[i] = value(self, i, turn);
    x[n] = 42;
    int code = cv_all_reduce(g, m, x, n, 20000);
    for (size_t i = 0; i < n && code == CV_OK; i++) {
        float sum = value(m.first, i, turn);
        for (uint32_t r = 1; r < m.count; r++) sum += value(m.first + r, i, turn);
        if (memcmp(&sum, &x[i], sizeof sum)) code = BAD_SUM;
    }
    if (x[n] != 42) code = BAD_SUM;
    free(x);
    return code;
}

static const size_t sizes[] = {0, 1, 2, 3, 5, 31, 1000, 2047, 2048, 2049, 4097, 5120, 65536, 65537, 300001};
#define N_SIZES (sizeof sizes / sizeof *sizes)

static int body_sums(cv_group *g, uint32_t rank, rank_world *w) {
    cv_members all = {0, w->size};
    for (size_t k = 0; k < N_SIZES; k++) {
        int code = reduce_once(g, all, sizes[k], k);
        if (code != CV_OK) return code;
    }
    /* Tensor groups of a pipeline: two halves at once, then everybody, then this rank alone. */
    for (size_t turn = 0; w->size >= 2 && turn < 40; turn++) {
        uint32_t half = w->size / 2;
        cv_members m = rank < half ? (cv_members){0, half} : (cv_members){half, w->size - half};
        int code = reduce_once(g, m, 100 + turn * 37, turn);
        if (code == CV_OK && turn % 10 == 0) code = reduce_once(g, all, 5000, turn);
        if (code == CV_OK) code = reduce_once(g, (cv_members){rank, 1}, 10, turn);
        if (code != CV_OK) return code;
    }
    uint32_t mine[3] = {rank, rank * rank, 7}, out[3 * RANKS_MOST];
    int code = cv_all_gather(g, all, mine, sizeof mine, out, 5000);
    for (uint32_t r = 0; r < w->size && code == CV_OK; r++)
        if (out[3 * r] != r || out[3 * r + 1] != r * r || out[3 * r + 2] != 7) code = BAD_BYTES;
    cv_group_stats_record s;
    cv_group_stats(g, &s, NULL, 0);
    w->rank[rank].number = s.reduces;
    return code != CV_OK ? code : cv_group_barrier(g, 5000);
}

static void fill(unsigned char *p, size_t n, uint64_t seed) {
    unsigned long long s = seed * 2 + 1;
    for (size_t i = 0; i < n; i++) p[i] = (unsigned char)(i % 64 == 0 ? (s = cv_random(&s)) : s >> (i % 8));
}

/* Rank 0 sends messages of all sizes to each other rank, and they send them back. */
static int body_messages(cv_group *g, uint32_t rank, rank_world *w) {
    static const size_t bytes[] = {0, 1, 63, 64, 65, 1000, 4096, 65535, 65536, 65537, 262144, 262145, 700001, 3000000};
    for (uint32_t peer = 1; peer < w->size; peer++)
        for (size_t k = 0; k < 2 * sizeof bytes / sizeof *bytes; k++) {
            if (rank != 0 && rank != peer) continue;
            size_t n = bytes[k / 2];
            unsigned char *want = malloc(n + 1), *got = malloc(n + 1);
            fill(want, n, k + peer);
            int code;
            if (rank == 0) {
                code = k % 2 ? cv_send_any(g, peer, CV_CHANNEL_STEP, want, n, 10000) : cv_send(g, peer, CV_CHANNEL_STEP, want, n, 10000);
                if (code == CV_OK) code = cv_recv(g, peer, CV_CHANNEL_RESULT, got, n, 10000);
            } else {
                void *data = NULL;
                size_t size = 0;
                code = k % 2 ? cv_recv_any(g, 0, CV_CHANNEL_STEP, &data, &size, 4 << 20, k % 4 == 1 ? 0 : 10000) : cv_recv(g, 0, CV_CHANNEL_STEP, got, n, 10000);
                if (data) {
                    if (size == n) memcpy(got, data, n);
                    else code = BAD_BYTES;
                    free(data);
                }
                if (code == CV_OK) code = cv_send(g, 0, CV_CHANNEL_RESULT, got, n, 10000);
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
        if (i < 150) code = cv_send(g, (rank + 1) % w->size, CV_CHANNEL_HIDDEN, &i, sizeof i, 5000);
        if (i >= 150) code = cv_recv(g, from, CV_CHANNEL_HIDDEN, &got, sizeof got, 5000);
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
static void *run_lane(void *arg) {
    lane_job *j = arg;
    uint32_t rank = cv_group_rank(j->g), next = (rank + 1) % j->size, before = (rank + j->size - 1) % j->size;
    size_t n = j->channel == CV_CHANNEL_HIDDEN ? 40000 : 100;
    uint32_t *out = calloc(n, sizeof *out), *in = calloc(n, sizeof *in);
    for (uint32_t i = 0; i < 60 && j->code == CV_OK; i++) {
        out[0] = rank * 1000 + i;
        out[n - 1] = j->channel;
        j->code = cv_send(j->g, next, j->channel, out, n * sizeof *out, 10000);
        if (j->code == CV_OK) j->code = cv_recv(j->g, before, j->channel, in, n * sizeof *in, 10000);
        if (j->code == CV_OK && (in[0] != before * 1000 + i || in[n - 1] != j->channel)) j->code = BAD_BYTES;
    }
    free(out);
    free(in);
    return NULL;
}

static int body_channels(cv_group *g, uint32_t rank, rank_world *w) {
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

static int body_nothing(cv_group *g, uint32_t rank, rank_world *w) {
    (void)rank, (void)w;
    return cv_group_barrier(g, 5000);
}

/* All ranks ended with `want`, over `kind`. */
static void check_all(cv_checks *c, rank_world *w, int want) {
    cv_check(c, ranks_finish(w), "a rank did not end in time, or badly");
    for (uint32_t r = 0; r < w->size; r++)
        cv_check(c, w->rank[r].ended && w->rank[r].code == want, "rank %u: ended %d, code %d: %s %s", r, w->rank[r].ended, w->rank[r].code, w->rank[r].text, w->rank[r].note);
}

static void works(cv_checks *c, const char *what, rank_body body, uint32_t size, uint32_t kind) {
    char name[120];
    snprintf(name, sizeof name, "%s (%u ranks, %s)", what, size, kind_name(kind));
    cv_case(c, name);
    rank_world *w = ranks_new(size, kind);
    ranks_start(w, body);
    check_all(c, w, CV_OK);
    for (uint32_t r = 0; r < size; r++) cv_check(c, size == 1 || w->rank[r].transport == kind, "rank %u took transport %u", r, w->rank[r].transport);
    ranks_free(w);
    cv_end_case(c);
}

/* ---- faults ---- */

/* What a rank saw of a fault: code, text, and the time since w->stamp_ns. */
static void check_fault(cv_checks *c, rank_world *w, uint32_t rank, int code, const char *words, double limit_s) {
    const rank_report *r = &w->rank[rank];
    double s = ((double)r->ended_ns - (double)atomic_load(&w->stamp_ns)) * 1e-9;
    cv_check(c, r->ended && r->code == code && strstr(r->text, words), "rank %u: ended %d, code %d, not %d with \"%s\": %s", rank, r->ended, r->code, code, words, r->text);
    cv_check(c, s <= limit_s, "rank %u needed %.2f s, not %.2f: %s", rank, s, limit_s, r->text);
}

/* Rank 1 never takes part in the second reduce. */
static int body_late(cv_group *g, uint32_t rank, rank_world *w) {
    int code = reduce_once(g, (cv_members){0, w->size}, 100, 0);
    if (code != CV_OK) return code;
    if (rank == 0) atomic_store(&w->stamp_ns, cv_now());
    float x[100] = {0};
    if (rank == 1) {
        /* It lives and beats, but computes too long. It hears of the failure all the same. */
        char why[512] = "";
        for (uint64_t until = cv_now() + 5000 * CV_MS; !why[0] && cv_now() < until; usleep(1000)) cv_group_error(g, why, sizeof why);
    } else {
        code = cv_all_reduce(g, (cv_members){0, w->size}, x, 100, 400);
        if (code == CV_OK) return BAD_CODE;
    }
    int again = cv_all_reduce(g, (cv_members){0, w->size}, x, 100, 400), sent = cv_send(g, (rank + 1) % w->size, 2, x, 4, 400);
    return again == CV_E_GROUP && sent == CV_E_GROUP && cv_group_barrier(g, 1000) == CV_E_GROUP ? CV_E_GROUP : BAD_CODE;
}

static void *abort_soon(void *arg) {
    usleep(100000);
    cv_group_abort(arg, "the operator said so");
    return NULL;
}

static int body_abort(cv_group *g, uint32_t rank, rank_world *w) {
    int code = cv_group_barrier(g, 5000);
    if (code != CV_OK) return code;
    if (rank == 0) atomic_store(&w->stamp_ns, cv_now() + 100 * CV_MS);
    pthread_t t;
    if (rank == 0) pthread_create(&t, NULL, abort_soon, g);
    void *data;
    size_t bytes;
    code = cv_recv_any(g, rank ? 0 : 1, CV_CHANNEL_STEP, &data, &bytes, 100, 0);
    if (rank == 0) pthread_join(t, NULL);
    return code;
}

/* Reduces for ever, or waits for ever; the test does something to a rank meanwhile. */
static int body_busy(cv_group *g, uint32_t rank, rank_world *w) {
    (void)rank;
    for (size_t turn = 0;; turn++) {
        int code = reduce_once(g, (cv_members){0, w->size}, 5000, turn);
        if (code != CV_OK) return code;
        if (turn == 20) atomic_fetch_add(&w->count, 1);
    }
}

static int body_idle(cv_group *g, uint32_t rank, rank_world *w) {
    int code = cv_group_barrier(g, 5000);
    if (code != CV_OK) return code;
    atomic_fetch_add(&w->count, 1);
    void *data;
    size_t bytes;
    return cv_recv_any(g, (rank + 1) % w->size, CV_CHANNEL_STEP, &data, &bytes, 100, 0);
}

static void fault(cv_checks *c, const char *what, rank_body body, uint32_t size, uint32_t kind, int signal_number, double limit_s) {
    char name[120];
    snprintf(name, sizeof name, "%s (%u ranks, %s)", what, size, kind_name(kind));
    cv_case(c, name);
    rank_world *w = ranks_new(size, kind);
    uint32_t victim = size - 1;
    ranks_start(w, body);
    cv_check(c, ranks_await(&w->count, (int)size, 20000), "the ranks did not begin");
    atomic_store(&w->stamp_ns, cv_now());
    kill(w->pid[victim], signal_number);
    for (uint32_t r = 0; r < victim; r++) ranks_await(&w->rank[r].ended, 1, 10000);
    if (signal_number == SIGSTOP) kill(w->pid[victim], SIGKILL);
    cv_check(c, ranks_finish(w), "a rank did not end in time, or badly");
    char words[40];
    snprintf(words, sizeof words, "rank %u", victim);
    for (uint32_t r = 0; r < victim; r++) check_fault(c, w, r, CV_E_GROUP, words, limit_s);
    ranks_free(w);
    cv_end_case(c);
}

static int body_wrong_size(cv_group *g, uint32_t rank, rank_world *w) {
    (void)w;
    char x[64] = {0};
    if (rank == 0) {
        cv_send(g, 1, CV_CHANNEL_STEP, x, 10, 5000);
        return cv_recv(g, 1, CV_CHANNEL_STEP, x, 10, 5000);
    }
    return cv_recv(g, 0, CV_CHANNEL_STEP, x, 11, 5000);
}

/* Rank 0 sends its last message and leaves; the others read it much later. */
static int body_goodbye(cv_group *g, uint32_t rank, rank_world *w) {
    int code = cv_group_barrier(g, 5000);
    if (code != CV_OK || rank == 0) {
        for (uint32_t r = 1; r < w->size && code == CV_OK; r++) code = cv_send(g, r, CV_CHANNEL_STEP, "end", 4, 5000);
        return code;
    }
    if (!ranks_await(&w->rank[0].ended, 1, 5000)) return LATE;
    usleep(50000);
    char said[4];
    code = cv_recv(g, 0, CV_CHANNEL_STEP, said, 4, 5000);
    if (code != CV_OK || strcmp(said, "end")) return BAD_BYTES;
    void *data;
    size_t bytes;
    atomic_store(&w->stamp_ns, cv_now());
    return cv_recv_any(g, 0, CV_CHANNEL_STEP, &data, &bytes, 100, 0);
}

static void goodbye(cv_checks *c, uint32_t kind) {
    char name[120];
    snprintf(name, sizeof name, "what a rank sent before it left is still delivered, then the others hear that it left (%s)", kind_name(kind));
    cv_case(c, name);
    rank_world *w = ranks_new(2, kind);
    ranks_start(w, body_goodbye);
    cv_check(c, ranks_finish(w), "a rank did not end in time, or badly");
    cv_check(c, w->rank[0].code == CV_OK, "rank 0: %d %s", w->rank[0].code, w->rank[0].text);
    check_fault(c, w, 1, CV_E_GROUP, "rank 0 left the group", 1.0);
    ranks_free(w);
    cv_end_case(c);
}

static void late(cv_checks *c, uint32_t kind) {
    char name[120];
    snprintf(name, sizeof name, "a rank that does not answer in time is named, and the group stays over for all (%s)", kind_name(kind));
    cv_case(c, name);
    rank_world *w = ranks_new(3, kind);
    ranks_start(w, body_late);
    cv_check(c, ranks_finish(w), "a rank did not end in time, or badly");
    for (uint32_t r = 0; r < 3; r++) check_fault(c, w, r, CV_E_GROUP, "rank 1 did not answer within 4", 1.5);
    ranks_free(w);
    cv_end_case(c);
}

static void aborted(cv_checks *c, uint32_t kind) {
    char name[120];
    snprintf(name, sizeof name, "an abort from another thread ends every rank (%s)", kind_name(kind));
    cv_case(c, name);
    rank_world *w = ranks_new(3, kind);
    ranks_start(w, body_abort);
    cv_check(c, ranks_finish(w), "a rank did not end in time, or badly");
    check_fault(c, w, 0, CV_E_ABORTED, "the operator said so", 0.5);
    for (uint32_t r = 1; r < 3; r++) check_fault(c, w, r, CV_E_GROUP, "rank 0 aborted: the operator said so", 0.7);
    ranks_free(w);
    cv_end_case(c);
}

static void wrong_size(cv_checks *c, uint32_t kind) {
    char name[120];
    snprintf(name, sizeof name, "a message of another size than expected is an error (%s)", kind_name(kind));
    cv_case(c, name);
    rank_world *w = ranks_new(2, kind);
    atomic_store(&w->stamp_ns, cv_now());
    ranks_start(w, body_wrong_size);
    cv_check(c, ranks_finish(w), "a rank did not end in time, or badly");
    for (uint32_t r = 0; r < 2; r++) check_fault(c, w, r, CV_E_GROUP, "a message of 10 bytes where 11 were expected", 3);
    ranks_free(w);
    cv_end_case(c);
}

/* ---- connecting ---- */

static void new_epoch(cv_checks *c) {
    cv_case(c, "after a failure the next epoch starts clean, on the same host");
    for (uint64_t epoch = 1; epoch <= 3; epoch++) {
        rank_world *w = ranks_new(3, epoch == 2 ? CV_TRANSPORT_TCP : CV_TRANSPORT_AUTO);
        w->epoch = epoch;
        ranks_start(w, epoch == 3 ? body_sums : body_busy);
        if (epoch < 3) {
            cv_check(c, ranks_await(&w->count, 3, 20000), "the ranks did not begin");
            kill(w->pid[1], SIGKILL);
            ranks_finish(w);
        } else check_all(c, w, CV_OK);
        ranks_free(w);
    }
    cv_end_case(c);
}

static void votes(cv_checks *c) {
    cv_case(c, "ranks of one host choose shared memory by themselves");
    rank_world *w = ranks_new(3, CV_TRANSPORT_AUTO);
    ranks_start(w, body_nothing);
    check_all(c, w, CV_OK);
    for (uint32_t r = 0; r < 3; r++) cv_check(c, w->rank[r].transport == CV_TRANSPORT_SHM && !w->rank[r].note[0], "rank %u: transport %u, \"%s\"", r, w->rank[r].transport, w->rank[r].note);
    ranks_free(w);
    cv_end_case(c);

    cv_case(c, "what is forced on one rank is forced on all");
    w = ranks_new(3, CV_TRANSPORT_AUTO);
    w->change = ranks_options(w, 2);
    w->change.transport = CV_TRANSPORT_TCP;
    w->changed = 2;
    ranks_start(w, body_nothing);
    check_all(c, w, CV_OK);
    for (uint32_t r = 0; r < 3; r++) cv_check(c, w->rank[r].transport == CV_TRANSPORT_TCP, "rank %u: transport %u", r, w->rank[r].transport);
    ranks_free(w);
    cv_end_case(c);

    cv_case(c, "ranks that are told to use different transports refuse, and say who was told what");
    w = ranks_new(2, CV_TRANSPORT_SHM);
    w->change = ranks_options(w, 1);
    w->change.transport = CV_TRANSPORT_TCP;
    w->changed = 1;
    ranks_start(w, body_nothing);
    check_all(c, w, CV_E_GROUP);
    for (uint32_t r = 0; r < 2; r++) cv_check(c, strstr(w->rank[r].text, "rank 0 was told to use shared memory, rank 1 TCP"), "%s", w->rank[r].text);
    ranks_free(w);
    cv_end_case(c);
}

static void connecting(cv_checks *c) {
    cv_case(c, "a rank that never connects is named at the deadline");
    rank_world *w = ranks_new(3, CV_TRANSPORT_AUTO);
    w->connect_ms = 700;
    w->change = ranks_options(w, 2);
    w->change.key[0] ^= 1; /* rank 2 is there, but with another key */
    w->changed = 2;
    atomic_store(&w->stamp_ns, cv_now());
    ranks_start(w, body_nothing);
    check_all(c, w, CV_E_GROUP);
    for (uint32_t r = 0; r < 2; r++) cv_check(c, strstr(w->rank[r].text, "rank 2 did not connect in time"), "rank %u: %s", r, w->rank[r].text);
    cv_check(c, (double)(cv_now() - atomic_load(&w->stamp_ns)) * 1e-9 < 3, "connecting took too long");
    ranks_free(w);
    cv_end_case(c);

    cv_case(c, "an address of another epoch is refused with both epochs");
    w = ranks_new(2, CV_TRANSPORT_AUTO);
    w->connect_ms = 700;
    w->change = ranks_options(w, 1);
    w->change.epoch = 9;
    w->changed = 1;
    ranks_start(w, body_nothing);
    cv_check(c, ranks_finish(w), "a rank did not end in time, or badly");
    cv_check(c, w->rank[0].code == CV_E_ARGUMENT && strstr(w->rank[0].text, "epoch (9, here 1)"), "%d %s", w->rank[0].code, w->rank[0].text);
    ranks_free(w);
    cv_end_case(c);
}

int main(void) {
    cv_checks c = {0};
    setvbuf(stdout, NULL, _IOLBF, 0);
    static const uint32_t kinds[] = {CV_TRANSPORT_SHM, CV_TRANSPORT_TCP};
    for (size_t k = 0; k < 2; k++) {
        uint32_t kind = kinds[k];
        for (uint32_t size = k ? 2 : 1; size <= 4; size++) works(&c, "sums have the bits of a sum in rank order", body_sums, size, kind);
        works(&c, "messages of all sizes arrive whole and in order", body_messages, 2, kind);
        works(&c, "messages of all sizes arrive whole and in order", body_messages, 4, kind);
        works(&c, "channels run at the same time without disturbing each other", body_channels, 3, kind);
        late(&c, kind);
        aborted(&c, kind);
        wrong_size(&c, kind);
        goodbye(&c, kind);
        fault(&c, "a killed rank ends the others' sums within 1 s", body_busy, 3, kind, SIGKILL, 1.0);
        fault(&c, "a killed rank ends the others' waiting within 2 s", body_idle, 4, kind, SIGKILL, 2.0);
        fault(&c, "a stopped rank is noticed within its silence while the others work", body_busy, 4, kind, SIGSTOP, 1.5);
        fault(&c, "a stopped rank is noticed within two silences while nobody works", body_idle, 3, kind, SIGSTOP, 2.5);
    }
    new_epoch(&c);
    votes(&c);
    connecting(&c);
    return cv_report(&c);
}
