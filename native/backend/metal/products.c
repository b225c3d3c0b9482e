/* products.c — operations that are products of rows with one or several matrices, through matrix-vector kernels for few tokens and
 * tiles for many: embedding, queries with keys and values, projections, the MLP, the head. */
#include "operations.h"

enum { ROW_THREADS = 256 };

/* Inputs that a matrix-vector kernel takes at once: the least of its variants that holds n. */
static size_t inputs_for(size_t n) { return n <= 2 ? n : n <= 4 ? 4 : n <= 8 ? 8 : CV_MATVEC_INPUTS; }

void cv_metal_matvec(cv_metal *m, const cv_metal_product *p) {
    size_t inputs = inputs_for(p->n), rows = (inputs <= 2 ? 4 : 2) * CV_MATVEC_SIMDGROUPS, blocks = 0;
    cv_metal_constants c = cv_metal_formats(p->w, p->n_parts);
    cv_matvec_params params = {.n = (uint32_t)p->n, .eps = m->base.shape->norm_eps};
    c.norm = p->norm != NULL;
    c.output = p->output;
    c.rows = p->row_index != NULL;
    for (size_t i = 0; i < p->n_parts; i++) c.bias = c.bias || p->bias[i];
    use(m, &c, "matvec", inputs);
    double work = 0;
    for (size_t i = 0; i < 3; i++) {
        size_t part = i < p->n_parts ? i : 0;
        const cv_weight *w = p->w[part];
        cv_metal_bind_weight(m, (unsigned)(3 * i), w);
        bind_rows(m, (unsigned)(11 + i), p->out[part]);
        bind_floats(m, (unsigned)(14 + i), p->bias[part], w->rows);
        params.m[i] = cv_metal_matrix(w);
        params.first_block[i] = (uint32_t)blocks;
        if (i >= p->n_parts) continue;
        blocks += cut(w->rows, rows);
        work += work_of(w, p->n);
    }
    bind_rows(m, 9, p->in);
    bind_floats(m, 10, p->norm, m->base.shape->hidden);
    bind_rows(m, 17, p->row_index ? (const void *)p->row_index : m->zeros);
    cv_metal_bytes(m->d, 18, &params, sizeof params);
    dispatch(m, blocks, cut(p->n, inputs), 1, CV_MATVEC_SIMDGROUPS * 32, work);
}

void cv_metal_matmul(cv_metal *m, const cv_metal_tiles *p) {
    const cv_shape *s = m->base.shape;
    const cv_weight *const w[2] = {p->a, p->b ? p->b : p->a};
    cv_metal_constants c = cv_metal_formats(w, 2);
    c.output = p->output;
    c.swiglu = p->b != NULL;
    c.experts = p->experts;
    c.bias = p->bias_a || p->bias_b;
    use(m, &c, "matmul", 0);
    cv_matmul_params params = {.a = cv_metal_matrix(w[0]), .b = cv_metal_matrix(w[1]), .n = (uint32_t)p->n};
    cv_metal_bind_weight(m, 0, w[0]);
    cv_metal_bind_weight(m, 3, w[1]);
    bind_rows(m, 6, p->in);
    bind_rows(m, 7, p->out);
    bind_floats(m, 8, p->bias_a, p->a->rows);
    bind_floats(m, 9, p->bias_b, p->a->rows);
    bind_rows(m, 10, p->experts ? (const void *)m->expert_tiles : m->zeros);
    bind_rows(m, 11, p->experts ? (const void *)m->n_expert_tiles : m->zeros);
    bind_rows(m, 12, p->experts ? (const void *)m->row_token : m->zeros);
    bind_rows(m, 13, p->experts ? (const void *)m->row_score : m->zeros);
    cv_metal_bytes(m->d, 14, &params, sizeof params);
    size_t tiles = cut(p->n, CV_MATMUL_TOKENS) + (p->experts ? least(s->n_experts, p->n) : 0);
    dispatch(m, cut(p->a->rows, p->b ? CV_MATMUL_ROWS / 2 : CV_MATMUL_ROWS), tiles, 1, 128, work_of(p->a, p->n) * (p->b ? 2 : 1));
}

void cv_metal_normalise(cv_metal *m, const void *h, const float *norm, size_t n, const uint32_t *rows) {
    const cv_shape *s = m->base.shape;
    cv_metal_constants c = no_constants();
    cv_norm_params params = {.n = (uint32_t)n, .hidden = (uint32_t)s->hidden, .has_rows = rows != NULL, .eps = s->norm_eps};
    use(m, &c, "rms_norm", 0);
    bind_rows(m, 0, h);
    bind_floats(m, 1, norm, s->hidden);
    bind_rows(m, 2, m->normed);
    bind_rows(m, 3, rows ? (const void *)rows : m->zeros);
    cv_metal_bytes(m->d, 4, &params, sizeof params);
    dispatch(m, n, 1, 1, ROW_THREADS, (double)n * (double)s->hidden);
}

