/* experts.c — routing and experts: for few tokens the kernels choose the experts as they read them, for many the tokens are sorted by expert.
 * A rank may have a part of the experts alone, or of the shared expert alone: to the kernels what is missing has no rows (up) or no columns
 * (down), and the other's weights stand for what they bind and do not read. */
#include "operations.h"

/* The router's product is the same kernel for any number of tokens: a prompt chooses the experts that decoding would. */
int cv_metal_op_norm_route(cv_backend *b, const void *h, const float *norm, const cv_weight *router) {
    cv_metal *m = self(b);
    const cv_shape *s = b->shape;
    size_t n = m->batch->n_tokens;
    cv_metal_matvec(m, &(cv_metal_product){.w = {router}, .out = {m->router_logits}, .n_parts = 1, .n = n, .in = h, .norm = norm, .output = CV_OUT_FLOAT});
    if (n <= CV_FEW) return cv_metal_failed(m->d);
    cv_metal_normalise(m, h, norm, n, NULL);
    cv_metal_constants c = no_constants();
    cv_moe_params params = {(uint32_t)n, (uint32_t)s->n_experts, (uint32_t)s->experts_per_token, (uint32_t)s->hidden, 0};
    cv_metal_use(m->d, "experts_sort", &c);
    bind_rows(m, 0, m->router_logits);
    bind_rows(m, 1, m->row_token);
    bind_rows(m, 2, m->row_score);
    bind_rows(m, 3, m->place);
    bind_rows(m, 4, m->expert_tiles);
    bind_rows(m, 5, m->n_expert_tiles);
    cv_metal_bytes(m->d, 6, &params, sizeof params);
    dispatch(m, 1, 1, 1, CV_SORT_THREADS, 0);
    return cv_metal_failed(m->d);
}

/* Inputs that a kernel for experts takes at once: the least of its variants that holds n. */
static size_t inputs_for(size_t n) { return n == 1 ? 1 : n <= 8 ? 8 : CV_MATVEC_INPUTS; }

static const cv_weight *either(const cv_weight *w, const cv_weight *other) { return w ? w : other; }

/* Of a weight that is not here, in the shape of the one that stands for it: without rows, or without columns. */
static cv_matrix matrix_without(const cv_weight *w, const cv_weight *other, bool rows) {
    if (w) return cv_metal_matrix(w);
    cv_matrix none = cv_metal_matrix(other);
    none.has_global = 0;
    if (rows) none.rows = 0;
    else none.cols = 0;
    return none;
}

static double work_if(const cv_weight *w, size_t n) { return w ? work_of(w, n) : 0; }

static int up_few(cv_metal *m, const void *h, const float *norm, const cv_moe_weights *w) {
    enum { ROWS = 2 * CV_MATVEC_SIMDGROUPS };
    const cv_shape *s = m->base.shape;
    const cv_weight *const all[4] = {either(w->gate, w->shared_gate), either(w->up, w->shared_up), either(w->shared_gate, w->gate), either(w->shared_up, w->up)};
    size_t n = m->batch->n_tokens, inputs = inputs_for(n), k = w->gate ? s->experts_per_token : 0, experts = least(n * k, s->n_experts);
    cv_metal_constants c = cv_metal_formats(all, 4);
    cv_up_params params = {.gate = matrix_without(w->gate, all[2], true), .up = matrix_without(w->up, all[3], true), .shared_gate = matrix_without(w->shared_gate, all[0], true), .shared_up = matrix_without(w->shared_up, all[1], true),
                           .n = (uint32_t)n, .n_experts = (uint32_t)s->n_experts, .chosen = (uint32_t)k, .eps = s->norm_eps};
    use(m, &c, "experts_up", inputs);
    for (unsigned i = 0; i < 4; i++) cv_metal_bind_weight(m, 3 * i, all[i]);
    bind_rows(m, 12, h);
    bind_floats(m, 13, norm, s->hidden);
    bind_rows(m, 14, m->router_logits);
    bind_rows(m, 15, m->act);
    cv_metal_bytes(m->d, 16, &params, sizeof params);
    size_t blocks = experts + (w->shared_gate ? cut(n, inputs) : 0);
    dispatch(m, cut(most(params.gate.rows, params.shared_gate.rows), ROWS), 1, blocks, CV_MATVEC_SIMDGROUPS * 32, 2 * (work_if(w->gate, n * k) + work_if(w->shared_gate, n)));
    return cv_metal_failed(m->d);
}

