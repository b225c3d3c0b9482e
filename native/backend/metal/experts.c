/* experts.c — routing and experts: for few tokens the kernels choose the experts as they read them, for many the tokens are sorted by expert. */
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
    cv_moe_params params = {(uint32_t)n, (uint32_t)s->n_experts, (uint32_t)s->experts_per_token, (uint32_t)s->hidden};
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

static int up_few(cv_metal *m, const void *h, const float *norm, const cv_moe_weights *w) {
    enum { ROWS = 2 * CV_MATVEC_SIMDGROUPS };
    const cv_shape *s = m->base.shape;
    const cv_weight *const all[4] = {w->gate, w->up, w->shared_gate, w->shared_up};
    size_t n = m->batch->n_tokens, inputs = inputs_for(n), k = s->experts_per_token, experts = least(n * k, s->n_experts);
    cv_metal_constants c = cv_metal_formats(all, 4);
    cv_up_params params = {.gate = cv_metal_matrix(w->gate), .up = cv_metal_matrix(w->up), .shared_gate = cv_metal_matrix(w->shared_gate), .shared_up = cv_metal_matrix(w->shared_up),
                           .n = (uint32_t)n, .n_experts = (uint32_t)s->n_experts, .chosen = (uint32_t)k, .eps = s->norm_eps};
    use(m, &c, "experts_up", inputs);
    for (unsigned i = 0; i < 4; i++) cv_metal_bind_weight(m, 3 * i, all[i]);
    bind_rows(m, 12, h);
    bind_floats(m, 13, norm, s->hidden);
    bind_rows(m, 14, m->router_logits);
    bind_rows(m, 15, m->act);
    cv_metal_bytes(m->d, 16, &params, sizeof params);
    dispatch(m, cut(most(w->gate->rows, w->shared_gate->rows), ROWS), 1, experts + cut(n, inputs), CV_MATVEC_SIMDGROUPS * 32, 2 * (work_of(w->gate, n * k) + work_of(w->shared_gate, n)));
    return cv_metal_failed(m->d);
}

int cv_metal_op_moe_up(cv_backend *b, const void *h, const float *norm, const cv_moe_weights *w) {
    cv_metal *m = self(b);
    size_t n = m->batch->n_tokens;
    if (n <= CV_FEW) return up_few(m, h, norm, w);
    cv_metal_matmul(m, &(cv_metal_tiles){.a = w->gate, .b = w->up, .in = m->normed, .out = m->expert_act, .n = n * b->shape->experts_per_token, .output = CV_OUT_TYPED, .experts = 1});
    cv_metal_matmul(m, &(cv_metal_tiles){.a = w->shared_gate, .b = w->shared_up, .in = m->normed, .out = m->act, .n = n, .output = CV_OUT_TYPED});
    return cv_metal_failed(m->d);
}

static int down_few(cv_metal *m, const cv_moe_weights *w, bool accumulate, void *h) {
    const cv_shape *s = m->base.shape;
    const cv_weight *const all[2] = {w->down, w->shared_down};
    size_t n = m->batch->n_tokens, inputs = inputs_for(n), rows = (n == 1 ? 4 : 2) * CV_MATVEC_SIMDGROUPS;
    cv_metal_constants c = cv_metal_formats(all, 2);
    cv_down_params params = {.down = cv_metal_matrix(w->down), .shared_down = cv_metal_matrix(w->shared_down), .n = (uint32_t)n, .n_experts = (uint32_t)s->n_experts, .chosen = (uint32_t)s->experts_per_token, .add = accumulate};
    use(m, &c, "experts_down", inputs);
    cv_metal_bind_weight(m, 0, w->down);
    cv_metal_bind_weight(m, 3, w->shared_down);
    bind_rows(m, 6, m->act);
    bind_rows(m, 7, m->router_logits);
    bind_rows(m, 8, h);
    cv_metal_bytes(m->d, 9, &params, sizeof params);
    dispatch(m, cut(s->hidden, rows), 1, 1, CV_MATVEC_SIMDGROUPS * 32, work_of(w->down, n * s->experts_per_token) + work_of(w->shared_down, n));
    return cv_metal_failed(m->d);
}

int cv_metal_op_moe_down(cv_backend *b, const cv_moe_weights *w, bool accumulate, void *h) {
    cv_metal *m = self(b);
    const cv_shape *s = b->shape;
    size_t n = m->batch->n_tokens;
    if (n <= CV_FEW) return down_few(m, w, accumulate, h);
    cv_metal_matmul(m, &(cv_metal_tiles){.a = w->down, .in = m->expert_act, .out = m->expert_out, .n = n * s->experts_per_token, .output = CV_OUT_FLOAT, .experts = 2});
    cv_metal_matmul(m, &(cv_metal_tiles){.a = w->shared_down, .in = m->act, .out = m->shared_out, .n = n, .output = CV_OUT_FLOAT});
    cv_metal_constants c = no_constants();
    cv_moe_params params = {(uint32_t)n, (uint32_t)s->n_experts, (uint32_t)s->experts_per_token, (uint32_t)s->hidden};
    cv_metal_use(m->d, accumulate ? "experts_sum_add" : "experts_sum", &c);
    bind_rows(m, 0, m->expert_out);
    bind_rows(m, 1, m->shared_out);
    bind_rows(m, 2, m->place);
    bind_rows(m, 3, h);
    cv_metal_bytes(m->d, 4, &params, sizeof params);
    dispatch(m, cut(s->hidden, 64), n, 1, 64, 0);
    return cv_metal_failed(m->d);
}
