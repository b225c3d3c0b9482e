/* attention.c — RoPE with the cache's write, and attention over its pages: split over keys for few tokens, in tiles for many. */
#include "operations.h"

#include <math.h>

static cv_attention_params attention_of(const cv_metal *m, uint32_t flags, size_t n_heads, size_t n_kv_heads, const cv_kv_layer *kv) {
    const cv_shape *s = m->base.shape;
    return (cv_attention_params){.page_stride = kv->page_stride, .head_stride = kv->head_stride, .n_tokens = (uint32_t)m->batch->n_tokens, .n_heads = (uint32_t)n_heads, .n_kv_heads = (uint32_t)n_kv_heads,
                                 .page_tokens = (uint32_t)s->page_tokens, .pool = flags & CV_LAYER_CHUNKED ? 1 : 0, .n_splits = 1, .group = (uint32_t)(n_heads / n_kv_heads), .head_dim = (uint32_t)s->head_dim,
                                 .interleaved = s->rope_interleaved, .scale = 1.0f / sqrtf((float)s->head_dim), .qk_norm_eps = s->qk_norm_eps};
}

/* What the cache is, for kernels that write or read it. */
static uint32_t cache_flag(const cv_metal *m) { return m->base.shape->kv_type == CV_Q8 ? CV_LAYER_CACHE8 : 0; }

int cv_metal_op_rope_store(cv_backend *b, uint32_t flags, size_t n_heads, size_t n_kv_heads, void *q, void *k, void *v, const cv_kv_layer *kv) {
    cv_metal *m = self(b);
    cv_metal_constants c = no_constants();
    cv_attention_params params = attention_of(m, flags, n_heads, n_kv_heads, kv);
    c.layer = (flags & (CV_LAYER_ROPE | CV_LAYER_QK_NORM | CV_LAYER_TEMPERATURE)) | cache_flag(m);
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
    dispatch(m, cut(n_heads + 2 * n_kv_heads, CV_STORE_SIMDGROUPS), m->batch->n_tokens, 1, CV_STORE_SIMDGROUPS * 32, 0);
    return cv_metal_failed(m->d);
}

static void attend_few(cv_metal *m, cv_attention_params *params, const void *q, const cv_kv_layer *kv, void *out) {
    const cv_shape *s = m->base.shape;
    cv_metal_constants c = no_constants();
    size_t n = m->batch->n_tokens;
    params->n_splits = (uint32_t)m->step.n_parts[params->pool];
    c.layer = cache_flag(m);
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

int cv_metal_op_attention(cv_backend *b, uint32_t flags, size_t n_heads, size_t n_kv_heads, const void *q, const cv_kv_layer *kv, void *out) {
    cv_metal *m = self(b);
    cv_attention_params params = attention_of(m, flags, n_heads, n_kv_heads, kv);
    size_t n = m->batch->n_tokens, tiles = m->step.n_tiles[params.pool];
    if (n <= CV_FEW) {
        attend_few(m, &params, q, kv, out);
        return cv_metal_failed(m->d);
    }
    cv_metal_constants c = no_constants();
    c.layer = cache_flag(m);
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
