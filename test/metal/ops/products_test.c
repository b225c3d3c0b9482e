/* products_test.c — embedding, products, MLP, experts and logits of the Metal backend against double precision, over formats, types
 * and numbers of tokens. Arguments: how many rounds (each draws shapes anew); `short`: nothing but
 * those, and nothing after a case that fails. */
#include "reference.h"

enum { MOST = 96 }; /* tokens of most cases; a prompt's longest piece has OP_MOST_TOKENS */

static const size_t token_counts[] = {1, 2, 3, 5, 8, 9, 16, 17, 40, 70};
enum { COUNTS = sizeof token_counts / sizeof token_counts[0] };

typedef struct {
    op_world w;
    float *h_cpu, *h_gpu, *h;   /* [MOST, hidden]; h: before the operation */
    float *a_cpu;           /* [MOST, widest] */
    void *a_gpu;
    float *norm;
    size_t n;
} bench;

static float *vector_of(op_context *c, size_t n) {
    float *x = op_need(calloc((n + 16) * sizeof *x, 1));
    for (size_t i = 0; i < n; i++) x[i] = op_number(c);
    return x;
}

static void fill_h(bench *b) {
    op_fill(b->w.c, CV_F32, b->h_cpu, b->n * b->w.shape.hidden);
    memcpy(b->h_gpu, b->h_cpu, b->n * b->w.shape.hidden * sizeof(float));
    memcpy(b->h, b->h_cpu, b->n * b->w.shape.hidden * sizeof(float));
}

/* n numbers that a reference adds to: what h was, or zeros. To be freed. */
static double *start_of(const bench *b, bool accumulate, size_t n) {
    double *out = ref_room(n);
    for (size_t i = 0; i < n && accumulate; i++) out[i] = b->h[i];
    return out;
}

static void open_bench(bench *b, op_context *c, uint32_t type, size_t hidden, size_t n_experts, size_t chosen, size_t ff, size_t n) {
    size_t room = n > MOST ? n : MOST;
    cv_shape s = {.hidden = hidden, .head_dim = 32, .vocab = 300, .n_experts = n_experts, .experts_per_token = chosen, .page_tokens = 16, .chunk = 0, .max_tokens = room, .max_logits = room, .max_heads = 32,
                  .max_kv_heads = 4, .max_ff = ff, .kv_type = type, .norm_eps = 1e-5f, .qk_norm_eps = 1e-6f, .exact = type == CV_F32};
    memset(b, 0, sizeof *b);
    op_open(&b->w, c, &s, NULL, 0);
    if (!b->w.gpu) return;
    size_t widest = hidden > ff ? hidden : ff;
    if (widest < 300) widest = 300;
    b->h_cpu = op_alloc(b->w.cpu, room * hidden * sizeof(float));
    b->h_gpu = op_alloc(b->w.gpu, room * hidden * sizeof(float));
    b->h = op_alloc(b->w.cpu, room * hidden * sizeof(float));
    b->a_cpu = op_alloc(b->w.cpu, room * widest * sizeof(float));
    b->a_gpu = op_alloc(b->w.gpu, room * widest * sizeof(float));
    b->norm = vector_of(c, hidden);
    b->n = n;
    op_plain_batch(&b->w, n);
    fill_h(b);
}

static void test_embed(op_context *c, uint32_t type, const op_format *f, size_t n) {
    bench b;
    open_bench(&b, c, type, 256, 0, 0, 256, n);
    cv_weight *table = op_weight(c, f, 1, 300, 256);
    if (b.w.gpu && op_begin(&b.w)) {
        int code = b.w.cpu->ops->embed(b.w.cpu, table, b.h_cpu) | b.w.gpu->ops->embed(b.w.gpu, table, b.h_gpu);
        if (op_finish(&b.w, code)) {
            double *exact = ref_room(n * 256);
            for (size_t i = 0; i < n * 256; i++) exact[i] = ref_weight(table, 0, b.w.tokens[i / 256], i % 256);
            ref_take(&b.w, "embedding", b.h_cpu, exact, n * 256);
            free(exact);
            op_compare(&b.w, "embedding", CV_F32, b.h_gpu, b.h_cpu, n * 256, 1e-6);
        }
    }
    op_close(&b.w);
}

