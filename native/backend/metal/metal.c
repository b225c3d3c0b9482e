/* metal.c — the Metal backend's operations (backend.h) as dispatches of the kernels in kernels/.
 *
 * A step of at most CV_FEW tokens goes through matrix-vector kernels, which read each weight once for up to eight rows and fuse
 * norms, experts and sums: 7 dispatches a layer, 8 where a long context is split. Longer steps go through tiles with simdgroup
 * matrices. The residual stream and logits are float32; everything between is of the cache's type (float32 with `exact`).
 *
 * Nothing is allocated in a step once every weight has been used: scratch and tables are fixed, but for the step's page
 * table, which grows by doubling.
 */
#include "metal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"
#include "kernels/params.h"

enum { FIRST_PAGES = 1 << 14, ROW_THREADS = 256 };

/* Tables of the running step, written by the host in begin. */
typedef struct {
    cv_token *tokens;      /* [max_tokens] */
    float *cosines, *sines; /* [max_tokens, head_dim/2] */
    cv_tile *tiles[2];     /* [max_tokens], by pool */
    size_t n_tiles[2], n_parts[2]; /* parts: most that a query's keys are split into */
    uint32_t *pages;       /* page lists of all sequences and pools */
    size_t room_pages, n_pages;
    uint32_t *rows;        /* [max_logits] rows whose logits are wanted */
} step_tables;

typedef struct {
    cv_backend base;
    cv_metal_device *d;
    const cv_batch *batch;
    const char *type;     /* suffix of kernels: f32, f16, bf16 */
    size_t element;       /* its bytes */
    step_tables step;
    void *normed;         /* typed [max(max_tokens, max_logits), hidden] */
    void *act;            /* typed: hidden activations of MLP, or of chosen experts and shared expert */
    float *parts;         /* of split attention */
    float *zeros;         /* [max(max_ff, hidden, heads * d)]: for a bias that is not there */
    float *router_logits; /* [max_tokens, experts] */
    const float *ffn_norm; /* of norm_route, with its input: moe_up normalises again what it reads */
    const void *ffn_in;
    void *expert_act;     /* typed [max_tokens * K, max_ff] */
    float *expert_out, *shared_out, *row_score;
    uint32_t *row_token, *place, *n_expert_tiles;
    cv_expert_tile *expert_tiles;
} metal;

static metal *self(cv_backend *b) { return (metal *)b; }
static size_t most(size_t a, size_t b) { return a > b ? a : b; }
static size_t least(size_t a, size_t b) { return a < b ? a : b; }
static size_t cut(size_t n, size_t unit) { return (n + unit - 1) / unit; }

static int metal_alloc(cv_backend *b, size_t bytes, void **out) { return cv_metal_alloc(self(b)->d, bytes, out, (cv_err){NULL, 0}); }
static void metal_free(cv_backend *b, void *p) { cv_metal_free(self(b)->d, p); }

/* ---- describing weights to kernels ---- */

static cv_metal_constants no_constants(void) {
    cv_metal_constants c;
    memset(&c, 0, sizeof c);
    return c;
}

/* Formats of weights A, B, … of a kernel. */
static cv_metal_constants formats_of(const cv_weight *const w[], size_t n) {
    cv_metal_constants c = no_constants();
    c.same_formats = true;
    for (size_t i = 0; i < n; i++) {
        const uint32_t f[4] = {w[i]->format, w[i]->bits, w[i]->group, w[i]->scale_type};
        memcpy(&c.formats[4 * i], f, sizeof f);
        c.same_formats = c.same_formats && !memcmp(c.formats, f, sizeof f);
    }
    return c;
}

static cv_matrix matrix_of(const cv_weight *w) {
    return (cv_matrix){.row_bytes = w->row_bytes, .expert_bytes = w->expert_bytes, .scale_row_bytes = w->scale_row_bytes, .expert_scale_bytes = w->expert_scale_bytes,
                       .rows = (uint32_t)w->rows, .cols = (uint32_t)w->cols, .has_global = w->global_scale != NULL};
}

static size_t bytes_of_row(const cv_weight *w) {
    switch (w->format) {
    case CV_FORMAT_F32: return w->cols * 4;
    case CV_FORMAT_F16:
    case CV_FORMAT_BF16: return w->cols * 2;
    case CV_FORMAT_AFFINE: return w->cols * w->bits / 8;
    case CV_FORMAT_MXFP8: return w->cols;
    default: return w->cols / 2;
    }
}

