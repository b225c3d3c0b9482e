/* cpu_matmul.c — matrix products of a step: jobs are cut into tasks of weight rows x activation rows, and all tasks of
 * all jobs of an operation run in one go. How they are cut changes no bit (kernels.h). */
#include "cpu.h"

#include <stdatomic.h>

enum {
    STREAM_TOKENS = 32,       /* up to here kernels stream weights (decode), above they unpack tiles of them (prefill) */
    STREAM_BYTES = 224 * 1024, /* weights of a streaming task: below, starting a kernel shows; above, a late thread does */
    TASKS_A_THREAD = 3,       /* but at least so many tasks, where the matrix has the rows */
    TILE_ROWS = 64, TILE_TOKENS = 256
};

static size_t least(size_t a, size_t b) { return a < b ? a : b; }
static size_t most(size_t a, size_t b) { return a > b ? a : b; }

void cv_parallel(cv_cpu *c, size_t n, size_t at_least, cv_task_fn fn, void *context) {
    if (n >= at_least) {
        cv_threads_run(c->threads, n, fn, context);
        return;
    }
    for (size_t i = 0; i < n; i++) fn(context, i, 0);
}

static size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

static void cut(cv_job *j, size_t n_threads) {
    const cv_weight *w = j->w[0];
    size_t unit = j->act ? CV_ACT_UNIT : 16, matrices = j->w[1] ? 2 : 1, block = TILE_ROWS;
    j->token_block = least(j->n, TILE_TOKENS);
    if (j->n <= STREAM_TOKENS) {
        size_t row = (w->row_bytes + 2 * w->scale_row_bytes) * matrices;
        block = least(STREAM_BYTES / most(row, 1), w->rows / (n_threads * TASKS_A_THREAD));
    }
    j->row_block = least(round_up(most(block, 1), unit), CV_TILE_FLOATS / j->token_block / unit * unit);
    j->row_tasks = (w->rows + j->row_block - 1) / j->row_block;
    j->token_tasks = (j->n + j->token_block - 1) / j->token_block;
}

static void multiply(const cv_cpu *c, const cv_job *j, int which, size_t r0, size_t r1, size_t t0, size_t n, cv_weight_rows next, float *out, size_t ldo, void *scratch) {
    const cv_weight *w = j->w[which];
    const cv_act *a = j->in;
    size_t first = j->in_first + t0;
    uint32_t need = j->float_input ? CV_NEED_FLOAT : cv_needs_of(c, w);
    /* Kernels write at the row's own index, so the tile's origin is moved back by r0. */
    float *origin = (float *)((uintptr_t)out - r0 * sizeof(float));
    if (need == CV_NEED_FLOAT) {
        c->k->fmatmul(w, j->expert, r0, r1, a->x + first * a->ldx, n, a->ldx, origin, ldo, scratch);
    } else {
        size_t i = need == CV_NEED_Q32 ? 0 : need == CV_NEED_Q64 ? 1 : 2, g_stride = cv_pad16(a->cols / w->group);
        cv_qact q = {.q = a->q[i] + first * a->q_stride, .scale = a->scale[i] + first * g_stride, .sum = a->sum[i] + first * g_stride,
                     .n = n, .cols = w->cols, .group = w->group, .q_stride = a->q_stride, .g_stride = g_stride, .next = next};
        c->k->qmatmul(w, j->expert, r0, r1, &q, origin, ldo, scratch);
    }
    if (j->bias[which])
        for (size_t t = 0; t < n; t++)
            for (size_t r = r0; r < r1; r++) out[t * ldo + r - r0] += j->bias[which][r];
}

/* Half of the threads take tasks from the front of the list, half from its end: experts with one row each (memory bound) and
 * the shared expert with all of them (compute bound) then run beside each other. Every call of run_task takes one. */
typedef struct {
    cv_cpu *c;
    cv_job *jobs;
    size_t n_jobs, n_tasks;
    atomic_size_t front, back;
} job_list;

/* The job that a task belongs to: the last one whose first_task <= task. */
static cv_job *job_of(const job_list *list, size_t task) {
    size_t lo = 0, hi = list->n_jobs;
    while (hi - lo > 1) {
        const size_t mid = (lo + hi) / 2;
        if (list->jobs[mid].first_task <= task) lo = mid;
        else hi = mid;
    }
    return &list->jobs[lo];
}

