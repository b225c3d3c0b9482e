/* cpu.c — the CPU backend: its life, and the operations that are neither attention nor experts. */
#include "cpu.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../../engine/error.h"

static cv_cpu *self(cv_backend *b) { return (cv_cpu *)b; }

static void cpu_close(cv_backend *b) {
    if (!b) return;
    cv_cpu *c = self(b);
    size_t n = c->threads ? cv_threads_count(c->threads) : 0;
    for (size_t i = 0; c->scratch && i < n; i++) {
        cv_cpu_scratch *s = &c->scratch[i];
        free(s->kernel);
        free(s->tile[0]);
        free(s->tile[1]);
        free(s->queries);
        free(s->page);
        free(s->scores);
        free(s->block_out);
        free(s->out);
    }
    cv_threads_close(c->threads);
    free(c->scratch);
    free(c->cos);
    free(c->sin);
    free(c->tile_first);
    free(c->ahead);
    free(c->parts);
    free(c->part_out);
    cv_act_close(&c->in);
    cv_act_close(&c->mid);
    cv_cpu_moe_close(c);
    free(c);
}

static int cpu_alloc(cv_backend *b, size_t bytes, void **out) {
    (void)b;
    *out = cv_alloc_array(bytes, 1);
    return *out ? CV_OK : CV_E_MEMORY;
}

static void cpu_free(cv_backend *b, void *p) {
    (void)b;
    free(p);
}

typedef struct {
    cv_cpu *c;
    const cv_weight *w;
    float *h;
    uint32_t flags;
    size_t n_heads, n_kv_heads;
    float *q, *k, *v;
    const cv_kv_layer *kv;
} row_job;

/* cos and sin of the angles of token t. Hugging Face's rounding: the angle is the float32 product of position and
 * frequency; cos and sin of it are then exact to float32. */
static void prepare_angles(void *context, size_t t, size_t thread) {
    (void)thread;
    cv_cpu *c = ((row_job *)context)->c;
    const cv_shape *s = c->base.shape;
    size_t half = s->head_dim / 2;
    float position = (float)c->batch->positions[t];
    for (size_t j = 0; j < half; j++) {
        float angle = position * s->inv_freq[j];
        c->cos[t * half + j] = (float)cos((double)angle);
        c->sin[t * half + j] = (float)sin((double)angle);
    }
}

static int cpu_begin(cv_backend *b, const cv_batch *batch) {
    cv_cpu *c = self(b);
    c->batch = batch;
    c->run = 0;
    row_job j = {.c = c};
    cv_parallel(c, batch->n_tokens, 16, prepare_angles, &j);
    return CV_OK;
}

static int cpu_finish(cv_backend *b, char *err, size_t err_size) {
    (void)err;
    (void)err_size;
    self(b)->batch = NULL;
    return CV_OK;
}

static void embed_row(void *context, size_t t, size_t thread) {
    row_job *j = context;
    size_t hidden = j->w->cols;
    float *row = j->c->scratch[thread].kernel; /* decode_row pads to a multiple of 16, h does not */
    j->c->k->decode_row(j->w, 0, j->c->batch->tokens[t], row);
    memcpy(j->h + t * hidden, row, hidden * sizeof(float));
}

static int cpu_embed(cv_backend *b, const cv_weight *table, void *h) {
    cv_cpu *c = self(b);
    row_job j = {.c = c, .w = table, .h = h};
    cv_parallel(c, c->batch->n_tokens, 8, embed_row, &j);
    return CV_OK;
}

static int cpu_norm_qkv(cv_backend *b, const void *h, const float *norm, const cv_weight *const w[3], const float *const bias[3], void *q, void *k, void *v) {
    cv_cpu *c = self(b);
    const cv_shape *s = b->shape;
    size_t n = c->batch->n_tokens;
    uint32_t needs = cv_needs_of(c, w[0]) | cv_needs_of(c, w[1]) | cv_needs_of(c, w[2]);
    cv_act_fill(c, h, s->hidden, n, NULL, norm, s->norm_eps, s->hidden, needs);
    void *out[3] = {q, k, v};
    for (size_t i = 0; i < 3; i++) c->jobs[i] = (cv_job){.w = {w[i]}, .bias = {bias[i]}, .in = &c->in, .n = n, .out = out[i], .ldo = w[i]->rows};
    cv_run_jobs(c, c->jobs, 3);
    return CV_OK;
}

/* One head of one token into the cache. */
static void store(const cv_cpu *c, const float *x, char *to) {
    size_t d = c->base.shape->head_dim;
    if (c->base.shape->kv_type != CV_Q8) {
        c->k->store_kv(x, to, c->base.shape->kv_type, d);
        return;
    }
    float sums[256 / 32];
    c->k->quantize(x, d, 32, (int8_t *)to, (float *)(void *)(to + d), sums);
}