static size_t scale_bytes(uint32_t type) { return type == CV_F32 ? 4 : type == CV_F16 || type == CV_BF16 ? 2 : 1; }

/* Data, scales, and biases or global scales at three indices. */
static void bind_weight(metal *m, unsigned index, const cv_weight *w) {
    size_t row = bytes_of_row(w), e = w->experts - 1, r = w->rows - 1;
    if (w->cols % 16) cv_metal_refuse(m->d, CV_E_UNSUPPORTED, "the Metal kernels need matrices whose number of columns 16 divides");
    cv_metal_bind(m->d, index, w->data, e * w->expert_bytes + r * w->row_bytes + row);
    if (w->format < CV_FORMAT_AFFINE) {
        cv_metal_bind(m->d, index + 1, m->zeros, 4);
        cv_metal_bind(m->d, index + 2, m->zeros, 4);
        return;
    }
    size_t scales = e * w->expert_scale_bytes + r * w->scale_row_bytes + w->cols / w->group * scale_bytes(w->scale_type);
    cv_metal_bind(m->d, index + 1, w->scales, scales);
    if (w->format == CV_FORMAT_AFFINE) cv_metal_bind(m->d, index + 2, w->biases, scales);
    else if (w->global_scale) cv_metal_bind(m->d, index + 2, w->global_scale, w->experts * sizeof(float));
    else cv_metal_bind(m->d, index + 2, m->zeros, 4);
}

/* NULL: zeros, as many as any matrix has rows. */
static void bind_floats(metal *m, unsigned index, const float *p, size_t n) { cv_metal_bind(m->d, index, p ? p : m->zeros, (p ? n : 1) * sizeof(float)); }
static void bind_rows(metal *m, unsigned index, const void *p) { cv_metal_bind(m->d, index, p, 1); } /* memory of metal_alloc */

static void dispatch(metal *m, size_t x, size_t y, size_t z, size_t threads, double work) {
    const size_t groups[3] = {x, y, z};
    cv_metal_dispatch(m->d, groups, threads, work);
}

/* use(m, constants, "matvec", n): kernel matvec_<type>_<n>; n = 0: without a number. */
static void use(metal *m, const cv_metal_constants *c, const char *kernel, size_t n) {
    char name[48];
    if (n) snprintf(name, sizeof name, "%s_%s_%zu", kernel, m->type, n);
    else snprintf(name, sizeof name, "%s_%s", kernel, m->type);
    cv_metal_use(m->d, name, c);
}

static double work_of(const cv_weight *w, size_t n) { return (double)w->rows * (double)w->cols * (double)n; }

/* ---- products ---- */

/* Up to three matrices over the same few rows. */
typedef struct {
    const cv_weight *w[3];
    const float *bias[3];
    void *out[3];
    size_t n_parts, n;
    const void *in;
    const float *norm;         /* NULL: the input is not normalised */
    const uint32_t *row_index; /* NULL: rows 0 … n-1 */
    uint32_t output;           /* CV_OUT_* */
} product;

