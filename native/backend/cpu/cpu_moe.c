/* cpu_moe.c — mixture of experts: router, top-K choice, rows grouped by expert, and the weighted sum back.
 *
 * Llama 4 scales an expert's input (not its output) by the sigmoid of the router's logit. Rows are sorted by expert, so an
 * expert's weights are read once however many tokens chose it; a row's own arithmetic does not depend on the grouping.
 */
#include "cpu.h"

#include <stdlib.h>
#include <string.h>

#include "scalar.h"

int cv_cpu_moe_open(cv_cpu *c) {
    const cv_shape *s = c->base.shape;
    c->jobs = cv_cpu_reserve(c, s->n_experts + 4, sizeof *c->jobs);
    c->expert_first = cv_cpu_reserve(c, s->n_experts + 1, sizeof *c->expert_first);
    if (!c->jobs || !c->expert_first) return CV_E_MEMORY;
    if (!s->n_experts) return CV_OK;
    if (s->experts_per_token && s->max_tokens > SIZE_MAX / s->experts_per_token) return CV_E_MEMORY;
    size_t places = s->max_tokens * s->experts_per_token;
    c->router_logits = cv_cpu_reserve(c, s->max_tokens, s->n_experts * sizeof(float));
    c->expert_of = cv_cpu_reserve(c, places, sizeof *c->expert_of);
    c->place_of = cv_cpu_reserve(c, places, sizeof *c->place_of);
    c->score_of = cv_cpu_reserve(c, places, sizeof *c->score_of);
    c->expert_out = cv_cpu_reserve(c, places, s->hidden * sizeof(float));
    c->shared_out = cv_cpu_reserve(c, s->max_tokens, s->hidden * sizeof(float));
    if (!c->router_logits || !c->expert_of || !c->place_of || !c->score_of || !c->expert_out || !c->shared_out) return CV_E_MEMORY;
    if (cv_act_open(c, &c->expert_in, places, s->hidden) || cv_act_open(c, &c->expert_mid, places, s->max_ff)) return CV_E_MEMORY;
    return CV_OK;
}

void cv_cpu_moe_close(cv_cpu *c) {
    free(c->jobs);
    free(c->expert_first);
    free(c->router_logits);
    free(c->expert_of);
    free(c->place_of);
    free(c->score_of);
    free(c->expert_out);
    free(c->shared_out);
    cv_act_close(&c->expert_in);
    cv_act_close(&c->expert_mid);
}

/* The K largest of n logits, largest first, the lower index winning ties. */
static void choose(const float *logits, size_t n, size_t k, uint32_t *expert, float *score) {
    for (size_t i = 0; i < k; i++) {
        size_t best = n;
        for (size_t e = 0; e < n; e++) {
            bool taken = false;
            for (size_t p = 0; p < i; p++) taken = taken || expert[p] == e;
            if (!taken && (best == n || logits[e] > logits[best])) best = e;
        }
        expert[i] = (uint32_t)best;
        score[i] = 1.0f / (1.0f + cv_exp_scalar(-logits[best]));
    }
}

/* Rows of expert_in by expert, within an expert in token order. */
static void sort_by_expert(cv_cpu *c, size_t n) {
    size_t experts = c->base.shape->n_experts;
    uint32_t *first = c->expert_first;
    memset(first, 0, (experts + 1) * sizeof *first);
    for (size_t i = 0; i < n; i++) first[c->expert_of[i] + 1]++;
    for (size_t e = 0; e < experts; e++) first[e + 1] += first[e];
    for (size_t i = 0; i < n; i++) c->place_of[i] = first[c->expert_of[i]]++;
    for (size_t e = experts; e > 0; e--) first[e] = first[e - 1];
    first[0] = 0;
}

int cv_cpu_norm_route(cv_backend *b, const void *h, const float *norm, const cv_weight *router) {
    cv_cpu *c = (cv_cpu *)b;
    const cv_shape *s = b->shape;
    size_t n = c->batch->n_tokens, k = s->experts_per_token;
    /* The router always reads float32: a rounding there may choose another expert. */
    cv_act_fill(c, h, s->hidden, n, NULL, norm, s->norm_eps, s->hidden, CV_NEED_FLOAT);
    c->jobs[0] = (cv_job){.w = {router}, .in = &c->in, .n = n, .out = c->router_logits, .ldo = s->n_experts, .float_input = true};
    cv_run_jobs(c, c->jobs, 1);
    for (size_t t = 0; t < n; t++) choose(c->router_logits + t * s->n_experts, s->n_experts, k, c->expert_of + t * k, c->score_of + t * k);
    sort_by_expert(c, n * k);
    return CV_OK;
}

typedef struct {
    cv_cpu *c;
    bool experts, shared; /* this rank has a part of them */
    uint32_t expert_needs, shared_needs;
} inputs;