static void rope_store_row(void *context, size_t t, size_t thread) {
    (void)thread;
    row_job *j = context;
    cv_cpu *c = j->c;
    const cv_shape *s = c->base.shape;
    const cv_seq *seq = &c->batch->seqs[c->batch->token_seq[t]];
    uint64_t position = c->batch->positions[t];
    size_t d = s->head_dim, half = d / 2, p = s->page_tokens;
    float *q = j->q + t * j->n_heads * d, *k = j->k + t * j->n_kv_heads * d, *v = j->v + t * j->n_kv_heads * d;
    if (j->flags & CV_LAYER_ROPE) {
        for (size_t i = 0; i < j->n_heads; i++) c->k->rope(q + i * d, c->cos + t * half, c->sin + t * half, d, s->rope_interleaved);
        for (size_t i = 0; i < j->n_kv_heads; i++) c->k->rope(k + i * d, c->cos + t * half, c->sin + t * half, d, s->rope_interleaved);
    }
    if (j->flags & CV_LAYER_QK_NORM) {
        for (size_t i = 0; i < j->n_heads; i++) c->k->rms_norm(q + i * d, NULL, d, s->qk_norm_eps, q + i * d);
        for (size_t i = 0; i < j->n_kv_heads; i++) c->k->rms_norm(k + i * d, NULL, d, s->qk_norm_eps, k + i * d);
    }
    if (j->flags & CV_LAYER_TEMPERATURE) {
        float scale = (float)(1.0 + (double)s->attn_scale * log(1.0 + floor(((double)position + 1.0) / (double)s->floor_scale)));
        for (size_t i = 0; i < j->n_heads * d; i++) q[i] = q[i] * scale;
    }
    uint32_t page = j->flags & CV_LAYER_CHUNKED ? seq->chunk_pages[(position - seq->chunk_base) / p] : seq->full_pages[position / p];
    size_t bytes = cv_kv_element_bytes(s->kv_type), token = cv_kv_token_elements(s->kv_type, d);
    for (size_t i = 0; i < j->n_kv_heads; i++) {
        size_t at = page * j->kv->page_stride + i * j->kv->head_stride + (size_t)(position % p) * token;
        store(c, k + i * d, (char *)j->kv->k + at * bytes);
        store(c, v + i * d, (char *)j->kv->v + at * bytes);
    }
}

static int cpu_rope_store(cv_backend *b, uint32_t flags, size_t n_heads, size_t n_kv_heads, void *q, void *k, void *v, const cv_kv_layer *kv) {
    cv_cpu *c = self(b);
    row_job j = {.c = c, .flags = flags, .n_heads = n_heads, .n_kv_heads = n_kv_heads, .q = q, .k = k, .v = v, .kv = kv};
    cv_parallel(c, c->batch->n_tokens, 8, rope_store_row, &j);
    return CV_OK;
}

static int cpu_linear(cv_backend *b, const void *x, const cv_weight *w, const float *bias, bool accumulate, void *h) {
    cv_cpu *c = self(b);
    size_t n = c->batch->n_tokens;
    bool there = x == c->mid.x; /* after norm_mlp the hidden activations are in the form that w reads */
    const cv_act *in = there ? &c->mid : &c->in;
    if (there ? w->cols != in->cols : w->cols > in->max_cols) return CV_E_ARGUMENT;
    if (!there) cv_act_fill(c, x, w->cols, n, NULL, NULL, 0, w->cols, cv_needs_of(c, w));
    c->jobs[0] = (cv_job){.w = {w}, .bias = {bias}, .in = in, .n = n, .out = h, .ldo = w->rows, .add = accumulate};
    cv_run_jobs(c, c->jobs, 1);
    return CV_OK;
}

static int cpu_norm_mlp(cv_backend *b, const void *h, const float *norm, const cv_weight *gate, const cv_weight *up, const cv_weight *down, const float *gate_bias, const float *up_bias, void **act) {
    cv_cpu *c = self(b);
    const cv_shape *s = b->shape;
    size_t n = c->batch->n_tokens;
    cv_act_fill(c, h, s->hidden, n, NULL, norm, s->norm_eps, s->hidden, cv_needs_of(c, gate) | cv_needs_of(c, up));
    cv_act_shape(&c->mid, gate->rows);
    c->jobs[0] = (cv_job){.w = {gate, up}, .bias = {gate_bias, up_bias}, .in = &c->in, .n = n, .act = &c->mid, .act_needs = cv_needs_of(c, down)};
    cv_run_jobs(c, c->jobs, 1);
    *act = c->mid.x;
    return CV_OK;
}