/* First weight row of a job's task. */
static size_t first_row(const cv_job *j, size_t task) { return (task - j->first_task) / j->token_tasks * j->row_block; }

/* What the thread will probably read after `task`: its neighbour's weights in the thread's direction. */
static cv_weight_rows rows_after(const job_list *list, size_t task, bool backwards) {
    if (backwards ? task == 0 : task + 1 == list->n_tasks) return (cv_weight_rows){0};
    task = backwards ? task - 1 : task + 1;
    const cv_job *j = job_of(list, task);
    return cv_weight_rows_at(j->w[0], j->expert, first_row(j, task));
}

static void run_task(void *context, size_t call, size_t thread) {
    (void)call;
    job_list *list = context;
    const bool backwards = thread % 2;
    const size_t task = backwards ? list->n_tasks - 1 - atomic_fetch_add(&list->back, 1) : atomic_fetch_add(&list->front, 1);
    cv_cpu *c = list->c;
    cv_cpu_scratch *s = &c->scratch[thread];
    const cv_job *j = job_of(list, task);
    const cv_weight_rows after = rows_after(list, task, backwards);
    size_t r0 = first_row(j, task), r1 = least(r0 + j->row_block, j->w[0]->rows);
    size_t t0 = (task - j->first_task) % j->token_tasks * j->token_block, n = least(j->token_block, j->n - t0), rows = r1 - r0;
    if (j->act) {
        multiply(c, j, 0, r0, r1, t0, n, cv_weight_rows_at(j->w[1], j->expert, r0), s->tile[0], j->row_block, s->kernel);
        multiply(c, j, 1, r0, r1, t0, n, after, s->tile[1], j->row_block, s->kernel);
        for (size_t t = 0; t < n; t++) {
            float *x = s->tile[0] + t * j->row_block;
            c->k->swiglu(x, s->tile[1] + t * j->row_block, x, rows);
            cv_act_store(c, j->act, j->act_first + t0 + t, r0, r1, x, j->act_needs);
        }
    } else if (j->add) {
        multiply(c, j, 0, r0, r1, t0, n, after, s->tile[0], j->row_block, s->kernel);
        for (size_t t = 0; t < n; t++) c->k->add(j->out + (t0 + t) * j->ldo + r0, s->tile[0] + t * j->row_block, rows);
    } else {
        multiply(c, j, 0, r0, r1, t0, n, after, j->out + t0 * j->ldo + r0, j->ldo, s->kernel);
    }
}

/* Tells the threads what the product after this one will read, as the last step like this one has shown; notes what this one
 * reads. Only where weights are streamed, and only matrices that every step reads: which expert comes is not known. */
static void read_ahead(cv_cpu *c, const cv_job *jobs, size_t n_jobs) {
    enum { AHEAD_BYTES = 64 * 1024 };
    const size_t run = c->run++;
    if (run >= CV_AHEAD_RUNS || c->batch->n_tokens > STREAM_TOKENS) {
        cv_threads_read_ahead(c->threads, NULL, 0);
        return;
    }
    cv_ahead *a = &c->ahead[run];
    a->n = 0;
    for (size_t i = 0; i < n_jobs; i++)
        for (int m = 0; m < 2; m++) {
            const cv_weight *w = jobs[i].w[m];
            if (w && w->experts == 1 && a->n < CV_THREADS_AHEAD) a->weights[a->n++] = (cv_threads_range){w->data, least(w->rows * w->row_bytes, AHEAD_BYTES)};
        }
    const cv_ahead *next = &c->ahead[run + 1 < CV_AHEAD_RUNS ? run + 1 : 0];
    cv_threads_read_ahead(c->threads, next->weights, next->n);
}

void cv_run_jobs(cv_cpu *c, cv_job *jobs, size_t n_jobs) {
    size_t tasks = 0;
    for (size_t i = 0; i < n_jobs; i++) {
        cut(&jobs[i], cv_threads_count(c->threads));
        jobs[i].first_task = tasks;
        tasks += jobs[i].row_tasks * jobs[i].token_tasks;
    }
    read_ahead(c, jobs, n_jobs);
    job_list list = {.c = c, .jobs = jobs, .n_jobs = n_jobs, .n_tasks = tasks};
    cv_threads_run(c->threads, tasks, run_task, &list);
}
