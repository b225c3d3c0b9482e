/* shapes_test.c — decoding with the matrices of real models at full size, head and embedding included, whole and as a tensor-parallel
 * rank's slice: results against the CPU's exact mode, of which rows are drawn and computed in double precision, and whether a dispatch has
 * enough threadgroups to fill a large GPU. Weights are 4 bits in groups of 64 (32 where a slice is narrow). A stack of experts is one tall
 * matrix, in which each expert begins some rows after the one before it: all are different, and together they are little larger than one.
 * Slices of 4 and 8 have several rows a step. A prompt's kernels run with the models' widths and few of their rows. */
#include <dlfcn.h>

#include "reference.h"

/* A dispatch of fewer threadgroups leaves cores of an 80-core GPU idle: two for each core. */
enum { ENOUGH = 160 };

typedef struct {
    const char *name;
    size_t hidden, heads, kv_heads, head_dim, vocab, ff, experts, expert_ff, shared_ff; /* experts: 0 = none */
} model;

static const model models[] = {
    {"SmolLM2 135M", 576, 9, 3, 64, 49152, 1536, 0, 0, 0},
    {"Llama 3 8B", 4096, 32, 8, 128, 128256, 14336, 0, 0, 0},
    {"Llama 3 70B", 8192, 64, 8, 128, 128256, 28672, 0, 0, 0},
    {"Llama 4 Scout", 5120, 40, 8, 128, 202048, 0, 16, 8192, 8192},
    {"Llama 4 Maverick", 5120, 40, 8, 128, 202048, 16384, 128, 8192, 8192},
};

static uint64_t (*count)(const char *);

typedef struct {
    op_world w;
    size_t n;                  /* rows of a step */
    float *h[2], *a[2], *norm; /* reference's, Metal's */
    size_t few;                /* operations with fewer than ENOUGH threadgroups a dispatch */
    cv_weight *weights[16];    /* to be unmapped when the backend has closed: it remembers memory by address */
    size_t n_weights;
} bench;

/* Some rows of W·x in double precision, x [n, cols], against `cpu` [n, rows]. */
static void check_some_rows(bench *b, const char *what, const cv_weight *w, const double *x, const float *cpu) {
    enum { SOME = 16 };
    double squares = 0, worst = 0;
    for (size_t i = 0; i < b->n * w->rows; i++) squares += (double)cpu[i] * cpu[i];
    double rms = sqrt(squares / (double)(b->n * w->rows)) + 1e-30;
    for (size_t k = 0; k < SOME; k++) {
        size_t r = k ? op_below(b->w.c, w->rows) : w->rows - 1, t = op_below(b->w.c, b->n);
        double sum = 0;
        for (size_t c = 0; c < w->cols; c++) sum += ref_weight(w, 0, r, c) * x[t * w->cols + c];
        worst = fmax(worst, fabs(sum - cpu[t * w->rows + r]) / rms);
    }
    cv_check(&b->w.c->checks, worst <= REFERENCE_BOUND, "%s on the CPU: %.3g of the rms %g away from double precision", what, worst, rms);
}

static void begin_count(uint64_t *before) { *before = count("threadgroups"); }

/* Says which operation has too few; small matrices have no more rows to share out. */
static void end_count(bench *b, const char *what, uint64_t before, size_t rows, size_t dispatches) {
    uint64_t groups = (count("threadgroups") - before) / dispatches;
    if (groups >= ENOUGH) return;
    b->few++;
    printf("#   %s: %llu threadgroups (%zu rows)\n", what, (unsigned long long)groups, rows);
}

static const op_format *format_of(size_t cols) {
    static const op_format wide = {CV_FORMAT_AFFINE, 4, 64, CV_BF16, false}, narrow = {CV_FORMAT_AFFINE, 4, 32, CV_BF16, false};
    return cols % 64 ? &narrow : &wide;
}

static cv_weight *matrix(bench *b, size_t experts, size_t rows, size_t cols) {
    cv_weight *w = op_weight(b->w.c, format_of(cols), experts, rows, cols);
    b->weights[b->n_weights++] = w;
    return w;
}