/* Token t's inputs: its normalised row for the shared expert, the row times its score for each chosen expert. */
static void fill_inputs(void *context, size_t t, size_t thread) {
    (void)thread;
    inputs *in = context;
    cv_cpu *c = in->c;
    size_t k = c->base.shape->experts_per_token, hidden = c->base.shape->hidden;
    const float *m = c->in.x + t * c->in.ldx;
    for (size_t i = t * k; in->experts && i < (t + 1) * k; i++) {
        size_t row = c->place_of[i];
        float *x = c->expert_in.x + row * c->expert_in.ldx, g = c->score_of[i];
        for (size_t j = 0; j < hidden; j++) x[j] = g * m[j];
        cv_act_store(c, &c->expert_in, row, 0, hidden, x, in->expert_needs);
    }
    if (in->shared) cv_act_store(c, &c->in, t, 0, hidden, m, in->shared_needs & ~(uint32_t)CV_NEED_FLOAT);
}

static cv_job swiglu_job(const cv_cpu *c, const cv_weight *gate, const cv_weight *up, const cv_weight *down, const cv_act *in, cv_act *out, size_t n) {
    return (cv_job){.w = {gate, up}, .in = in, .n = n, .act = out, .act_needs = cv_needs_of(c, down)};
}

/* norm_route has left RMSNorm(h) in c->in. */
int cv_cpu_moe_up(cv_backend *b, const void *h, const float *norm, const cv_moe_weights *w) {
    (void)h;
    (void)norm;
    cv_cpu *c = (cv_cpu *)b;
    const cv_shape *s = b->shape;
    size_t n = c->batch->n_tokens, n_jobs = 0;
    inputs in = {.c = c, .experts = w->gate != NULL, .shared = w->shared_gate != NULL};
    if (in.experts) in.expert_needs = cv_needs_of(c, w->gate) | cv_needs_of(c, w->up);
    if (in.shared) in.shared_needs = cv_needs_of(c, w->shared_gate) | cv_needs_of(c, w->shared_up);
    cv_act_shape(&c->expert_in, s->hidden);
    cv_parallel(c, n, 4, fill_inputs, &in);
    if (in.experts) cv_act_shape(&c->expert_mid, w->gate->rows);
    if (in.shared) cv_act_shape(&c->mid, w->shared_gate->rows);
    for (size_t e = 0; in.experts && e < s->n_experts; e++) {
        size_t first = c->expert_first[e], rows = c->expert_first[e + 1] - first;
        if (!rows) continue;
        cv_job *j = &c->jobs[n_jobs++];
        *j = swiglu_job(c, w->gate, w->up, w->down, &c->expert_in, &c->expert_mid, rows);
        j->expert = e;
        j->in_first = j->act_first = first;
    }
    if (in.shared) c->jobs[n_jobs++] = swiglu_job(c, w->shared_gate, w->shared_up, w->shared_down, &c->in, &c->mid, n);
    cv_run_jobs(c, c->jobs, n_jobs);
    return CV_OK;
}

typedef struct {
    cv_cpu *c;
    float *h;
    bool experts, shared, accumulate;
} sum;

static void sum_row(void *context, size_t t, size_t thread) {
    (void)thread;
    sum *s = context;
    cv_cpu *c = s->c;
    size_t k = c->base.shape->experts_per_token, hidden = c->base.shape->hidden;
    float *shared = c->shared_out + t * hidden, *total = s->experts ? c->expert_out + c->place_of[t * k] * hidden : shared, *h = s->h + t * hidden;
    for (size_t i = 1; s->experts && i < k; i++) c->k->add(total, c->expert_out + c->place_of[t * k + i] * hidden, hidden);
    if (s->experts && s->shared) c->k->add(total, shared, hidden);
    if (s->accumulate) c->k->add(h, total, hidden);
    else memcpy(h, total, hidden * sizeof(float));
}

int cv_cpu_moe_down(cv_backend *b, const cv_moe_weights *w, bool accumulate, void *h) {
    cv_cpu *c = (cv_cpu *)b;
    const cv_shape *s = b->shape;
    size_t n = c->batch->n_tokens, n_jobs = 0;
    for (size_t e = 0; w->down && e < s->n_experts; e++) {
        size_t first = c->expert_first[e], rows = c->expert_first[e + 1] - first;
        if (rows) c->jobs[n_jobs++] = (cv_job){.w = {w->down}, .expert = e, .in = &c->expert_mid, .in_first = first, .n = rows, .out = c->expert_out + first * s->hidden, .ldo = s->hidden};
    }
    if (w->shared_down) c->jobs[n_jobs++] = (cv_job){.w = {w->shared_down}, .in = &c->mid, .n = n, .out = c->shared_out, .ldo = s->hidden};
    cv_run_jobs(c, c->jobs, n_jobs);
    sum total = {c, h, w->down != NULL, w->shared_down != NULL, accumulate};
    cv_parallel(c, n, 8, sum_row, &total);
    return CV_OK;
}
