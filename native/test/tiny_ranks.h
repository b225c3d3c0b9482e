/* tiny_ranks.h — the tiny model cut into the plans of several ranks, and those ranks as processes: forked, connected, following.
 * Parts are unequal on purpose, and some ranks have none. */
#ifndef CV_TINY_RANKS_H
#define CV_TINY_RANKS_H

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>

#include "tiny_model.h"

enum { TR_MOST = 8, TR_WAIT_MS = 60000 };

typedef struct {
    uint32_t first, n;
} tr_part;

/* Tensor rank t's part of `units` units of `size`. */
static inline tr_part tr_cut(uint32_t t, uint32_t n_ranks, uint32_t units, uint32_t size) {
    uint32_t first = t * units / n_ranks, end = (t + 1) * units / n_ranks;
    return (tr_part){first * size, (end - first) * size};
}

static inline bool tr_rows(cv_plan_tensor *t, tr_part p) {
    t->weight.offset += p.first * t->weight.row_stride;
    t->rows = p.n;
    return p.n > 0;
}

static inline bool tr_cols(cv_plan_tensor *t, tr_part p) {
    t->weight.offset += p.first * sizeof(float);
    t->cols = p.n;
    return p.n > 0;
}

/* A tensor as a rank has it; false when it has nothing of it. */
static inline bool tr_slice(cv_plan_tensor *t, uint32_t rank, uint32_t n, bool first_stage, bool last_stage) {
    const tr_part kv = tr_cut(rank, n, TM_KV, TM_D), heads = {kv.first * (TM_HEADS / TM_KV), kv.n * (TM_HEADS / TM_KV)};
    const tr_part dense = tr_cut(rank, n, 2, TM_FF / 2), expert = tr_cut(rank, n, 4, TM_FF / 4), shared = tr_cut(rank, n, 1, TM_FF), vocab = tr_cut(rank, n, 3, TM_VOCAB / 3);
    switch (t->slot) {
    case CV_T_EMBED: return first_stage;
    case CV_T_FINAL_NORM: return last_stage;
    case CV_T_HEAD: return last_stage && tr_rows(t, vocab);
    case CV_T_Q: return tr_rows(t, heads);
    case CV_T_K:
    case CV_T_V: return tr_rows(t, kv);
    case CV_T_O: return tr_cols(t, heads);
    case CV_T_Q_BIAS: return tr_cols(t, heads);
    case CV_T_K_BIAS:
    case CV_T_V_BIAS: return tr_cols(t, kv);
    case CV_T_GATE:
    case CV_T_UP: return tr_rows(t, dense);
    case CV_T_DOWN:
    case CV_T_GATE_BIAS:
    case CV_T_UP_BIAS: return tr_cols(t, dense);
    case CV_T_EXPERT_GATE:
    case CV_T_EXPERT_UP: return tr_rows(t, expert);
    case CV_T_EXPERT_DOWN: return tr_cols(t, expert);
    case CV_T_SHARED_GATE:
    case CV_T_SHARED_UP: return tr_rows(t, shared);
    case CV_T_SHARED_DOWN: return tr_cols(t, shared);
    case CV_T_O_BIAS:
    case CV_T_DOWN_BIAS: return rank == 0;
    default: return true;
    }
}

/* The plan of one rank, malloc'ed; its size is the whole model's. Stages have layers in equal numbers. */
static inline uint8_t *tr_plan(const tiny_model *m, uint32_t tensor_size, uint32_t n_stages, uint32_t rank) {
    uint8_t *bytes = aligned_alloc(64, (m->plan_size + 63) / 64 * 64);
    memcpy(bytes, m->plan, m->plan_size);
    cv_plan *p = (cv_plan *)(void *)bytes;
    cv_plan_layer *layers = (cv_plan_layer *)(void *)(bytes + p->layers_offset);
    cv_plan_tensor *tensors = (cv_plan_tensor *)(void *)(bytes + p->tensors_offset);
    uint32_t t = rank % tensor_size, stage = rank / tensor_size, first = stage * p->n_layers / n_stages, end = (stage + 1) * p->n_layers / n_stages, kept = 0;
    const tr_part kv = tr_cut(t, tensor_size, TM_KV, 1), vocab = tr_cut(t, tensor_size, 3, TM_VOCAB / 3);
    bool last = stage + 1 == n_stages;
    for (uint32_t i = 0; i < p->n_tensors; i++) {
        cv_plan_tensor tensor = tensors[i];
        if (tensor.layer >= 0 && (tensor.layer < (int32_t)first || tensor.layer >= (int32_t)end)) continue;
        if (tensor.layer >= 0) tensor.layer -= (int32_t)first;
        if (tr_slice(&tensor, t, tensor_size, stage == 0, last)) tensors[kept++] = tensor;
    }
    for (uint32_t i = first; i < end; i++) {
        layers[i - first] = layers[i];
        layers[i - first].n_kv_heads = kv.n;
        layers[i - first].n_heads = kv.n * (TM_HEADS / TM_KV);
    }
    p->n_tensors = kept;
    p->n_layers = end - first;
    p->tensor_rank = t;
    p->tensor_size = tensor_size;
    p->stage = stage;
    p->n_stages = n_stages;
    p->vocab_first = last ? vocab.first : 0;
    p->vocab_rows = last ? vocab.n : 0;
    p->flags |= CV_MODEL_CHECK_RANKS;
    return bytes;
}

/* What the processes share while they meet, and how each ended. */
typedef struct {
    atomic_uint ready;
    uint64_t sizes[TR_MOST];
    uint8_t addresses[TR_MOST][4096];
    int code[TR_MOST];
    char text[TR_MOST][256];
    uint64_t checks[TR_MOST];
} tr_board;