/* Expert e has rows from 16*e on of one matrix. */
static cv_weight *stack(bench *b, size_t experts, size_t rows, size_t cols) {
    enum { STEP = 16 };
    cv_weight *w = matrix(b, 1, rows + (experts - 1) * STEP, cols);
    w->experts = experts;
    w->rows = rows;
    w->expert_bytes = STEP * w->row_bytes;
    w->expert_scale_bytes = STEP * w->scale_row_bytes;
    return w;
}

static void drop(cv_weight *w) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), bytes = (w->experts - 1) * w->expert_bytes + w->rows * w->row_bytes;
    uintptr_t at = (uintptr_t)w->data / page * page;
    munmap((void *)at, (bytes + page - 1) / page * page); /* the large part; the rest goes with the process */
    free(w);
}

/* Of the largest slice: key heads are not cut, and queries stay with theirs. */
static size_t kv_heads_of(const model *m, size_t ways) { return (m->kv_heads + ways - 1) / ways; }
static size_t heads_of(const model *m, size_t ways) { return m->heads / m->kv_heads * kv_heads_of(m, ways); }

static void attention_parts(bench *b, const model *m, size_t ways) {
    size_t q = heads_of(m, ways) * m->head_dim, kv = kv_heads_of(m, ways) * m->head_dim;
    cv_weight *w[3] = {matrix(b, 1, q, m->hidden), matrix(b, 1, kv, m->hidden), matrix(b, 1, kv, m->hidden)}, *o = matrix(b, 1, m->hidden, q);
    const cv_weight *const all[3] = {w[0], w[1], w[2]};
    const float *const none[3] = {NULL, NULL, NULL};
    float *out[2][3];
    uint64_t before = 0;
    for (int i = 0; i < 3; i++) {
        out[0][i] = op_alloc(b->w.cpu, b->n * q * sizeof(float));
        out[1][i] = op_alloc(b->w.gpu, b->n * q * sizeof(float));
    }
    begin_count(&before);
    if (!op_begin(&b->w)) return;
    int code = b->w.cpu->ops->norm_qkv(b->w.cpu, b->h[0], b->norm, all, none, out[0][0], out[0][1], out[0][2]) | b->w.gpu->ops->norm_qkv(b->w.gpu, b->h[1], b->norm, all, none, out[1][0], out[1][1], out[1][2]);
    if (op_finish(&b->w, code)) {
        double *x = ref_norm(&b->w, b->h[0], b->norm, b->n, NULL);
        for (int i = 0; i < 3; i++) {
            check_some_rows(b, "qkv", w[i], x, out[0][i]);
            op_compare(&b->w, "qkv", b->w.type, out[1][i], out[0][i], b->n * (i ? kv : q), op_bound(b->w.type));
        }
        free(x);
    }
    end_count(b, "qkv", before, q + 2 * kv, 1);
    begin_count(&before);
    if (!op_begin(&b->w)) return;
    op_fill(b->w.c, b->w.type, b->a[0], b->n * q);
    op_encode(b->w.type, b->a[0], b->a[1], b->n * q);
    code = b->w.cpu->ops->linear(b->w.cpu, b->a[0], o, NULL, true, b->h[0]) | b->w.gpu->ops->linear(b->w.gpu, b->a[1], o, NULL, true, b->h[1]);
    if (op_finish(&b->w, code)) op_compare(&b->w, "o", CV_F32, b->h[1], b->h[0], b->n * m->hidden, op_bound(b->w.type));
    end_count(b, "o", before, m->hidden, 1);
}

static void feed_forward_parts(bench *b, const model *m, size_t ways) {
    size_t ff = m->ff / ways;
    uint64_t before = 0;
    cv_weight *gate = matrix(b, 1, ff, m->hidden), *up = matrix(b, 1, ff, m->hidden), *down = matrix(b, 1, m->hidden, ff);
    void *act[2];
    begin_count(&before);
    if (!op_begin(&b->w)) return;
    int code = b->w.cpu->ops->norm_mlp(b->w.cpu, b->h[0], b->norm, gate, up, down, NULL, NULL, &act[0]) | b->w.gpu->ops->norm_mlp(b->w.gpu, b->h[1], b->norm, gate, up, down, NULL, NULL, &act[1]);
    if (!code) code = b->w.cpu->ops->linear(b->w.cpu, act[0], down, NULL, false, b->h[0]) | b->w.gpu->ops->linear(b->w.gpu, act[1], down, NULL, false, b->h[1]);
    if (op_finish(&b->w, code)) op_compare(&b->w, "MLP", CV_F32, b->h[1], b->h[0], b->n * m->hidden, 2 * op_bound(b->w.type));
    end_count(b, "MLP", before, ff, 2);
}