int cv_metal_op_moe_up(cv_backend *b, const void *h, const float *norm, const cv_moe_weights *w) {
    cv_metal *m = self(b);
    size_t n = m->batch->n_tokens;
    if (n <= CV_FEW) return up_few(m, h, norm, w);
    if (w->gate) cv_metal_matmul(m, &(cv_metal_tiles){.a = w->gate, .b = w->up, .in = m->normed, .out = m->expert_act, .n = n * b->shape->experts_per_token, .output = CV_OUT_TYPED, .experts = 1});
    if (w->shared_gate) cv_metal_matmul(m, &(cv_metal_tiles){.a = w->shared_gate, .b = w->shared_up, .in = m->normed, .out = m->act, .n = n, .output = CV_OUT_TYPED});
    return cv_metal_failed(m->d);
}

static int down_few(cv_metal *m, const cv_moe_weights *w, bool accumulate, void *h) {
    const cv_shape *s = m->base.shape;
    const cv_weight *const all[2] = {either(w->down, w->shared_down), either(w->shared_down, w->down)};
    size_t n = m->batch->n_tokens, k = w->down ? s->experts_per_token : 0, inputs = inputs_for(n), rows = (n == 1 ? 4 : 2) * CV_MATVEC_SIMDGROUPS;
    cv_metal_constants c = cv_metal_formats(all, 2);
    cv_down_params params = {.down = matrix_without(w->down, all[1], false), .shared_down = matrix_without(w->shared_down, all[0], false), .n = (uint32_t)n, .n_experts = (uint32_t)s->n_experts, .chosen = (uint32_t)k, .add = accumulate};
    use(m, &c, "experts_down", inputs);
    cv_metal_bind_weight(m, 0, all[0]);
    cv_metal_bind_weight(m, 3, all[1]);
    bind_rows(m, 6, m->act);
    bind_rows(m, 7, m->router_logits);
    bind_rows(m, 8, h);
    cv_metal_bytes(m->d, 9, &params, sizeof params);
    dispatch(m, cut(s->hidden, rows), 1, 1, CV_MATVEC_SIMDGROUPS * 32, work_if(w->down, n * k) + work_if(w->shared_down, n));
    return cv_metal_failed(m->d);
}

int cv_metal_op_moe_down(cv_backend *b, const cv_moe_weights *w, bool accumulate, void *h) {
    cv_metal *m = self(b);
    const cv_shape *s = b->shape;
    size_t n = m->batch->n_tokens;
    if (n <= CV_FEW) return down_few(m, w, accumulate, h);
    if (w->down) cv_metal_matmul(m, &(cv_metal_tiles){.a = w->down, .in = m->expert_act, .out = m->expert_out, .n = n * s->experts_per_token, .output = CV_OUT_FLOAT, .experts = 2});
    if (w->shared_down) cv_metal_matmul(m, &(cv_metal_tiles){.a = w->shared_down, .in = m->act, .out = m->shared_out, .n = n, .output = CV_OUT_FLOAT});
    cv_metal_constants c = no_constants();
    cv_moe_params params = {(uint32_t)n, (uint32_t)s->n_experts, w->down ? (uint32_t)s->experts_per_token : 0, (uint32_t)s->hidden, w->shared_down != NULL};
    cv_metal_use(m->d, accumulate ? "experts_sum_add" : "experts_sum", &c);
    bind_rows(m, 0, m->expert_out);
    bind_rows(m, 1, m->shared_out);
    bind_rows(m, 2, m->place);
    bind_rows(m, 3, h);
    cv_metal_bytes(m->d, 4, &params, sizeof params);
    dispatch(m, cut(s->hidden, 64), n, 1, 64, 0);
    return cv_metal_failed(m->d);
}
