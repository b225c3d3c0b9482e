/* operations.h — inside of the Metal backend: its state, and what the files with its operations share. */
#ifndef CV_METAL_OPERATIONS_H
#define CV_METAL_OPERATIONS_H

#include <stdio.h>
#include <string.h>

#include "device.h"
#include "kernels/params.h"
#include "metal.h"

enum { CV_METAL_FIRST_PAGES = 1 << 14 /* room of the page table when it is made */ };
/* Tables of the running step, written by the host in begin. */
typedef struct {
    cv_token *tokens;      /* [max_tokens] */
    float *cosines, *sines; /* [max_tokens, head_dim/2] */
    cv_tile *tiles[2];     /* [max_tokens], by pool */
    size_t n_tiles[2], n_parts[2]; /* parts: most that a query's keys are split into */
    uint32_t *pages;       /* page lists of all sequences and pools */
    size_t room_pages, n_pages;
    uint32_t *rows;        /* [max_logits] rows whose logits are wanted */
} cv_metal_tables;

typedef struct {
    cv_backend base;
    cv_metal_device *d;
    const cv_batch *batch;
    const char *type;     /* suffix of kernels: f32, f16, bf16 */
    size_t element;       /* its bytes */
    cv_metal_tables step;
    void *normed;         /* typed [max(max_tokens, max_logits), hidden] */
    void *act;            /* typed: hidden activations of MLP, or of chosen experts and shared expert */
    float *parts;         /* of split attention */
    float *zeros;         /* [max(max_ff, hidden, heads * d)]: for a bias that is not there */
    float *router_logits; /* [max_tokens, experts] */
    void *expert_act;     /* typed [max_tokens * K, max_ff] */
    float *expert_out, *shared_out, *row_score;
    uint32_t *row_token, *place, *n_expert_tiles;
    cv_expert_tile *expert_tiles;
} cv_metal;

static inline cv_metal *self(cv_backend *b) { return (cv_metal *)b; }
static inline size_t most(size_t a, size_t b) { return a > b ? a : b; }
static inline size_t least(size_t a, size_t b) { return a < b ? a : b; }
static inline size_t cut(size_t n, size_t unit) { return (n + unit - 1) / unit; }

/* ---- arguments.c: weights and rows as a kernel's arguments ---- */

static inline cv_metal_constants no_constants(void) {
    cv_metal_constants c;
    memset(&c, 0, sizeof c);
    return c;
}

/* Formats of weights A, B, … of a kernel. */
cv_metal_constants cv_metal_formats(const cv_weight *const w[], size_t n);
cv_matrix cv_metal_matrix(const cv_weight *w);
/* Data, scales, and biases or global scales at three indices. */
void cv_metal_bind_weight(cv_metal *m, unsigned index, const cv_weight *w);

/* NULL: zeros, as many as any matrix has rows. */
static inline void bind_floats(cv_metal *m, unsigned index, const float *p, size_t n) { cv_metal_bind(m->d, index, p ? p : m->zeros, (p ? n : 1) * sizeof(float)); }
static inline void bind_rows(cv_metal *m, unsigned index, const void *p) { cv_metal_bind(m->d, index, p, 1); } /* memory of metal_alloc */

static inline void dispatch(cv_metal *m, size_t x, size_t y, size_t z, size_t threads, double work) {
    const size_t groups[3] = {x, y, z};
    cv_metal_dispatch(m->d, groups, threads, work);
}

/* use(m, constants, "matvec", n): kernel matvec_<type>_<n>; n = 0: without a number. */
static inline void use(cv_metal *m, const cv_metal_constants *c, const char *kernel, size_t n) {
    char name[48];
    if (n) snprintf(name, sizeof name, "%s_%s_%zu", kernel, m->type, n);
    else snprintf(name, sizeof name, "%s_%s", kernel, m->type);
    cv_metal_use(m->d, name, c);
}

static inline double work_of(const cv_weight *w, size_t n) { return (double)w->rows * (double)w->cols * (double)n; }

/* ---- products.c ---- */
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
} cv_metal_product;

/* Many rows of typed input: one matrix, or gate and up joined, of one or of the chosen experts. */
typedef struct {
    const cv_weight *a, *b; /* b: up, a: gate */
    const float *bias_a, *bias_b;
    const void *in;
    void *out;
    size_t n;         /* rows */
    uint32_t output;  /* CV_OUT_* */
    uint32_t experts; /* as CV_FC_EXPERTS */
} cv_metal_tiles;

void cv_metal_matvec(cv_metal *m, const cv_metal_product *p);
void cv_metal_matmul(cv_metal *m, const cv_metal_tiles *p);
/* normed[i] = RMSNorm(h[rows[i]]) */
void cv_metal_normalise(cv_metal *m, const void *h, const float *norm, size_t n, const uint32_t *rows);

/* ---- step.c ---- */

/* Room for n entries in the step's page table. */
int cv_metal_grow_pages(cv_metal *m, size_t n);

/* ---- the operations of backend.h ---- */

int cv_metal_op_begin(cv_backend *b, const cv_batch *batch);
int cv_metal_op_finish(cv_backend *b, char *err, size_t err_size);
int cv_metal_op_join(cv_backend *b, const cv_host_work *work, float *x, size_t n);
int cv_metal_op_embed(cv_backend *b, const cv_weight *table, void *h);
int cv_metal_op_norm_qkv(cv_backend *b, const void *h, const float *norm, const cv_weight *const w[3], const float *const bias[3], void *q, void *k, void *v);
int cv_metal_op_rope_store(cv_backend *b, uint32_t flags, size_t n_heads, size_t n_kv_heads, void *q, void *k, void *v, const cv_kv_layer *kv);
int cv_metal_op_attention(cv_backend *b, uint32_t flags, size_t n_heads, size_t n_kv_heads, const void *q, const cv_kv_layer *kv, void *out);
int cv_metal_op_linear(cv_backend *b, const void *x, const cv_weight *w, const float *bias, bool accumulate, void *h);
int cv_metal_op_norm_mlp(cv_backend *b, const void *h, const float *norm, const cv_weight *gate, const cv_weight *up, const cv_weight *down, const float *gate_bias, const float *up_bias, void **act);
int cv_metal_op_norm_route(cv_backend *b, const void *h, const float *norm, const cv_weight *router);
int cv_metal_op_moe_up(cv_backend *b, const void *h, const float *norm, const cv_moe_weights *w);
int cv_metal_op_moe_down(cv_backend *b, const cv_moe_weights *w, bool accumulate, void *h);
int cv_metal_op_head(cv_backend *b, const void *h, const uint32_t *rows, size_t n_rows, const float *norm, const cv_weight *head, float *logits);

#endif