static void expert_parts(bench *b, const model *m, size_t ways) {
    size_t ff = m->expert_ff / ways, shared = m->shared_ff / ways;
    static const op_format router_format = {CV_FORMAT_BF16, 0, 0, 0, false};
    uint64_t before = 0;
    cv_weight *router = op_weight(b->w.c, &router_format, 1, m->experts, m->hidden);
    cv_weight *all[6] = {stack(b, m->experts, ff, m->hidden), stack(b, m->experts, ff, m->hidden), stack(b, m->experts, m->hidden, ff), matrix(b, 1, shared, m->hidden), matrix(b, 1, shared, m->hidden), matrix(b, 1, m->hidden, shared)};
    const cv_moe_weights w = {all[0], all[1], all[2], all[3], all[4], all[5]};
    const cv_backend_ops *x = b->w.cpu->ops, *y = b->w.gpu->ops;
    if (!op_begin(&b->w)) return;
    int code = x->norm_route(b->w.cpu, b->h[0], b->norm, router) | y->norm_route(b->w.gpu, b->h[1], b->norm, router);
    if (!code) code = x->moe_up(b->w.cpu, b->h[0], b->norm, &w) | y->moe_up(b->w.gpu, b->h[1], b->norm, &w);
    begin_count(&before);
    if (!code) code = x->moe_down(b->w.cpu, &w, false, b->h[0]) | y->moe_down(b->w.gpu, &w, false, b->h[1]);
    if (op_finish(&b->w, code)) op_compare(&b->w, "experts", CV_F32, b->h[1], b->h[0], b->n * m->hidden, 2 * op_bound(b->w.type));
    end_count(b, "experts (router aside)", before + 1, ff, 2);
}

/* The head's rows of this slice, and the embedding of the tokens from the same table. */
static void head_parts(bench *b, const model *m, size_t ways) {
    size_t rows = m->vocab / ways;
    uint32_t wanted[16];
    uint64_t before = 0;
    cv_weight *head = matrix(b, 1, rows, m->hidden);
    float *logits[2] = {op_alloc(b->w.cpu, b->n * rows * sizeof(float)), op_alloc(b->w.gpu, b->n * rows * sizeof(float))};
    for (size_t i = 0; i < b->n; i++) wanted[i] = (uint32_t)(b->n - 1 - i);
    for (size_t i = 0; i < b->n; i++) b->w.tokens[i] = (uint32_t)op_below(b->w.c, rows);
    if (!op_begin(&b->w)) return;
    int code = b->w.cpu->ops->embed(b->w.cpu, head, b->h[0]) | b->w.gpu->ops->embed(b->w.gpu, head, b->h[1]);
    if (!op_finish(&b->w, code)) return;
    op_compare(&b->w, "embedding", CV_F32, b->h[1], b->h[0], b->n * m->hidden, 1e-6);
    memcpy(b->h[1], b->h[0], b->n * m->hidden * sizeof(float));
    begin_count(&before);
    if (!op_begin(&b->w)) return;
    code = b->w.cpu->ops->head(b->w.cpu, b->h[0], wanted, b->n, b->norm, head, logits[0]) | b->w.gpu->ops->head(b->w.gpu, b->h[1], wanted, b->n, b->norm, head, logits[1]);
    if (op_finish(&b->w, code)) {
        double *x = ref_norm(&b->w, b->h[0], b->norm, b->n, wanted);
        check_some_rows(b, "logits", head, x, logits[0]);
        free(x);
        op_compare(&b->w, "logits", CV_F32, logits[1], logits[0], b->n * rows, op_bound(b->w.type));
    }
    end_count(b, "head", before, rows, 1);
}