static void test_qkv(op_context *c, uint32_t type, const op_format *f[3], size_t n, size_t hidden, bool bias) {
    bench b;
    open_bench(&b, c, type, hidden, 0, 0, 256, n);
    const size_t rows[3] = {256, 128, 128};
    const cv_weight *w[3];
    const float *biases[3];
    for (int i = 0; i < 3; i++) {
        w[i] = op_weight(c, f[i], 1, rows[i], hidden);
        biases[i] = bias ? vector_of(c, rows[i]) : NULL;
    }
    if (b.w.gpu && op_begin(&b.w)) {
        float *cpu[3];
        void *gpu[3];
        for (int i = 0; i < 3; i++) {
            cpu[i] = op_alloc(b.w.cpu, n * rows[i] * sizeof(float));
            gpu[i] = op_alloc(b.w.gpu, n * rows[i] * sizeof(float));
        }
        int code = b.w.cpu->ops->norm_qkv(b.w.cpu, b.h_cpu, b.norm, w, biases, cpu[0], cpu[1], cpu[2]) | b.w.gpu->ops->norm_qkv(b.w.gpu, b.h_gpu, b.norm, w, biases, gpu[0], gpu[1], gpu[2]);
        if (op_finish(&b.w, code)) {
            double *m = ref_norm(&b.w, b.h, b.norm, n, NULL);
            for (int i = 0; i < 3; i++) {
                const char *what = i == 0 ? "q" : i == 1 ? "k" : "v";
                double *exact = ref_room(n * rows[i]);
                ref_product(w[i], 0, m, n, biases[i], false, exact);
                ref_take(&b.w, what, cpu[i], exact, n * rows[i]);
                op_compare(&b.w, what, type, gpu[i], cpu[i], n * rows[i], op_bound(type));
                free(exact);
            }
            free(m);
        }
    }
    op_close(&b.w);
}

static void test_linear(op_context *c, uint32_t type, const op_format *f, size_t n, size_t rows, size_t cols, bool accumulate) {
    bench b;
    open_bench(&b, c, type, rows, 0, 0, cols, n);
    cv_weight *w = op_weight(c, f, 1, rows, cols);
    float *bias = op_below(c, 2) ? vector_of(c, rows) : NULL;
    if (b.w.gpu && op_begin(&b.w)) {
        float *x = op_alloc(b.w.cpu, n * cols * sizeof(float));
        op_fill(c, type, x, n * cols);
        op_encode(type, x, b.a_gpu, n * cols);
        int code = b.w.cpu->ops->linear(b.w.cpu, x, w, bias, accumulate, b.h_cpu) | b.w.gpu->ops->linear(b.w.gpu, b.a_gpu, w, bias, accumulate, b.h_gpu);
        if (op_finish(&b.w, code)) {
            double *exact = start_of(&b, accumulate, n * rows), *in = ref_room(n * cols);
            for (size_t i = 0; i < n * cols; i++) in[i] = x[i];
            ref_product(w, 0, in, n, bias, true, exact);
            ref_take(&b.w, "W·x", b.h_cpu, exact, n * rows);
            free(exact);
            free(in);
            op_compare(&b.w, accumulate ? "h += W·x" : "h = W·x", CV_F32, b.h_gpu, b.h_cpu, n * rows, op_bound(type));
        }
    }
    op_close(&b.w);
}

static void test_mlp(op_context *c, uint32_t type, const op_format *gate, const op_format *up, const op_format *down, size_t n, bool bias) {
    bench b;
    size_t hidden = 256, ff = 128 + 128 * op_below(c, 3);
    open_bench(&b, c, type, hidden, 0, 0, ff, n);
    cv_weight *wg = op_weight(c, gate, 1, ff, hidden), *wu = op_weight(c, up, 1, ff, hidden), *wd = op_weight(c, down, 1, hidden, ff);
    const float *bg = bias ? vector_of(c, ff) : NULL, *bu = bias ? vector_of(c, ff) : NULL;
    if (b.w.gpu && op_begin(&b.w)) {
        void *cpu = NULL, *gpu = NULL;
        int code = b.w.cpu->ops->norm_mlp(b.w.cpu, b.h_cpu, b.norm, wg, wu, wd, bg, bu, &cpu) | b.w.gpu->ops->norm_mlp(b.w.gpu, b.h_gpu, b.norm, wg, wu, wd, bg, bu, &gpu);
        if (!code) code = b.w.cpu->ops->linear(b.w.cpu, cpu, wd, NULL, false, b.h_cpu) | b.w.gpu->ops->linear(b.w.gpu, gpu, wd, NULL, false, b.h_gpu);
        if (op_finish(&b.w, code)) {
            double *m = ref_norm(&b.w, b.h, b.norm, n, NULL), *exact = ref_room(n * hidden);
            ref_swiglu(wg, wu, wd, 0, m, n, bg, bu, exact);
            ref_take(&b.w, "MLP", b.h_cpu, exact, n * hidden);
            free(m);
            free(exact);
            op_compare(&b.w, "MLP", CV_F32, b.h_gpu, b.h_cpu, n * hidden, 2 * op_bound(type));
        }
    }
    op_close(&b.w);
}