static int cpu_head(cv_backend *b, const void *h, const uint32_t *rows, size_t n_rows, const float *norm, const cv_weight *head, float *logits) {
    cv_cpu *c = self(b);
    const cv_shape *s = b->shape;
    cv_act_fill(c, h, s->hidden, n_rows, rows, norm, s->norm_eps, s->hidden, cv_needs_of(c, head));
    c->jobs[0] = (cv_job){.w = {head}, .in = &c->in, .n = n_rows, .out = logits, .ldo = head->rows};
    cv_run_jobs(c, c->jobs, 1);
    return CV_OK;
}

static int open_scratch(cv_cpu *c) {
    const cv_shape *s = c->base.shape;
    size_t widest = s->hidden, n = cv_threads_count(c->threads);
    if (s->max_ff > widest) widest = s->max_ff;
    if (s->max_heads * s->head_dim > widest) widest = s->max_heads * s->head_dim;
    size_t kernel = c->k->scratch_bytes(widest), rows = cv_pad16(widest) * sizeof(float);
    c->scratch = cv_cpu_reserve(c, n, sizeof *c->scratch);
    if (!c->scratch) return CV_E_MEMORY;
    for (size_t i = 0; i < n; i++) {
        cv_cpu_scratch *t = &c->scratch[i];
        t->kernel = cv_cpu_reserve(c, kernel > rows ? kernel : rows, 1);
        for (size_t j = 0; j < 2; j++) t->tile[j] = cv_cpu_reserve(c, CV_TILE_FLOATS, sizeof(float));
        t->queries = cv_cpu_reserve(c, CV_ATTN_QUERIES * s->head_dim, sizeof(float));
        t->page = cv_cpu_reserve(c, s->page_tokens * s->head_dim, sizeof(float));
        t->scores = cv_cpu_reserve(c, CV_ATTN_QUERIES * CV_ATTN_BLOCK, sizeof(float));
        t->block_out = cv_cpu_reserve(c, CV_ATTN_QUERIES * s->head_dim, sizeof(float));
        t->out = cv_cpu_reserve(c, CV_ATTN_QUERIES * s->head_dim, sizeof(float));
        if (!t->kernel || !t->tile[0] || !t->tile[1] || !t->queries || !t->page || !t->scores || !t->block_out || !t->out) return CV_E_MEMORY;
    }
    size_t inputs = s->max_heads * s->head_dim > s->hidden ? s->max_heads * s->head_dim : s->hidden;
    size_t rows_in = s->max_logits > s->max_tokens ? s->max_logits : s->max_tokens;
    if (cv_act_open(c, &c->in, rows_in, inputs) || cv_act_open(c, &c->mid, s->max_tokens, s->max_ff)) return CV_E_MEMORY;
    c->cos = cv_cpu_reserve(c, s->max_tokens, s->head_dim / 2 * sizeof(float));
    c->sin = cv_cpu_reserve(c, s->max_tokens, s->head_dim / 2 * sizeof(float));
    c->tile_first = cv_cpu_reserve(c, s->max_tokens + 1, sizeof *c->tile_first);
    c->ahead = cv_cpu_reserve(c, CV_AHEAD_RUNS, sizeof *c->ahead);
    if (!c->cos || !c->sin || !c->tile_first || !c->ahead) return CV_E_MEMORY;
    if (n > 1) {
        c->max_parts = s->max_heads * 512;
        c->parts = cv_cpu_reserve(c, c->max_parts, sizeof *c->parts);
        c->part_out = cv_cpu_reserve(c, c->max_parts, s->head_dim * sizeof(float));
        if (!c->parts || !c->part_out) return CV_E_MEMORY;
    }
    return cv_cpu_moe_open(c);
}

int cv_backend_cpu_open(const cv_shape *shape, cv_backend **out, char *err, size_t err_size) {
    static const cv_backend_ops ops = {
        .name = "cpu", .close = cpu_close, .alloc = cpu_alloc, .free = cpu_free, .begin = cpu_begin, .finish = cpu_finish,
        .embed = cpu_embed, .norm_qkv = cpu_norm_qkv, .rope_store = cpu_rope_store, .attention = cv_cpu_attention, .linear = cpu_linear,
        .norm_mlp = cpu_norm_mlp, .norm_route = cv_cpu_norm_route, .moe_up = cv_cpu_moe_up, .moe_down = cv_cpu_moe_down, .head = cpu_head,
    };
    cv_err e = {err, err_size};
    cv_cpu *c = cv_alloc_array(1, sizeof *c);
    if (!c) return cv_fail(e, CV_E_MEMORY, "no memory for the CPU backend");
    c->base = (cv_backend){.ops = &ops, .shape = shape, .act_bytes = sizeof(float)};
    c->k = cv_kernels_pick(shape->cpu_level);
    c->threads = cv_threads_open(shape->n_threads);
    if (!c->threads || open_scratch(c)) {
        cpu_close(&c->base);
        return cv_fail(e, CV_E_MEMORY, "no memory for the CPU backend's scratch (%zu tokens a step)", shape->max_tokens);
    }
    *out = &c->base;
    return CV_OK;
}