/* A prompt's piece: inputs as wide as the model's and the slice's, few rows of each matrix. */
static void prompt_parts(bench *b, const model *m, size_t ways) {
    enum { ROWS = 96, FF = 64 };
    size_t q = heads_of(m, ways) * m->head_dim;
    cv_weight *w[3] = {matrix(b, 1, ROWS, m->hidden), matrix(b, 1, ROWS / 2, m->hidden), matrix(b, 1, ROWS / 2, m->hidden)}, *o = matrix(b, 1, ROWS, q), *down = matrix(b, 1, m->hidden, FF);
    const cv_weight *const all[3] = {w[0], w[1], w[2]};
    const float *const none[3] = {NULL, NULL, NULL};
    const cv_backend_ops *x = b->w.cpu->ops, *y = b->w.gpu->ops;
    size_t hidden = b->n * m->hidden;
    if (!op_begin(&b->w)) return;
    float *out[2][3];
    for (int i = 0; i < 3; i++) {
        out[0][i] = op_alloc(b->w.cpu, b->n * ROWS * sizeof(float));
        out[1][i] = op_alloc(b->w.gpu, b->n * ROWS * sizeof(float));
    }
    int code = x->norm_qkv(b->w.cpu, b->h[0], b->norm, all, none, out[0][0], out[0][1], out[0][2]) | y->norm_qkv(b->w.gpu, b->h[1], b->norm, all, none, out[1][0], out[1][1], out[1][2]);
    if (op_finish(&b->w, code))
        for (int i = 0; i < 3; i++) op_compare(&b->w, "a prompt's qkv", b->w.type, out[1][i], out[0][i], b->n * w[i]->rows, op_bound(b->w.type));
    if (!b->w.c->checks.broken && op_begin(&b->w)) {
        op_fill(b->w.c, b->w.type, b->a[0], b->n * q);
        op_encode(b->w.type, b->a[0], b->a[1], b->n * q);
        code = x->linear(b->w.cpu, b->a[0], o, NULL, false, out[0][0]) | y->linear(b->w.gpu, b->a[1], o, NULL, false, out[1][0]);
        if (op_finish(&b->w, code)) op_compare(&b->w, "a prompt's o", CV_F32, out[1][0], out[0][0], b->n * ROWS, op_bound(b->w.type));
    }
    if (m->ff && !b->w.c->checks.broken && op_begin(&b->w)) {
        cv_weight *gate = matrix(b, 1, FF, m->hidden), *up = matrix(b, 1, FF, m->hidden);
        void *act[2];
        code = x->norm_mlp(b->w.cpu, b->h[0], b->norm, gate, up, down, NULL, NULL, &act[0]) | y->norm_mlp(b->w.gpu, b->h[1], b->norm, gate, up, down, NULL, NULL, &act[1]);
        if (!code) code = x->linear(b->w.cpu, act[0], down, NULL, false, b->h[0]) | y->linear(b->w.gpu, act[1], down, NULL, false, b->h[1]);
        if (op_finish(&b->w, code)) op_compare(&b->w, "a prompt's MLP", CV_F32, b->h[1], b->h[0], hidden, 2 * op_bound(b->w.type));
        memcpy(b->h[1], b->h[0], hidden * sizeof(float));
    }
    if (m->experts && !b->w.c->checks.broken && op_begin(&b->w)) {
        static const op_format router_format = {CV_FORMAT_BF16, 0, 0, 0, false};
        cv_weight *router = op_weight(b->w.c, &router_format, 1, m->experts, m->hidden);
        cv_weight *e[6] = {stack(b, m->experts, FF, m->hidden), stack(b, m->experts, FF, m->hidden), stack(b, m->experts, m->hidden, FF), matrix(b, 1, FF, m->hidden), matrix(b, 1, FF, m->hidden), down};
        const cv_moe_weights moe = {e[0], e[1], e[2], e[3], e[4], e[5]};
        code = x->norm_route(b->w.cpu, b->h[0], b->norm, router) | y->norm_route(b->w.gpu, b->h[1], b->norm, router);
        if (!code) code = x->moe_up(b->w.cpu, b->h[0], b->norm, &moe) | y->moe_up(b->w.gpu, b->h[1], b->norm, &moe);
        if (!code) code = x->moe_down(b->w.cpu, &moe, false, b->h[0]) | y->moe_down(b->w.gpu, &moe, false, b->h[1]);
        if (op_finish(&b->w, code)) op_compare(&b->w, "a prompt's experts", CV_F32, b->h[1], b->h[0], hidden, 2 * op_bound(b->w.type));
        memcpy(b->h[1], b->h[0], hidden * sizeof(float));
    }
}