static void matvec(metal *m, const product *p) {
    size_t inputs = p->n == 1 ? 1 : p->n == 2 ? 2 : p->n <= 4 ? 4 : 8, rows = (inputs <= 2 ? 4 : 2) * CV_MATVEC_SIMDGROUPS, blocks = 0;
    cv_metal_constants c = formats_of(p->w, p->n_parts);
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
        bind_weight(m, (unsigned)(3 * i), w);
        bind_rows(m, (unsigned)(11 + i), p->out[part]);
        bind_floats(m, (unsigned)(14 + i), p->bias[part], w->rows);
        params.m[i] = matrix_of(w);
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

/* Many rows of typed input: one matrix, or gate and up joined, of one or of the chosen experts. */
typedef struct {
    const cv_weight *a, *b; /* b: up, a: gate */
    const float *bias_a, *bias_b;
    const void *in;
    void *out;
    size_t n;         /* rows */
    uint32_t output;  /* CV_OUT_* */
    uint32_t experts; /* as CV_FC_EXPERTS */
} tiled_product;

static void matmul(metal *m, const tiled_product *p) {
    const cv_shape *s = m->base.shape;
    const cv_weight *const w[2] = {p->a, p->b ? p->b : p->a};
    cv_metal_constants c = formats_of(w, 2);
    c.output = p->output;
    c.swiglu = p->b != NULL;
    c.experts = p->experts;
    c.bias = p->bias_a || p->bias_b;
    use(m, &c, "matmul", 0);
    cv_matmul_params params = {.a = matrix_of(w[0]), .b = matrix_of(w[1]), .n = (uint32_t)p->n};
    bind_weight(m, 0, w[0]);
    bind_weight(m, 3, w[1]);
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

/* normed[i] = RMSNorm(h[rows[i]]) */
static void normalise(metal *m, const void *h, const float *norm, size_t n, const uint32_t *rows) {
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

static int linear_of(metal *m, const void *in, const cv_weight *w, const float *bias, size_t n, uint32_t output, void *out) {
    if (n <= CV_FEW) matvec(m, &(product){.w = {w}, .bias = {bias}, .out = {out}, .n_parts = 1, .n = n, .in = in, .output = output});
    else matmul(m, &(tiled_product){.a = w, .bias_a = bias, .in = in, .out = out, .n = n, .output = output});
    return cv_metal_failed(m->d);
}

/* ---- a step ---- */

static int grow_pages(metal *m, size_t n) {
    step_tables *s = &m->step;
    if (n <= s->room_pages) return CV_OK;
    size_t room = s->room_pages ? s->room_pages : FIRST_PAGES;
    while (room < n) room *= 2;
    void *pages;
    int code = cv_metal_alloc(m->d, room * sizeof *s->pages, &pages, (cv_err){NULL, 0});
    if (code) return code;
    cv_metal_free(m->d, s->pages);
    s->pages = pages;
    s->room_pages = room;
    return CV_OK;
}

/* As the kernel's keys_of_part. */
static size_t parts_of(size_t keys) {
    size_t blocks = cut(keys, CV_ATTN_SPLIT_KEYS), size = CV_ATTN_SPLIT_KEYS * cut(blocks, CV_ATTN_SPLITS);
    return cut(keys, size);
}

/* The angle is the float32 product of position and frequency, as in the CPU backend. */
static void fill_token(metal *m, size_t t, const uint32_t first_page[2]) {
    const cv_shape *s = m->base.shape;
    const cv_batch *b = m->batch;
    const cv_seq *seq = &b->seqs[b->token_seq[t]];
    uint64_t position = b->positions[t], start = s->chunk ? position / s->chunk * s->chunk : 0;
    cv_token *token = &m->step.tokens[t];
    *token = (cv_token){.id = b->tokens[t], .temperature = 1, .first_page = {first_page[0], first_page[1]}, .keys = {(uint32_t)(position + 1), (uint32_t)(position - start + 1)}};
    if (s->chunk && start >= seq->chunk_base) token->first_page[1] += (uint32_t)((start - seq->chunk_base) / s->page_tokens);
    if (s->floor_scale > 0) token->temperature = (float)(1.0 + (double)s->attn_scale * log(1.0 + floor(((double)position + 1.0) / (double)s->floor_scale)));
    size_t half = s->head_dim / 2;
    for (size_t j = 0; j < half; j++) {
        float angle = (float)position * s->inv_freq[j];
        m->step.cosines[t * half + j] = (float)cos((double)angle);
        m->step.sines[t * half + j] = (float)sin((double)angle);
    }
    for (size_t pool = 0; pool < 2; pool++) {
        step_tables *tables = &m->step;
        tables->n_parts[pool] = most(tables->n_parts[pool], parts_of(token->keys[pool]));
        cv_tile *last = tables->n_tiles[pool] ? &tables->tiles[pool][tables->n_tiles[pool] - 1] : NULL;
        bool follows = t > 0 && last && b->token_seq[t - 1] == b->token_seq[t] && last->n < CV_ATTN_TILE && token->keys[pool] == m->step.tokens[t - 1].keys[pool] + 1;
        if (follows) last->n++;
        else tables->tiles[pool][tables->n_tiles[pool]++] = (cv_tile){(uint32_t)t, 1};
    }
}

/* Never fails by itself: what is wrong is said by the operations after it and, in words, by finish. */
static int metal_begin(cv_backend *b, const cv_batch *batch) {
    metal *m = self(b);
    step_tables *s = &m->step;
    m->batch = batch;
    if (cv_metal_begin(m->d)) return CV_OK;
    size_t n = 0;
    for (size_t i = 0; i < batch->n_seqs; i++) {
        n += batch->seqs[i].n_full_pages + batch->seqs[i].n_chunk_pages;
        if (batch->seqs[i].first_position + batch->seqs[i].n_tokens > UINT32_MAX) cv_metal_refuse(m->d, CV_E_UNSUPPORTED, "the Metal kernels count positions with 32 bits");
    }
    if (grow_pages(m, most(n, 1))) cv_metal_refuse(m->d, CV_E_MEMORY, "no memory for the step's page table");
    if (cv_metal_failed(m->d)) return CV_OK;
    s->n_pages = 0;
    memset(s->n_tiles, 0, sizeof s->n_tiles);
    memset(s->n_parts, 0, sizeof s->n_parts);
    for (size_t i = 0; i < batch->n_seqs; i++) {
        const cv_seq *seq = &batch->seqs[i];
        const uint32_t first[2] = {(uint32_t)s->n_pages, (uint32_t)(s->n_pages + seq->n_full_pages)};
        memcpy(s->pages + s->n_pages, seq->full_pages, seq->n_full_pages * sizeof *s->pages);
        memcpy(s->pages + first[1], seq->chunk_pages, seq->n_chunk_pages * sizeof *s->pages);
        s->n_pages += seq->n_full_pages + seq->n_chunk_pages;
        for (size_t t = seq->first_token; t < seq->first_token + seq->n_tokens; t++) fill_token(m, t, first);
    }
    return CV_OK;
}

static int metal_finish(cv_backend *b, char *err, size_t err_size) {
    metal *m = self(b);
    m->batch = NULL;
    return cv_metal_finish(m->d, (cv_err){err, err_size});
}

static int metal_sync(cv_backend *b) { return cv_metal_sync(self(b)->d); }

/* ---- operations ---- */

static int metal_embed(cv_backend *b, const cv_weight *table, void *h) {
    metal *m = self(b);
    size_t n = m->batch->n_tokens;
    cv_metal_constants c = formats_of(&table, 1);
    cv_matmul_params params = {.a = matrix_of(table), .n = (uint32_t)n};
    cv_metal_use(m->d, "embed", &c);
    bind_weight(m, 0, table);
    bind_rows(m, 3, m->step.tokens);
    bind_rows(m, 4, h);
    cv_metal_bytes(m->d, 5, &params, sizeof params);
    dispatch(m, cut(table->cols / 16, 32), n, 1, 32, 0);
    return cv_metal_failed(m->d);
}

static int metal_norm_qkv(cv_backend *b, const void *h, const float *norm, const cv_weight *const w[3], const float *const bias[3], void *q, void *k, void *v) {
    metal *m = self(b);
    size_t n = m->batch->n_tokens;
    void *out[3] = {q, k, v};
    if (n <= CV_FEW) {
        matvec(m, &(product){.w = {w[0], w[1], w[2]}, .bias = {bias[0], bias[1], bias[2]}, .out = {q, k, v}, .n_parts = 3, .n = n, .in = h, .norm = norm, .output = CV_OUT_TYPED});
        return cv_metal_failed(m->d);
    }
    normalise(m, h, norm, n, NULL);
    for (size_t i = 0; i < 3; i++) matmul(m, &(tiled_product){.a = w[i], .bias_a = bias[i], .in = m->normed, .out = out[i], .n = n, .output = CV_OUT_TYPED});
    return cv_metal_failed(m->d);
}

static cv_attention_params attention_of(const metal *m, uint32_t flags, size_t n_heads, size_t n_kv_heads, const cv_kv_layer *kv) {
    const cv_shape *s = m->base.shape;
    return (cv_attention_params){.page_stride = kv->page_stride, .head_stride = kv->head_stride, .n_tokens = (uint32_t)m->batch->n_tokens, .n_heads = (uint32_t)n_heads, .n_kv_heads = (uint32_t)n_kv_heads,
                                 .page_tokens = (uint32_t)s->page_tokens, .pool = flags & CV_LAYER_CHUNKED ? 1 : 0, .n_splits = 1, .group = (uint32_t)(n_heads / n_kv_heads), .head_dim = (uint32_t)s->head_dim,
                                 .interleaved = s->rope_interleaved, .scale = 1.0f / sqrtf((float)s->head_dim), .qk_norm_eps = s->qk_norm_eps};
}

static int metal_rope_store(cv_backend *b, uint32_t flags, size_t n_heads, size_t n_kv_heads, void *q, void *k, void *v, const cv_kv_layer *kv) {
    enum { SIMDGROUPS = 4 };
    metal *m = self(b);
    cv_metal_constants c = no_constants();
    cv_attention_params params = attention_of(m, flags, n_heads, n_kv_heads, kv);
    c.layer = flags & (CV_LAYER_ROPE | CV_LAYER_QK_NORM | CV_LAYER_TEMPERATURE);
    use(m, &c, "rope_store", 0);
    bind_rows(m, 0, q);
    bind_rows(m, 1, k);
    bind_rows(m, 2, v);
    bind_rows(m, 3, kv->k);
    bind_rows(m, 4, kv->v);
    bind_rows(m, 5, m->step.tokens);
    bind_rows(m, 6, m->step.pages);
    bind_rows(m, 7, m->step.cosines);
    bind_rows(m, 8, m->step.sines);
    cv_metal_bytes(m->d, 9, &params, sizeof params);
    dispatch(m, cut(n_heads + 2 * n_kv_heads, SIMDGROUPS), m->batch->n_tokens, 1, SIMDGROUPS * 32, 0);
    return cv_metal_failed(m->d);
}

static void attend_few(metal *m, cv_attention_params *params, const void *q, const cv_kv_layer *kv, void *out) {
    const cv_shape *s = m->base.shape;
    cv_metal_constants c = no_constants();
    size_t n = m->batch->n_tokens;
    params->n_splits = (uint32_t)m->step.n_parts[params->pool];
    use(m, &c, "attention_decode", s->head_dim);
    bind_rows(m, 0, q);
    bind_rows(m, 1, kv->k);
    bind_rows(m, 2, kv->v);
    bind_rows(m, 3, out);
    bind_rows(m, 4, m->parts);
    bind_rows(m, 5, m->step.tokens);
    bind_rows(m, 6, m->step.pages);
    cv_metal_bytes(m->d, 7, params, sizeof *params);
    dispatch(m, params->n_kv_heads * cut(params->group, CV_ATTN_GROUP), n, params->n_splits, CV_ATTN_SIMDGROUPS * 32, 0);
    if (params->n_splits == 1) return;
    use(m, &c, "attention_join", s->head_dim);
    bind_rows(m, 0, m->parts);
    bind_rows(m, 1, out);
    bind_rows(m, 2, m->step.tokens);
    cv_metal_bytes(m->d, 3, params, sizeof *params);
    dispatch(m, params->n_heads, n, 1, 32, 0);
}

static int metal_attention(cv_backend *b, uint32_t flags, size_t n_heads, size_t n_kv_heads, const void *q, const cv_kv_layer *kv, void *out) {
    metal *m = self(b);
    cv_attention_params params = attention_of(m, flags, n_heads, n_kv_heads, kv);
    size_t n = m->batch->n_tokens, tiles = m->step.n_tiles[params.pool];
    if (n <= CV_FEW) {
        attend_few(m, &params, q, kv, out);
        return cv_metal_failed(m->d);
    }
    cv_metal_constants c = no_constants();
    use(m, &c, "attention_prefill", b->shape->head_dim);
    bind_rows(m, 0, q);
    bind_rows(m, 1, kv->k);
    bind_rows(m, 2, kv->v);
    bind_rows(m, 3, out);
    bind_rows(m, 4, m->step.tiles[params.pool]);
    bind_rows(m, 5, m->step.tokens);
    bind_rows(m, 6, m->step.pages);
    cv_metal_bytes(m->d, 7, &params, sizeof params);
    double keys = 0;
    for (size_t t = 0; t < n; t++) keys += m->step.tokens[t].keys[params.pool];
    dispatch(m, tiles, n_heads, 1, 128, 2 * keys * (double)(n_heads * b->shape->head_dim));
    return cv_metal_failed(m->d);
}

static int metal_linear(cv_backend *b, const void *x, const cv_weight *w, const float *bias, bool accumulate, void *h) {
    return linear_of(self(b), x, w, bias, self(b)->batch->n_tokens, accumulate ? CV_OUT_ADD : CV_OUT_FLOAT, h);
}

static int metal_norm_mlp(cv_backend *b, const void *h, const float *norm, const cv_weight *gate, const cv_weight *up, const cv_weight *down, const float *gate_bias, const float *up_bias, void **act) {
    (void)down;
    metal *m = self(b);
    size_t n = m->batch->n_tokens;
    *act = m->act;
    if (n > CV_FEW) {
        normalise(m, h, norm, n, NULL);
        matmul(m, &(tiled_product){.a = gate, .b = up, .bias_a = gate_bias, .bias_b = up_bias, .in = m->normed, .out = m->act, .n = n, .output = CV_OUT_TYPED});
        return cv_metal_failed(m->d);
    }
    enum { ROWS = 2 * CV_MATVEC_SIMDGROUPS };
    const cv_weight *const w[2] = {gate, up};
    size_t inputs = n == 1 ? 1 : n == 2 ? 2 : n <= 4 ? 4 : 8;
    cv_metal_constants c = formats_of(w, 2);
    cv_up_params params = {.gate = matrix_of(gate), .up = matrix_of(up), .n = (uint32_t)n, .eps = b->shape->norm_eps};
    c.bias = gate_bias || up_bias;
    use(m, &c, "matvec_up", inputs);
    bind_weight(m, 0, gate);
    bind_weight(m, 3, up);
    bind_rows(m, 6, h);
    bind_floats(m, 7, norm, b->shape->hidden);
    bind_rows(m, 8, m->act);
    bind_floats(m, 9, gate_bias, gate->rows);
    bind_floats(m, 10, up_bias, up->rows);
    cv_metal_bytes(m->d, 11, &params, sizeof params);
    dispatch(m, cut(gate->rows, ROWS), cut(n, inputs), 1, CV_MATVEC_SIMDGROUPS * 32, 2 * work_of(gate, n));
    return cv_metal_failed(m->d);
}

/* The router's product is the same kernel for any number of tokens: a prompt chooses the experts that decoding would. */
static int metal_norm_route(cv_backend *b, const void *h, const float *norm, const cv_weight *router) {
    metal *m = self(b);
    const cv_shape *s = b->shape;
    size_t n = m->batch->n_tokens;
    m->ffn_norm = norm;
    m->ffn_in = h;
    matvec(m, &(product){.w = {router}, .out = {m->router_logits}, .n_parts = 1, .n = n, .in = h, .norm = norm, .output = CV_OUT_FLOAT});
    if (n <= CV_FEW) return cv_metal_failed(m->d);
    normalise(m, h, norm, n, NULL);
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

static int up_few(metal *m, const cv_moe_weights *w) {
    enum { ROWS = 2 * CV_MATVEC_SIMDGROUPS };
    const cv_shape *s = m->base.shape;
    const cv_weight *const all[4] = {w->gate, w->up, w->shared_gate, w->shared_up};
    size_t n = m->batch->n_tokens, inputs = n == 1 ? 1 : CV_MATVEC_INPUTS, k = s->experts_per_token, experts = least(n * k, s->n_experts);
    cv_metal_constants c = formats_of(all, 4);
    cv_up_params params = {.gate = matrix_of(w->gate), .up = matrix_of(w->up), .shared_gate = matrix_of(w->shared_gate), .shared_up = matrix_of(w->shared_up),
                           .n = (uint32_t)n, .n_experts = (uint32_t)s->n_experts, .chosen = (uint32_t)k, .eps = s->norm_eps};
    use(m, &c, "experts_up", inputs);
    for (unsigned i = 0; i < 4; i++) bind_weight(m, 3 * i, all[i]);
    bind_rows(m, 12, m->ffn_in);
    bind_floats(m, 13, m->ffn_norm, s->hidden);
    bind_rows(m, 14, m->router_logits);
    bind_rows(m, 15, m->act);
    cv_metal_bytes(m->d, 16, &params, sizeof params);
    dispatch(m, cut(most(w->gate->rows, w->shared_gate->rows), ROWS), 1, experts + cut(n, inputs), CV_MATVEC_SIMDGROUPS * 32, 2 * (work_of(w->gate, n * k) + work_of(w->shared_gate, n)));
    return cv_metal_failed(m->d);
}

static int metal_moe_up(cv_backend *b, const cv_moe_weights *w) {
    metal *m = self(b);
    size_t n = m->batch->n_tokens;
    if (n <= CV_FEW) return up_few(m, w);
    matmul(m, &(tiled_product){.a = w->gate, .b = w->up, .in = m->normed, .out = m->expert_act, .n = n * b->shape->experts_per_token, .output = CV_OUT_TYPED, .experts = 1});
    matmul(m, &(tiled_product){.a = w->shared_gate, .b = w->shared_up, .in = m->normed, .out = m->act, .n = n, .output = CV_OUT_TYPED});
    return cv_metal_failed(m->d);
}

static int down_few(metal *m, const cv_moe_weights *w, bool accumulate, void *h) {
    const cv_shape *s = m->base.shape;
    const cv_weight *const all[2] = {w->down, w->shared_down};
    size_t n = m->batch->n_tokens, inputs = n == 1 ? 1 : CV_MATVEC_INPUTS, rows = (n == 1 ? 4 : 2) * CV_MATVEC_SIMDGROUPS;
    cv_metal_constants c = formats_of(all, 2);
    cv_down_params params = {.down = matrix_of(w->down), .shared_down = matrix_of(w->shared_down), .n = (uint32_t)n, .n_experts = (uint32_t)s->n_experts, .chosen = (uint32_t)s->experts_per_token, .add = accumulate};
    use(m, &c, "experts_down", inputs);
    bind_weight(m, 0, w->down);
    bind_weight(m, 3, w->shared_down);
    bind_rows(m, 6, m->act);
    bind_rows(m, 7, m->router_logits);
    bind_rows(m, 8, h);
    cv_metal_bytes(m->d, 9, &params, sizeof params);
    dispatch(m, cut(s->hidden, rows), 1, 1, CV_MATVEC_SIMDGROUPS * 32, work_of(w->down, n * s->experts_per_token) + work_of(w->shared_down, n));
    return cv_metal_failed(m->d);
}

static int metal_moe_down(cv_backend *b, const cv_moe_weights *w, bool accumulate, void *h) {
    metal *m = self(b);
    const cv_shape *s = b->shape;
    size_t n = m->batch->n_tokens;
    if (n <= CV_FEW) return down_few(m, w, accumulate, h);
    matmul(m, &(tiled_product){.a = w->down, .in = m->expert_act, .out = m->expert_out, .n = n * s->experts_per_token, .output = CV_OUT_FLOAT, .experts = 2});
    matmul(m, &(tiled_product){.a = w->shared_down, .in = m->act, .out = m->shared_out, .n = n, .output = CV_OUT_FLOAT});
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

static int metal_head(cv_backend *b, const void *h, const uint32_t *rows, size_t n_rows, const float *norm, const cv_weight *head, float *logits) {
    metal *m = self(b);
    memcpy(m->step.rows, rows, n_rows * sizeof *rows);
    if (n_rows <= CV_FEW) {
        matvec(m, &(product){.w = {head}, .out = {logits}, .n_parts = 1, .n = n_rows, .in = h, .norm = norm, .row_index = m->step.rows, .output = CV_OUT_FLOAT});
        return cv_metal_failed(m->d);
    }
    normalise(m, h, norm, n_rows, m->step.rows);
    matmul(m, &(tiled_product){.a = head, .in = m->normed, .out = logits, .n = n_rows, .output = CV_OUT_FLOAT});
    return cv_metal_failed(m->d);
}

/* ---- life ---- */

static void metal_close(cv_backend *b) {
    if (!b) return;
    cv_metal_device_close(self(b)->d); /* with all memory of cv_metal_alloc */
    free(b);
}

static int check_shape(const cv_shape *s, cv_err err) {
    if (s->head_dim != 16 && s->head_dim != 32 && s->head_dim != 64 && s->head_dim != 128)
        return cv_fail(err, CV_E_UNSUPPORTED, "head_dim %zu: the Metal kernels have 16, 32, 64 and 128", s->head_dim);
    if (s->kv_type == CV_Q8) return cv_fail(err, CV_E_UNSUPPORTED, "the Metal kernels have no 8-bit cache: use 16 bits");
    if (s->exact && s->kv_type != CV_F32) return cv_fail(err, CV_E_UNSUPPORTED, "exact computing on Metal needs a float32 cache");
    if (s->n_experts > CV_MOST_EXPERTS || s->experts_per_token > CV_MOST_CHOSEN)
        return cv_fail(err, CV_E_UNSUPPORTED, "%zu experts of which %zu are chosen: the Metal kernels have at most %d and %d", s->n_experts, s->experts_per_token, CV_MOST_EXPERTS, CV_MOST_CHOSEN);
    return CV_OK;
}

typedef struct {
    void **out;
    size_t rows, row_bytes;
} scratch;

static int open_scratch(metal *m, cv_err err) {
    const cv_shape *s = m->base.shape;
    size_t n = s->max_tokens, e = m->element, k = s->experts_per_token, pairs = s->n_experts ? n * k : 0, half = s->head_dim / 2, rows = most(n, s->max_logits);
    size_t widest = most(most(s->max_ff, s->hidden), s->max_heads * s->head_dim);
    step_tables *t = &m->step;
    const scratch all[] = {
        {(void **)&t->tokens, n, sizeof(cv_token)}, {(void **)&t->cosines, n, half * sizeof(float)}, {(void **)&t->sines, n, half * sizeof(float)}, {(void **)&t->tiles[0], n, sizeof(cv_tile)},
        {(void **)&t->tiles[1], n, sizeof(cv_tile)}, {(void **)&t->rows, s->max_logits, sizeof(uint32_t)}, {&m->normed, rows, s->hidden * e}, {(void **)&m->zeros, widest, sizeof(float)},
        /* few tokens: hidden activations of all chosen experts and of the shared one, side by side */
        {&m->act, most(n, CV_FEW * (k + 1)), s->max_ff * e}, {(void **)&m->parts, CV_FEW * s->max_heads * CV_ATTN_SPLITS, (s->head_dim + 2) * sizeof(float)},
        {(void **)&m->router_logits, s->n_experts ? n : 0, s->n_experts * sizeof(float)}, {&m->expert_act, pairs, s->max_ff * e}, {(void **)&m->expert_out, pairs, s->hidden * sizeof(float)},
        {(void **)&m->shared_out, pairs ? n : 0, s->hidden * sizeof(float)}, {(void **)&m->row_score, pairs, sizeof(float)}, {(void **)&m->row_token, pairs, sizeof(uint32_t)},
        {(void **)&m->place, pairs, sizeof(uint32_t)}, {(void **)&m->n_expert_tiles, 1, sizeof(uint32_t)},
        {(void **)&m->expert_tiles, pairs / CV_MATMUL_TOKENS + s->n_experts + 1, sizeof(cv_expert_tile)},
    };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        if (all[i].row_bytes && all[i].rows > SIZE_MAX / 2 / all[i].row_bytes) return cv_fail(err, CV_E_MEMORY, "a step of %zu tokens is too large", n);
        int code = cv_metal_alloc(m->d, all[i].rows * all[i].row_bytes, all[i].out, err);
        if (code) return code;
    }
    return grow_pages(m, FIRST_PAGES) ? cv_fail(err, CV_E_MEMORY, "no memory for page tables") : CV_OK;
}

int cv_backend_metal_open(const cv_shape *shape, const cv_memory *shared, size_t n_shared, cv_backend **out, char *text, size_t text_size) {
    static const cv_backend_ops ops = {
        .name = "metal", .close = metal_close, .alloc = metal_alloc, .free = metal_free, .begin = metal_begin, .finish = metal_finish, .sync = metal_sync, .embed = metal_embed, .norm_qkv = metal_norm_qkv,
        .rope_store = metal_rope_store, .attention = metal_attention, .linear = metal_linear, .norm_mlp = metal_norm_mlp, .norm_route = metal_norm_route, .moe_up = metal_moe_up,
        .moe_down = metal_moe_down, .head = metal_head,
    };
    cv_err err = {text, text_size};
    int code = check_shape(shape, err);
    if (code) return code;
    metal *m = calloc(1, sizeof *m);
    if (!m) return cv_fail(err, CV_E_MEMORY, "no memory for the Metal backend");
    m->type = shape->kv_type == CV_F32 ? "f32" : shape->kv_type == CV_F16 ? "f16" : "bf16";
    m->element = cv_kv_element_bytes(shape->kv_type);
    m->base = (cv_backend){.ops = &ops, .shape = shape, .act_bytes = sizeof(float)};
    code = cv_metal_device_open(&m->d, err);
    if (!code) code = cv_metal_share_all(m->d, shared, n_shared, err);
    if (!code) code = open_scratch(m, err);
    if (!code) cv_metal_make_resident(m->d);
    if (code) {
        metal_close(&m->base);
        return code;
    }
    *out = &m->base;
    return CV_OK;
}