typedef struct {
    uint32_t stalled; /* set before tr_start: this rank connects, but computes nothing; 0 = none */
    uint32_t slow_ms; /* set before tr_start: that rank takes so long to begin to compute, and then does; 0 = never */
    bool bare;        /* set before tr_start: rank 0 has a group, but no engine */
    uint32_t n, transport;
    tr_board *board;
    pid_t pids[TR_MOST];
    int signals[TR_MOST]; /* after tr_end: what ended a process, 0 = itself */
    cv_group *group; /* rank 0's */
    cv_engine *engine;
} tr_ranks;

static inline bool tr_wait(atomic_uint *count, uint32_t n) {
    for (int ms = 0; atomic_load(count) < n; ms++) {
        if (ms > TR_WAIT_MS) return false;
        usleep(1000);
    }
    return true;
}

static inline int tr_join(tr_ranks *r, uint32_t rank, cv_group **group, char *err) {
    cv_group_options o = {.version = CV_ABI_VERSION, .rank = rank, .size = r->n, .transport = r->transport, .epoch = 1, .instance = {7}, .key = {1, 2, 3}};
    size_t size = sizeof r->board->addresses[0];
    char note[256];
    int code = cv_group_open(&o, sizeof o, r->board->addresses[rank], &size, group, err, 256);
    r->board->sizes[rank] = size;
    atomic_fetch_add(&r->board->ready, 1);
    if (code) return code;
    if (!tr_wait(&r->board->ready, r->n)) return CV_E_GROUP;
    uint8_t all[TR_MOST * 4096];
    size_t at = 0;
    for (uint32_t i = 0; i < r->n; i++) {
        memcpy(all + at, r->board->addresses[i], r->board->sizes[i]);
        at += r->board->sizes[i];
    }
    return cv_group_connect(*group, all, r->board->sizes, 20000, note, sizeof note, err, 256);
}

/* A follower's whole life. */
static inline int tr_follow(tr_ranks *r, uint32_t rank, const uint8_t *plan, size_t size) {
    cv_group *group = NULL;
    cv_engine *e = NULL;
    char *err = r->board->text[rank];
    int code = tr_join(r, rank, &group, err);
    if (!code && rank == r->stalled && r->slow_ms) usleep(r->slow_ms * 1000);
    else if (!code && rank == r->stalled) { /* until the others have given up */
        cv_group_stats_record stats = {0};
        for (int ms = 0; !stats.failed && ms < TR_WAIT_MS; ms++) {
            usleep(1000);
            cv_group_stats(group, &stats, err, 256);
        }
        code = CV_E_GROUP;
    }
    if (!code) code = cv_open(plan, size, group, &e, err, 256);
    if (!code) {
        struct pollfd p = {cv_event_fd(e), POLLIN, 0};
        cv_stats_record stats;
        if (poll(&p, 1, TR_WAIT_MS) != 1) snprintf(err, 256, "following did not end");
        code = cv_follow_state(e, err, 256);
        if (!cv_stats(e, &stats)) r->board->checks[rank] = stats.rank_checks;
    } else if (group) {
        cv_group_abort(group, err);
    }
    cv_close(e);
    cv_group_close(group);
    r->board->code[rank] = code;
    return code;
}

/* Spoils a rank's plan for a test. */
typedef void (*tr_alter)(uint32_t rank, cv_plan *plan);

static inline uint8_t *tr_altered_plan(const tiny_model *m, uint32_t tensor_size, uint32_t n_stages, uint32_t rank, tr_alter alter) {
    uint8_t *plan = tr_plan(m, tensor_size, n_stages, rank);
    if (alter) alter(rank, (cv_plan *)(void *)plan);
    return plan;
}

/* Starts all ranks of a grid; the caller is rank 0, *r zero but for `stalled`, `slow_ms` and `bare`. Before it no thread may run here (processes are forked). alter: NULL, or for every rank. */
static inline int tr_start(tr_ranks *r, const tiny_model *m, uint32_t tensor_size, uint32_t n_stages, uint32_t transport, tr_alter alter, char *err) {
    *r = (tr_ranks){.stalled = r->stalled, .slow_ms = r->slow_ms, .bare = r->bare, .n = tensor_size * n_stages, .transport = transport};
    r->board = mmap(NULL, sizeof *r->board, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (r->board == MAP_FAILED) return CV_E_MEMORY;
    fflush(stdout);
    for (uint32_t i = 1; i < r->n; i++) {
        r->pids[i] = fork();
        if (r->pids[i] < 0) return CV_E_MEMORY;
        if (r->pids[i] == 0) _exit(tr_follow(r, i, tr_altered_plan(m, tensor_size, n_stages, i, alter), m->plan_size) ? 1 : 0);
    }
    uint8_t *plan = tr_altered_plan(m, tensor_size, n_stages, 0, alter);
    int code = tr_join(r, 0, &r->group, err);
    if (!code && !r->bare) code = cv_open(plan, m->plan_size, r->group, &r->engine, err, 256);
    free(plan);
    return code;
}

/* Closes rank 0's engine and waits for the others; false when one of them did not end. Their codes are on the board. */
static inline bool tr_end(tr_ranks *r) {
    bool ended = true;
    cv_close(r->engine);
    for (uint32_t i = 1; i < r->n; i++) {
        int status, ms = 0;
        pid_t pid;
        while ((pid = waitpid(r->pids[i], &status, WNOHANG)) == 0 && ms++ < TR_WAIT_MS) usleep(1000);
        if (pid) {
            r->signals[i] = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
            continue;
        }
        ended = false;
        kill(r->pids[i], SIGKILL);
        waitpid(r->pids[i], &status, 0);
    }
    cv_group_close(r->group);
    return ended;
}

static inline void tr_forget(tr_ranks *r) { munmap(r->board, sizeof *r->board); }

#endif
