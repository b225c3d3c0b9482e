/* counts_test.c — what decoding reads from memory, counted by the executor (FAKEMETAL_CHECKED and FAKEMETAL_LINES): each weight once,
 * whatever the number of tokens up to sixteen, also those of an expert that several tokens choose; and lines of 128 bytes whole. */
#include <dlfcn.h>

#include "ops.h"

enum { HIDDEN = 512, ROWS = 48, SHARED = 64, WIDTH = 512, VOCAB = 16 };

/* Loaded over what must be, and lines touched over the least. */
#define MOST_BYTES 1.03
#define MOST_LINES 1.1

static uint64_t (*last)(const char *, unsigned);

static size_t scale_size(uint32_t type) { return type == CV_F32 ? 4 : type == CV_F16 || type == CV_BF16 ? 2 : 1; }

/* Bytes of codes, scales and biases of `experts` of its experts. */
static double weight_bytes(const cv_weight *w, const op_format *f, size_t experts) {
    double groups = f->group ? (double)(w->cols / f->group) : 0, parts = f->format == CV_FORMAT_AFFINE ? 2 : groups > 0 ? 1 : 0;
    double rows = (double)experts * (double)w->rows * ((double)op_row_bytes(f, w->cols) + parts * groups * (double)scale_size(f->scale_type));
    return rows + (f->global ? (double)experts * sizeof(float) : 0);
}

/* A matrix without gaps that begins with a line, as MLX's files have them. */
static cv_weight *packed(op_context *c, const op_format *f, size_t experts, size_t rows, size_t cols) {
    cv_weight *w;
    do w = op_weight(c, f, experts, rows, cols);
    while (w->row_bytes != op_row_bytes(f, cols));
    return w;
}

/* Of the dispatch that ran last: buffers first … first+n-1 are weights. */
static void check_weights(op_context *c, const char *what, unsigned first, unsigned n, double must) {
    double bytes = 0, lines = 0, least = 0;
    for (unsigned i = first; i < first + n; i++) {
        bytes += (double)last("distinct", i);
        lines += (double)last("lines", i);
        least += (double)last("least", i);
    }
    if (getenv("OPS_VERBOSE")) printf("#   %s: %.0f bytes, %.4f of what must be; lines %.3f of the least\n", what, bytes, bytes / must, lines / least);
    cv_check(&c->checks, bytes <= MOST_BYTES * must && bytes >= must, "%s: %.0f bytes of weights, %.0f must be read", what, bytes, must);
    cv_check(&c->checks, lines <= MOST_LINES * least, "%s: %.0f lines of weights, %.0f would do", what, lines, least);
}

/* Activations: each load's lines. */
static void check_lines(op_context *c, const char *what, unsigned buffer) {
    double lines = (double)last("lines", buffer), least = (double)last("least", buffer);
    cv_check(&c->checks, lines > 0 && lines <= MOST_LINES * least, "%s: %.0f lines, %.0f would do", what, lines, least);
}

typedef struct {
    op_world w;
    float *norm, *h;
    void *x;
} bench;

static bool open_bench(bench *b, op_context *c, uint32_t type, size_t n, size_t experts, size_t chosen) {
    cv_shape s = {.hidden = HIDDEN, .head_dim = 64, .vocab = VOCAB, .n_experts = experts, .experts_per_token = chosen, .page_tokens = 64, .max_tokens = n, .max_logits = n, .max_heads = HIDDEN / 64, .max_kv_heads = 4,
                  .max_ff = HIDDEN, .kv_type = type, .norm_eps = 1e-5f, .qk_norm_eps = 1e-6f, .exact = type == CV_F32};
    op_open(&b->w, c, &s, NULL, 0);
    if (!b->w.gpu) return false;
    b->norm = op_pages((HIDDEN + 16) * sizeof(float));
    op_fill(c, CV_F32, b->norm, HIDDEN);
    b->h = op_alloc(b->w.gpu, n * HIDDEN * sizeof(float));
    op_fill(c, CV_F32, b->h, HIDDEN);
    /* all tokens the same: they choose the same experts */
    for (size_t t = 1; t < n; t++) memcpy(b->h + t * HIDDEN, b->h, HIDDEN * sizeof(float));
    b->x = op_alloc(b->w.gpu, n * HIDDEN * sizeof(float));
    op_plain_batch(&b->w, n);
    return true;
}

static bool step(bench *b, int code) {
    char err[2048] = "";
    int finished = b->w.gpu->ops->finish(b->w.gpu, err, sizeof err);
    return cv_check(&b->w.c->checks, !code && !finished, "%d %d: %s", code, finished, err);
}

