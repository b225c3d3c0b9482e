/* shapes_test.c — decoding with the matrices of real models at full size, head and embedding included, whole and as a tensor-parallel
 * rank's slice: results against the reference, and whether a dispatch has enough threadgroups to fill a large GPU. Weights are 4 bits in
 * groups of 64 (32 where a slice is narrow). A stack of experts is one tall matrix, in which each expert begins some rows after the one
 * before it: all are different, and together they are little larger than one. Slices of 4 and 8 have several rows a step. */
#include <dlfcn.h>

#include "ops.h"

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

static void attention_parts(bench *b, const model *m, size_t ways) {
    size_t q = m->heads * m->head_dim / ways, kv = (m->kv_heads >= ways ? m->kv_heads / ways : 1) * m->head_dim;
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
    if (op_finish(&b->w, code))
        for (int i = 0; i < 3; i++) op_compare(&b->w, "qkv", b->w.type, out[1][i], out[0][i], b->n * (i ? kv : q), op_bound(b->w.type));
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
    if (op_finish(&b->w, code)) op_compare(&b->w, "logits", CV_F32, logits[1], logits[0], b->n * rows, op_bound(b->w.type));
    end_count(b, "head", before, rows, 1);
}

static void run(op_context *c, const model *m, size_t ways, size_t n, uint32_t type) {
    bench b = {.n = n};
    size_t most = m->ff > m->shared_ff ? m->ff : m->shared_ff, widest = most > m->hidden ? most : m->hidden;
    cv_shape s = {.hidden = m->hidden, .head_dim = m->head_dim, .vocab = 16, .n_experts = m->experts, .experts_per_token = m->experts ? 1 : 0, .page_tokens = 64, .max_tokens = 16, .max_logits = 16,
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
            size_t q = m->heads * m->head_dim / ways;
            if (m->heads % ways || (m->ff / ways) % 32 || q % 32) continue;
            snprintf(name, sizeof name, "%s, %s, a slice of %zu, rows: %zu", m->name, op_type(types[(i + k) % 3]), ways, rows[k]);
            cv_case(&c.checks, name);
            run(&c, m, ways, rows[k], types[(i + k) % 3]);
            cv_end_case(&c.checks);
        }
    return cv_report(&c.checks);
}