enum { EXPERTS = 1, SHARED = 2, BOTH = 3 }; /* what a rank has a part of */

static void test_experts(op_context *c, uint32_t type, const op_format *experts, const op_format *shared, size_t n, size_t n_experts, size_t chosen, bool accumulate, int parts) {
    bench b;
    size_t hidden = 128, ff = 128, shared_ff = 128 * (1 + op_below(c, 2));
    static const op_format router_format = {CV_FORMAT_F32, 0, 0, 0, false};
    open_bench(&b, c, type, hidden, n_experts, chosen, shared_ff, n);
    cv_weight *router = op_weight(c, &router_format, 1, n_experts, hidden);
    cv_moe_weights w = {op_weight(c, experts, n_experts, ff, hidden), op_weight(c, experts, n_experts, ff, hidden), op_weight(c, experts, n_experts, hidden, ff),
                        op_weight(c, shared, 1, shared_ff, hidden), op_weight(c, shared, 1, shared_ff, hidden), op_weight(c, shared, 1, hidden, shared_ff)};
    if (!(parts & EXPERTS)) w.gate = w.up = w.down = NULL;
    if (!(parts & SHARED)) w.shared_gate = w.shared_up = w.shared_down = NULL;
    if (b.w.gpu && op_begin(&b.w)) {
        const cv_backend_ops *x = b.w.cpu->ops, *y = b.w.gpu->ops;
        int code = x->norm_route(b.w.cpu, b.h_cpu, b.norm, router) | y->norm_route(b.w.gpu, b.h_gpu, b.norm, router);
        if (!code) code = x->moe_up(b.w.cpu, b.h_cpu, b.norm, &w) | y->moe_up(b.w.gpu, b.h_gpu, b.norm, &w);
        if (!code) code = x->moe_down(b.w.cpu, &w, accumulate, b.h_cpu) | y->moe_down(b.w.gpu, &w, accumulate, b.h_gpu);
        if (op_finish(&b.w, code)) {
            double *exact = start_of(&b, accumulate, n * hidden);
            ref_experts(&b.w, b.h, b.norm, router, &w, n, exact);
            ref_take(&b.w, "experts", b.h_cpu, exact, n * hidden);
            free(exact);
            op_compare(&b.w, "experts", CV_F32, b.h_gpu, b.h_cpu, n * hidden, 2 * op_bound(type));
        }
    }
    op_close(&b.w);
}

static void test_head(op_context *c, uint32_t type, const op_format *f, size_t n, size_t n_rows) {
    bench b;
    open_bench(&b, c, type, 256, 0, 0, 256, n);
    cv_weight *head = op_weight(c, f, 1, 300, 256);
    uint32_t rows[MOST]; /* n_rows */
    for (size_t i = 0; i < n_rows; i++) rows[i] = (uint32_t)op_below(c, n);
    if (b.w.gpu && op_begin(&b.w)) {
        int code = b.w.cpu->ops->head(b.w.cpu, b.h_cpu, rows, n_rows, b.norm, head, b.a_cpu) | b.w.gpu->ops->head(b.w.gpu, b.h_gpu, rows, n_rows, b.norm, head, b.a_gpu);
        if (op_finish(&b.w, code)) {
            double *m = ref_norm(&b.w, b.h, b.norm, n_rows, rows), *exact = ref_room(n_rows * 300);
            ref_product(head, 0, m, n_rows, NULL, false, exact);
            ref_take(&b.w, "logits", b.a_cpu, exact, n_rows * 300);
            free(m);
            free(exact);
            op_compare(&b.w, "logits", CV_F32, b.a_gpu, b.a_cpu, n_rows * 300, op_bound(type));
        }
    }
    op_close(&b.w);
}