enum { PROMPT_TOKENS = 35 };

static void run(op_context *c, const model *m, size_t ways, size_t n, uint32_t type) {
    bench b = {.n = n};
    bool prompt = n == PROMPT_TOKENS;
    size_t most = m->ff > m->shared_ff ? m->ff : m->shared_ff, widest = most > m->hidden ? most : m->hidden;
    cv_shape s = {.hidden = m->hidden, .head_dim = m->head_dim, .vocab = 16, .n_experts = m->experts, .experts_per_token = m->experts ? 1 : 0, .page_tokens = 64, .max_tokens = prompt ? n : 16, .max_logits = 16,
                  .max_heads = m->heads, .max_kv_heads = m->kv_heads, .max_ff = most, .kv_type = type, .norm_eps = 1e-5f, .qk_norm_eps = 1e-6f, .exact = type == CV_F32};
    op_open(&b.w, c, &s, NULL, 0);
    if (!b.w.gpu) return;
    for (int i = 0; i < 2; i++) {
        cv_backend *backend = i ? b.w.gpu : b.w.cpu;
        b.h[i] = op_alloc(backend, n * m->hidden * sizeof(float));
        b.a[i] = op_alloc(backend, n * widest * sizeof(float));
    }
    b.norm = op_need(calloc(m->hidden + 16, sizeof(float)));
    op_fill(c, CV_F32, b.norm, m->hidden);
    op_fill(c, CV_F32, b.h[0], n * m->hidden);
    memcpy(b.h[1], b.h[0], n * m->hidden * sizeof(float));
    op_plain_batch(&b.w, n);
    if (prompt) {
        prompt_parts(&b, m, ways);
        op_close(&b.w);
        for (size_t i = 0; i < b.n_weights; i++) drop(b.weights[i]);
        return;
    }
    attention_parts(&b, m, ways);
    memcpy(b.h[1], b.h[0], n * m->hidden * sizeof(float));
    if (m->ff && !c->checks.broken) feed_forward_parts(&b, m, ways);
    memcpy(b.h[1], b.h[0], n * m->hidden * sizeof(float));
    if (m->experts && !c->checks.broken) expert_parts(&b, m, ways);
    if (!c->checks.broken) head_parts(&b, m, ways);
    cv_check(&c->checks, !b.few || ways > 1 || m->hidden < 1000, "%zu operations have fewer than %d threadgroups", b.few, ENOUGH);
    op_close(&b.w);
    for (size_t i = 0; i < b.n_weights; i++) drop(b.weights[i]);
}

int main(void) {
    op_context c = {.random = 88172645463325252ull};
    void *fake = dlopen(getenv("CARAVAN_METAL_LIBRARY"), RTLD_NOW);
    *(void **)&count = fake ? dlsym(fake, "fakemetal_count") : NULL;
    if (!count) {
        fputs("CARAVAN_METAL_LIBRARY must name the fake runtime\n", stderr);
        return 2;
    }
    static const uint32_t types[] = {CV_BF16, CV_F32, CV_F16};
    static const size_t rows[] = {1, 1, 3, 16};
    char name[96];
    for (size_t i = 0; i < sizeof models / sizeof models[0]; i++)
        for (size_t ways = 1, k = 0; ways <= 8; ways *= 2, k++) {
            const model *m = &models[i];
            snprintf(name, sizeof name, "%s, %s, a slice of %zu, rows: %zu", m->name, op_type(types[(i + k) % 3]), ways, rows[k]);
            cv_case(&c.checks, name);
            run(&c, m, ways, rows[k], types[(i + k) % 3]);
            cv_end_case(&c.checks);
            if (ways != 1 && ways != 8) continue;
            snprintf(name, sizeof name, "%s, %s, a prompt's piece, a slice of %zu, few rows of each matrix", m->name, op_type(types[(i + k + 1) % 3]), ways);
            cv_case(&c.checks, name);
            run(&c, m, ways, PROMPT_TOKENS, types[(i + k + 1) % 3]);
            cv_end_case(&c.checks);
        }
    return cv_report(&c.checks);
}
