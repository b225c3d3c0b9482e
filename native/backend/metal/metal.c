/* metal.c — opens the Metal backend: its limits, its scratch, its table of operations (backend.h). Their kernels are in kernels/.
 *
 * A step of at most CV_FEW tokens goes through matrix-vector kernels, which read each weight once for all rows and fuse norms,
 * experts and sums: 7 dispatches a layer, 8 where a long context is split. Longer steps go through tiles with simdgroup
 * matrices. The residual stream and logits are float32; everything between is of the cache's type (float32 with `exact`; beside an
 * 8-bit cache the 16-bit type of the model).
 *
 * Nothing is allocated in a step once every weight has been used: scratch and tables are fixed, but for the step's page
 * table, which grows by doubling.
 */
#include "metal.h"

#include <stdlib.h>

#include "operations.h"

static int metal_alloc(cv_backend *b, size_t bytes, void **out) { return cv_metal_alloc(self(b)->d, bytes, out, (cv_err){NULL, 0}); }
static void metal_free(cv_backend *b, void *p) { cv_metal_free(self(b)->d, p); }

static void metal_close(cv_backend *b) {
    if (!b) return;
    cv_metal_device_close(self(b)->d); /* with all memory of cv_metal_alloc */
    free(b);
}

static int check_shape(const cv_shape *s, cv_err err) {
    if (s->head_dim != 16 && s->head_dim != 32 && s->head_dim != 64 && s->head_dim != 128)
        return cv_fail(err, CV_E_UNSUPPORTED, "head_dim %zu: the Metal kernels have 16, 32, 64 and 128", s->head_dim);
    if (s->kv_type == CV_Q8 && s->head_dim % 32) return cv_fail(err, CV_E_UNSUPPORTED, "an 8-bit cache needs heads that 32 divides, not %zu", s->head_dim);
    if (s->exact && s->kv_type != CV_F32 && s->kv_type != CV_Q8) return cv_fail(err, CV_E_UNSUPPORTED, "exact computing on Metal needs a float32 or an 8-bit cache");
    if (most(s->max_tokens, s->max_logits) > UINT32_MAX / most(s->hidden, 1)) return cv_fail(err, CV_E_UNSUPPORTED, "steps of %zu tokens of %zu elements: the Metal kernels count elements of rows with 32 bits", s->max_tokens, s->hidden);
    if (s->n_experts > CV_MOST_EXPERTS || s->experts_per_token > CV_MOST_CHOSEN)
        return cv_fail(err, CV_E_UNSUPPORTED, "%zu experts of which %zu are chosen: the Metal kernels have at most %d and %d", s->n_experts, s->experts_per_token, CV_MOST_EXPERTS, CV_MOST_CHOSEN);
    return CV_OK;
}

typedef struct {
    void **out;
    size_t rows, row_bytes;
} scratch;

static int open_scratch(cv_metal *m, cv_err err) {
    const cv_shape *s = m->base.shape;
    size_t n = s->max_tokens, e = m->element, k = s->experts_per_token, pairs = s->n_experts ? n * k : 0, half = s->head_dim / 2, rows = most(n, s->max_logits);
    size_t widest = most(most(s->max_ff, s->hidden), s->max_heads * s->head_dim);
    cv_metal_tables *t = &m->step;
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
        m->base.scratch_bytes += all[i].rows * all[i].row_bytes;
    }
    return cv_metal_grow_pages(m, CV_METAL_FIRST_PAGES) ? cv_fail(err, CV_E_MEMORY, "no memory for page tables") : CV_OK;
}

/* The type of activations: the cache's; where that has 8 bits, the model's, as far as this GPU has it. */
static void choose_type(cv_metal *m) {
    const cv_shape *s = m->base.shape;
    uint32_t type = s->kv_type != CV_Q8 ? s->kv_type : s->exact ? CV_F32 : s->act_type == CV_F16 || !cv_metal_has_bfloat(m->d) ? CV_F16 : CV_BF16;
    m->type = type == CV_F32 ? "f32" : type == CV_F16 ? "f16" : "bf16";
    m->element = cv_kv_element_bytes(type);
    cv_metal_prefer_type(m->d, m->type);
}

int cv_backend_metal_open(const cv_shape *shape, const cv_memory *shared, size_t n_shared, cv_backend **out, char *text, size_t text_size) {
    static const cv_backend_ops ops = {
        .name = "metal", .close = metal_close, .alloc = metal_alloc, .free = metal_free, .begin = cv_metal_op_begin, .finish = cv_metal_op_finish, .join = cv_metal_op_join, .embed = cv_metal_op_embed, .norm_qkv = cv_metal_op_norm_qkv,
        .rope_store = cv_metal_op_rope_store, .attention = cv_metal_op_attention, .linear = cv_metal_op_linear, .norm_mlp = cv_metal_op_norm_mlp, .norm_route = cv_metal_op_norm_route, .moe_up = cv_metal_op_moe_up,
        .moe_down = cv_metal_op_moe_down, .head = cv_metal_op_head,
    };
    cv_err err = {text, text_size};
    int code = check_shape(shape, err);
    if (code) return code;
    cv_metal *m = calloc(1, sizeof *m);
    if (!m) return cv_fail(err, CV_E_MEMORY, "no memory for the Metal backend");
    m->base = (cv_backend){.ops = &ops, .shape = shape, .act_bytes = sizeof(float)};
    code = cv_metal_device_open(&m->d, err);
    if (!code) choose_type(m);
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