/* Rows of a batch have the bits that they have alone: a product over given rows (mlp false), or norm, gate, up and SwiGLU. */
static void test_rows_alone(op_context *c, uint32_t type, const op_format *f, size_t n, bool mlp) {
    enum { ROWS = 100, COLS = 256, MOST_ROWS = 16 };
    bench b;
    open_bench(&b, c, type, mlp ? COLS : ROWS, 0, 0, COLS, n);
    cv_weight *w = op_weight(c, f, 1, ROWS, COLS), *up = op_weight(c, f, 1, ROWS, COLS), *down = op_weight(c, f, 1, COLS, ROWS / 32 * 32);
    if (!b.w.gpu) return;
    char err[256] = "", all[MOST_ROWS * ROWS * sizeof(float)];
    float *x = op_need(calloc(n * COLS, sizeof *x));
    void *out = b.h_gpu;
    op_fill(c, type, x, n * COLS);
    const cv_backend_ops *o = b.w.gpu->ops;
    size_t row = ROWS * (mlp ? cv_kv_element_bytes(type) : sizeof(float));
    int code = CV_OK;
    for (size_t t = 0; t <= n && !code; t++) { /* all at first, then each alone */
        size_t from = t ? t - 1 : 0, count = t ? 1 : n;
        if (t == 1) op_plain_batch(&b.w, 1);
        if (mlp) memcpy(b.h_gpu, x + from * COLS, count * COLS * sizeof(float));
        else op_encode(type, x + from * COLS, b.a_gpu, count * COLS);
        code = o->begin(b.w.gpu, &b.w.batch) || (mlp ? o->norm_mlp(b.w.gpu, b.h_gpu, b.norm, w, up, down, NULL, NULL, &out) : o->linear(b.w.gpu, b.a_gpu, w, NULL, false, b.h_gpu)) || o->finish(b.w.gpu, err, sizeof err);
        if (!t) memcpy(all, out, n * row);
        else cv_check(&c->checks, !memcmp(all + from * row, out, row), "row %zu of %zu differs", from, n);
    }
    cv_check(&c->checks, !code, "%s", err);
    op_close(&b.w);
}

/* So do the experts of a batch in which several tokens share them. */
static void test_experts_alone(op_context *c, uint32_t type, const op_format *f, size_t n, size_t chosen) {
    enum { HIDDEN_SIZE = 128, N_EXPERTS = 5 };
    static const op_format router_format = {CV_FORMAT_F32, 0, 0, 0, false};
    bench b;
    open_bench(&b, c, type, HIDDEN_SIZE, N_EXPERTS, chosen, 128, n);
    cv_weight *router = op_weight(c, &router_format, 1, N_EXPERTS, HIDDEN_SIZE);
    cv_moe_weights w = {op_weight(c, f, N_EXPERTS, 128, HIDDEN_SIZE), op_weight(c, f, N_EXPERTS, 128, HIDDEN_SIZE), op_weight(c, f, N_EXPERTS, HIDDEN_SIZE, 128),
                        op_weight(c, f, 1, 128, HIDDEN_SIZE), op_weight(c, f, 1, 128, HIDDEN_SIZE), op_weight(c, f, 1, HIDDEN_SIZE, 128)};
    if (!b.w.gpu) return;
    char err[256] = "";
    float all[16 * HIDDEN_SIZE], start[16 * HIDDEN_SIZE];
    memcpy(start, b.h_gpu, n * HIDDEN_SIZE * sizeof(float));
    const cv_backend_ops *o = b.w.gpu->ops;
    int code = o->begin(b.w.gpu, &b.w.batch) || o->norm_route(b.w.gpu, b.h_gpu, b.norm, router) || o->moe_up(b.w.gpu, b.h_gpu, b.norm, &w) || o->moe_down(b.w.gpu, &w, true, b.h_gpu) || o->finish(b.w.gpu, err, sizeof err);
    memcpy(all, b.h_gpu, n * HIDDEN_SIZE * sizeof(float));
    op_plain_batch(&b.w, 1);
    for (size_t t = 0; t < n && !code; t++) {
        memcpy(b.h_gpu, start + t * HIDDEN_SIZE, HIDDEN_SIZE * sizeof(float));
        code = o->begin(b.w.gpu, &b.w.batch) || o->norm_route(b.w.gpu, b.h_gpu, b.norm, router) || o->moe_up(b.w.gpu, b.h_gpu, b.norm, &w) || o->moe_down(b.w.gpu, &w, true, b.h_gpu) || o->finish(b.w.gpu, err, sizeof err);
        cv_check(&c->checks, !memcmp(all + t * HIDDEN_SIZE, b.h_gpu, HIDDEN_SIZE * sizeof(float)), "token %zu of %zu differs", t, n);
    }
    cv_check(&c->checks, !code, "%s", err);
    op_close(&b.w);
}