static void count_dense(op_context *c, uint32_t type, const op_format *f, size_t n) {
    bench b = {0};
    if (!open_bench(&b, c, type, n, 0, 0)) return;
    const cv_backend_ops *o = b.w.gpu->ops;
    cv_weight *w[3] = {packed(c, f, 1, ROWS, HIDDEN), packed(c, f, 1, ROWS / 2, HIDDEN), packed(c, f, 1, ROWS / 2, HIDDEN)};
    const cv_weight *const all[3] = {w[0], w[1], w[2]};
    const float *const none[3] = {NULL, NULL, NULL};
    o->begin(b.w.gpu, &b.w.batch);
    void *q = op_alloc(b.w.gpu, n * ROWS * 4), *k = op_alloc(b.w.gpu, n * ROWS * 4), *v = op_alloc(b.w.gpu, n * ROWS * 4);
    if (step(&b, o->norm_qkv(b.w.gpu, b.h, b.norm, all, none, q, k, v))) {
        check_weights(c, "q, k, v", 0, 9, weight_bytes(w[0], f, 1) + weight_bytes(w[1], f, 1) + weight_bytes(w[2], f, 1));
        check_lines(c, "their input", 9);
        check_lines(c, "its norm", 10);
    }
    void *act;
    o->begin(b.w.gpu, &b.w.batch);
    if (step(&b, o->norm_mlp(b.w.gpu, b.h, b.norm, w[1], w[2], w[0], NULL, NULL, &act))) check_weights(c, "gate, up", 0, 6, weight_bytes(w[1], f, 1) + weight_bytes(w[2], f, 1));
    o->begin(b.w.gpu, &b.w.batch);
    if (step(&b, o->linear(b.w.gpu, b.x, w[0], NULL, false, q))) {
        check_weights(c, "o", 0, 3, weight_bytes(w[0], f, 1));
        check_lines(c, "its input", 9);
    }
    op_close(&b.w);
}

static void count_experts(op_context *c, uint32_t type, const op_format *f, size_t n, size_t chosen) {
    enum { EXPERTS = 8 };
    static const op_format router_format = {CV_FORMAT_F32, 0, 0, 0, false};
    bench b = {0};
    if (!open_bench(&b, c, type, n, EXPERTS, chosen)) return;
    const cv_backend_ops *o = b.w.gpu->ops;
    cv_weight *router = packed(c, &router_format, 1, EXPERTS, HIDDEN);
    cv_moe_weights w = {packed(c, f, EXPERTS, ROWS, HIDDEN), packed(c, f, EXPERTS, ROWS, HIDDEN), packed(c, f, EXPERTS, HIDDEN, WIDTH),
                        packed(c, f, 1, SHARED, HIDDEN), packed(c, f, 1, SHARED, HIDDEN), packed(c, f, 1, HIDDEN, WIDTH)};
    /* The widths of up and down need not agree for the counting of one of them. */
    o->begin(b.w.gpu, &b.w.batch);
    if (step(&b, o->norm_route(b.w.gpu, b.h, b.norm, router) | o->moe_up(b.w.gpu, b.h, b.norm, &w)))
        check_weights(c, "experts' gate, up", 0, 12, 2 * (weight_bytes(w.gate, f, chosen) + weight_bytes(w.shared_gate, f, 1)));
    o->begin(b.w.gpu, &b.w.batch);
    if (step(&b, o->norm_route(b.w.gpu, b.h, b.norm, router) | o->moe_down(b.w.gpu, &w, true, b.h)))
        check_weights(c, "experts' down", 0, 6, weight_bytes(w.down, f, chosen) + weight_bytes(w.shared_down, f, 1));
    op_close(&b.w);
}

int main(void) {
    op_context c = {.random = 88172645463325252ull};
    void *fake = dlopen(getenv("CARAVAN_METAL_LIBRARY"), RTLD_NOW);
    *(void **)&last = fake ? dlsym(fake, "fakemetal_last") : NULL;
    if (!last || !getenv("FAKEMETAL_CHECKED") || !getenv("FAKEMETAL_LINES")) {
        fputs("CARAVAN_METAL_LIBRARY must name the fake runtime, FAKEMETAL_CHECKED and FAKEMETAL_LINES must be set\n", stderr);
        return 2;
    }
    static const uint32_t types[] = {CV_BF16, CV_F16, CV_F32};
    static const size_t tokens[] = {1, 16, 2, 5, 8, 9, 12};
    enum { TOKENS = sizeof tokens / sizeof tokens[0] };
    char name[96];
    for (size_t i = 0; i < OP_FORMATS; i++)
        for (size_t k = 0; k < TOKENS; k++) {
            const op_format *f = &op_formats[i];
            bool common = f->bits == 4 && f->group == 64;
            if (!common && k != 1) continue; /* the common format with all counts, others with sixteen tokens */
            snprintf(name, sizeof name, "format %u, %u bits, groups of %u%s, %s; %zu tokens", f->format, f->bits, f->group, f->global ? ", global scale" : "", op_type(types[(i + k) % 3]), tokens[k]);
            cv_case(&c.checks, name);
            count_dense(&c, types[(i + k) % 3], f, tokens[k]);
            count_experts(&c, types[(i + k) % 3], f, tokens[k], 1 + k % 2);
            cv_end_case(&c.checks);
        }
    return cv_report(&c.checks);
}