static int linear_of(cv_metal *m, const void *in, const cv_weight *w, const float *bias, size_t n, uint32_t output, void *out) {
    if (n <= CV_FEW) cv_metal_matvec(m, &(cv_metal_product){.w = {w}, .bias = {bias}, .out = {out}, .n_parts = 1, .n = n, .in = in, .output = output});
    else cv_metal_matmul(m, &(cv_metal_tiles){.a = w, .bias_a = bias, .in = in, .out = out, .n = n, .output = output});
    return cv_metal_failed(m->d);
}

int cv_metal_op_embed(cv_backend *b, const cv_weight *table, void *h) {
    cv_metal *m = self(b);
    size_t n = m->batch->n_tokens;
    cv_metal_constants c = cv_metal_formats(&table, 1);
    cv_matmul_params params = {.a = cv_metal_matrix(table), .n = (uint32_t)n};
    cv_metal_use(m->d, "embed", &c);
    cv_metal_bind_weight(m, 0, table);
    bind_rows(m, 3, m->step.tokens);
    bind_rows(m, 4, h);
    cv_metal_bytes(m->d, 5, &params, sizeof params);
    dispatch(m, cut(table->cols / 16, 32), n, 1, 32, 0);
    return cv_metal_failed(m->d);
}

int cv_metal_op_norm_qkv(cv_backend *b, const void *h, const float *norm, const cv_weight *const w[3], const float *const bias[3], void *q, void *k, void *v) {
    cv_metal *m = self(b);
    size_t n = m->batch->n_tokens;
    void *out[3] = {q, k, v};
    if (n <= CV_FEW) {
        cv_metal_matvec(m, &(cv_metal_product){.w = {w[0], w[1], w[2]}, .bias = {bias[0], bias[1], bias[2]}, .out = {q, k, v}, .n_parts = 3, .n = n, .in = h, .norm = norm, .output = CV_OUT_TYPED});
        return cv_metal_failed(m->d);
    }
    cv_metal_normalise(m, h, norm, n, NULL);
    for (size_t i = 0; i < 3; i++) cv_metal_matmul(m, &(cv_metal_tiles){.a = w[i], .bias_a = bias[i], .in = m->normed, .out = out[i], .n = n, .output = CV_OUT_TYPED});
    return cv_metal_failed(m->d);
}

int cv_metal_op_linear(cv_backend *b, const void *x, const cv_weight *w, const float *bias, bool accumulate, void *h) {
    return linear_of(self(b), x, w, bias, self(b)->batch->n_tokens, accumulate ? CV_OUT_ADD : CV_OUT_FLOAT, h);
}

int cv_metal_op_norm_mlp(cv_backend *b, const void *h, const float *norm, const cv_weight *gate, const cv_weight *up, const cv_weight *down, const float *gate_bias, const float *up_bias, void **act) {
    (void)down;
    cv_metal *m = self(b);
    size_t n = m->batch->n_tokens;
    *act = m->act;
    if (n > CV_FEW) {
        cv_metal_normalise(m, h, norm, n, NULL);
        cv_metal_matmul(m, &(cv_metal_tiles){.a = gate, .b = up, .bias_a = gate_bias, .bias_b = up_bias, .in = m->normed, .out = m->act, .n = n, .output = CV_OUT_TYPED});
        return cv_metal_failed(m->d);
    }
    enum { ROWS = 2 * CV_MATVEC_SIMDGROUPS };
    const cv_weight *const w[2] = {gate, up};
    size_t inputs = inputs_for(n);
    cv_metal_constants c = cv_metal_formats(w, 2);
    cv_up_params params = {.gate = cv_metal_matrix(gate), .up = cv_metal_matrix(up), .n = (uint32_t)n, .eps = b->shape->norm_eps};
    c.bias = gate_bias || up_bias;
    use(m, &c, "matvec_up", inputs);
    cv_metal_bind_weight(m, 0, gate);
    cv_metal_bind_weight(m, 3, up);
    bind_rows(m, 6, h);
    bind_floats(m, 7, norm, b->shape->hidden);
    bind_rows(m, 8, m->act);
    bind_floats(m, 9, gate_bias, gate->rows);
    bind_floats(m, 10, up_bias, up->rows);
    cv_metal_bytes(m->d, 11, &params, sizeof params);
    dispatch(m, cut(gate->rows, ROWS), cut(n, inputs), 1, CV_MATVEC_SIMDGROUPS * 32, 2 * work_of(gate, n));
    return cv_metal_failed(m->d);
}

int cv_metal_op_head(cv_backend *b, const void *h, const uint32_t *rows, size_t n_rows, const float *norm, const cv_weight *head, float *logits) {
    cv_metal *m = self(b);
    memcpy(m->step.rows, rows, n_rows * sizeof *rows);
    if (n_rows <= CV_FEW) {
        cv_metal_matvec(m, &(cv_metal_product){.w = {head}, .out = {logits}, .n_parts = 1, .n = n_rows, .in = h, .norm = norm, .row_index = m->step.rows, .output = CV_OUT_FLOAT});
        return cv_metal_failed(m->d);
    }
    cv_metal_normalise(m, h, norm, n_rows, m->step.rows);
    cv_metal_matmul(m, &(cv_metal_tiles){.a = head, .in = m->normed, .out = logits, .n = n_rows, .output = CV_OUT_FLOAT});
    return cv_metal_failed(m->d);
}