int main(int argc, char **argv) {
    int rounds = argc > 1 ? atoi(argv[1]) : 1;
    op_context c = {.random = 88172645463325252ull};
    char name[128];
    static const uint32_t types[] = {CV_F32, CV_F16, CV_BF16};
    for (int round = 0; round < rounds; round++)
        for (size_t i = 0; i < OP_FORMATS && !(argc > 2 && c.checks.failed); i++) {
            const op_format *f = &op_formats[i], *g = &op_formats[op_below(&c, OP_FORMATS)];
            uint32_t type = types[(i + (size_t)round) % 3];
            size_t n = token_counts[(i + (size_t)round) % COUNTS], m = token_counts[op_below(&c, COUNTS)];
            snprintf(name, sizeof name, "format %u, %u bits, groups of %u, scales %u%s; %s, %zu and %zu tokens", f->format, f->bits, f->group, f->scale_type, f->global ? ", global scale" : "", op_type(type), n, m);
            cv_case(&c.checks, name);
            test_embed(&c, type, f, n);
            test_qkv(&c, type, (const op_format *[]){f, f, f}, n, 640, false);
            test_qkv(&c, type, (const op_format *[]){f, g, &op_formats[5]}, m, 256, true);
            test_linear(&c, type, f, n, 100 + op_below(&c, 100), 128 * (1 + op_below(&c, 6)), true);
            test_linear(&c, type, f, m, 64, 256, false);
            test_mlp(&c, type, f, f, f, n, false);
            test_mlp(&c, type, f, g, &op_formats[5], m, true);
            test_experts(&c, type, f, f, n, 16, 1, true, BOTH);
            test_experts(&c, type, f, g, m, 40, 3, false, BOTH);
            test_head(&c, type, f, m, n);
            cv_end_case(&c.checks);
        }
    for (int parts = EXPERTS; parts <= SHARED && !(argc > 2 && c.checks.failed); parts++) {
        cv_case(&c.checks, parts == EXPERTS ? "a rank with a part of the experts and none of the shared expert" : "a rank with a part of the shared expert and none of the experts");
        for (size_t i = 0; i < COUNTS; i++) test_experts(&c, types[i % 3], &op_formats[5 + i % 9], &op_formats[5 + i % 9], token_counts[i], i % 2 ? 16 : 5, 1 + i % 3, i % 4 < 2, parts);
        cv_end_case(&c.checks);
    }
    for (size_t i = 0; i < 3 && argc < 3; i++) {
        const op_format *f = &op_formats[5 + i];
        snprintf(name, sizeof name, "a prompt's piece of %d tokens, %s, %u bits in groups of %u, 16 and 128 experts", OP_MOST_TOKENS, op_type(types[i]), f->bits, f->group);
        cv_case(&c.checks, name);
        test_qkv(&c, types[i], (const op_format *[]){f, f, f}, OP_MOST_TOKENS, 128, false);
        test_linear(&c, types[i], f, OP_MOST_TOKENS - 5, 100, 128, true);
        test_mlp(&c, types[i], f, f, f, OP_MOST_TOKENS, false);
        test_experts(&c, types[i], f, f, OP_MOST_TOKENS, i == 1 ? 128 : 16, 1, true, BOTH);
        test_head(&c, types[i], f, OP_MOST_TOKENS, 16);
        cv_end_case(&c.checks);
    }
    if (argc < 3 && !getenv("FAKEMETAL_FAST_MATH")) { /* which the backend turns off for this very reason */
        cv_case(&c.checks, "a row has the same bits in a batch as alone");
        for (size_t i = 0; i < 6; i++) test_rows_alone(&c, types[i % 3], &op_formats[5 + i], (const size_t[]){7, 16, 11}[i % 3], i < 3);
        for (size_t i = 0; i < 3; i++) test_experts_alone(&c, types[i], &op_formats[5 + i], i == 0 ? 16 : 5 * i, 1 + i);
        cv_end_case(&c.checks);
    }
    return cv_report(&c.checks);
}
