/* model.c — see model.h: the plan's records checked, shapes of all weights checked against each other, the cache reserved. */
#include "model.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "memory.h"

enum { MOST_LAYERS = 4096, MOST_TENSORS = 1 << 20, MOST_FILES = 65536 };

static bool inside(uint64_t total, uint64_t offset, uint64_t count, uint64_t size) {
    return offset % 8 == 0 && offset <= total && count <= (total - offset) / size;
}

static bool between(uint64_t v, uint64_t least, uint64_t most) { return v >= least && v <= most; }

static int check_head(const void *plan, size_t size, cv_err err) {
    const cv_plan *p = plan;
    if (!plan || (uintptr_t)plan % 8 || size < sizeof *p || p->magic != CV_PLAN_MAGIC) return cv_fail(err, CV_E_PLAN, "not a load plan");
    if (p->version != CV_ABI_VERSION) return cv_fail(err, CV_E_PLAN, "load plan version %u, this library reads %u", p->version, CV_ABI_VERSION);
    if (p->total_size != size || p->n_files > MOST_FILES || !between(p->n_layers, 1, MOST_LAYERS) || p->n_tensors > MOST_TENSORS ||
        !inside(size, p->files_offset, p->n_files, sizeof(cv_plan_file)) || !inside(size, p->layers_offset, p->n_layers, sizeof(cv_plan_layer)) ||
        !inside(size, p->tensors_offset, p->n_tensors, sizeof(cv_plan_tensor)))
        return cv_fail(err, CV_E_PLAN, "the load plan's tables do not fit into its %zu bytes", size);
    if (p->head_dim % 16 || !between(p->head_dim, 16, 256)) return cv_fail(err, CV_E_UNSUPPORTED, "head_dim %u: multiples of 16 up to 256 are supported", p->head_dim);
    if (!inside(size, p->inv_freq_offset, p->head_dim / 2, sizeof(float))) return cv_fail(err, CV_E_PLAN, "the load plan's frequencies are cut off");
    if (!between(p->hidden, 1, 1 << 20) || !between(p->vocab, 1, 1 << 26) || p->n_experts > 65536 || p->experts_per_token > 64 || p->experts_per_token > p->n_experts || (p->n_experts && !p->experts_per_token))
        return cv_fail(err, CV_E_PLAN, "hidden %u, vocabulary %u, %u experts of which %u are chosen: not possible", p->hidden, p->vocab, p->n_experts, p->experts_per_token);
    if (p->page_tokens < 16 || p->page_tokens > 128 || (p->page_tokens & (p->page_tokens - 1)) || (p->chunk && p->chunk % p->page_tokens))
        return cv_fail(err, CV_E_PLAN, "pages of %u tokens do not go with chunks of %u", p->page_tokens, p->chunk);
    if ((p->kv_type < CV_F32 || p->kv_type > CV_BF16) && p->kv_type != CV_Q8) return cv_fail(err, CV_E_UNSUPPORTED, "cache type %u is not supported", p->kv_type);
    if (p->kv_type == CV_Q8 && p->head_dim % 32) return cv_fail(err, CV_E_UNSUPPORTED, "an 8-bit cache needs a head_dim that 32 divides, not %u", p->head_dim);
    if (p->device != CV_DEVICE_CPU && p->device != CV_DEVICE_METAL) return cv_fail(err, CV_E_UNSUPPORTED, "this build has no backend for device %u", p->device);
    if (!between(p->n_threads, 1, 256) || !between(p->max_rows, 1, 4096) || !between(p->max_tokens, 1, 65536) || p->max_tokens < p->max_rows ||
        !between(p->max_logits, p->max_rows, 65536) || !between(p->n_slots, 1, 65536))
        return cv_fail(err, CV_E_PLAN, "limits out of range: %u threads, %u rows, %u tokens, %u logits, %u slots", p->n_threads, p->max_rows, p->max_tokens, p->max_logits, p->n_slots);
    if (p->vocab_first > p->vocab || p->vocab_rows > p->vocab - p->vocab_first || (p->tensor_size <= 1 && p->vocab_rows && p->vocab_rows != p->vocab))
        return cv_fail(err, CV_E_PLAN, "%u rows of the head from %u on: the vocabulary has %u", p->vocab_rows, p->vocab_first, p->vocab);
    if (p->n_stages > 1 && p->stage + 1 == p->n_stages && p->tensor_size <= 1 && p->vocab_rows != p->vocab)
        return cv_fail(err, CV_E_PLAN, "the last stage's only rank has %u of %u rows of the head", p->vocab_rows, p->vocab);
    if (!(p->norm_eps > 0) || !(p->qk_norm_eps > 0) || !isfinite(p->attn_scale)) return cv_fail(err, CV_E_PLAN, "norm or attention constants are not possible");
    return CV_OK;
}

typedef struct {
    cv_model *m;
    const cv_weights *w;
    int32_t layer;
    uint32_t index;
    bool split; /* the plan is one of several tensor ranks' */
    cv_err err;
    int code; /* first failure; later look-ups are skipped */
} lookup;

static const cv_weight *matrix(lookup *l, uint32_t slot, const char *name, size_t experts, size_t rows, size_t cols, bool optional) {
    if (l->code) return NULL;
    const cv_weight *w = cv_weights_matrix(l->w, slot, l->layer);
    if (!w) {
        if (!optional) l->code = cv_fail(l->err, CV_E_PLAN, "layer %u: %s is missing", l->index, name);
        return NULL;
    }
    if ((experts && w->experts != experts) || (rows && w->rows != rows) || (cols && w->cols != cols)) {
        l->code = cv_fail(l->err, CV_E_PLAN, "layer %u: %s has shape [%zu, %zu, %zu], expected [%zu, %zu, %zu]", l->index, name, w->experts, w->rows, w->cols, experts ? experts : w->experts, rows ? rows : w->rows, cols ? cols : w->cols);
        return NULL;
    }
    return w;
}

static const float *vector(lookup *l, uint32_t slot, const char *name, size_t n, bool optional) {
    const cv_weight *w = matrix(l, slot, name, 1, 1, n, optional);
    return w ? cv_weights_vector(l->w, slot, l->layer) : NULL;
}

/* A matrix that a tensor rank may lack, when it has no part of it. */
static const cv_weight *part(lookup *l, uint32_t slot, const char *name, size_t experts, size_t rows, size_t cols) {
    return matrix(l, slot, name, experts, rows, cols, l->split);
}

/* Gate, up and down: all three or none. */
static void check_whole(lookup *l, const cv_weight *gate, const cv_weight *up, const cv_weight *down, const char *name) {
    if (!l->code && (!gate != !up || !gate != !down)) l->code = cv_fail(l->err, CV_E_PLAN, "layer %u: of %s gate, up and down a rank has all or none", l->index, name);
}

static void widen(size_t *most, const cv_weight *w) {
    if (w && w->rows > *most) *most = w->rows;
}

static int read_layer(lookup *l, const cv_plan_layer *p, cv_layer *out) {
    cv_shape *s = &l->m->shape;
    size_t h = s->hidden, d = s->head_dim;
    bool attends = p->n_heads || p->n_kv_heads || !l->split;
    if (attends && (!p->n_heads || !p->n_kv_heads || p->n_heads % p->n_kv_heads || p->n_heads / p->n_kv_heads > 32 || p->n_heads > 65536))
        return cv_fail(l->err, CV_E_PLAN, "layer %u: %u heads over %u key-value heads", p->index, p->n_heads, p->n_kv_heads);
    if ((p->flags & CV_LAYER_CHUNKED) && !s->chunk) return cv_fail(l->err, CV_E_PLAN, "layer %u is chunked, but the plan has no chunk size", p->index);
    if ((p->flags & CV_LAYER_TEMPERATURE) && !(s->floor_scale > 0)) return cv_fail(l->err, CV_E_PLAN, "layer %u: floor_scale is not positive", p->index);
    *out = (cv_layer){.index = p->index, .flags = p->flags, .n_heads = p->n_heads, .n_kv_heads = p->n_kv_heads};
    if (p->n_heads > s->max_heads) s->max_heads = p->n_heads;
    if (p->n_kv_heads > s->max_kv_heads) s->max_kv_heads = p->n_kv_heads;
    if (p->flags & CV_LAYER_CHUNKED) l->m->has_chunked = true;
    else l->m->has_full = true;
    out->attn_norm = vector(l, CV_T_ATTN_NORM, "input_layernorm", h, false);
    out->ffn_norm = vector(l, CV_T_FFN_NORM, "post_attention_layernorm", h, false);
    if (attends) {
        out->q = matrix(l, CV_T_Q, "q_proj", 1, p->n_heads * d, h, false);
        out->k = matrix(l, CV_T_K, "k_proj", 1, p->n_kv_heads * d, h, false);
        out->v = matrix(l, CV_T_V, "v_proj", 1, p->n_kv_heads * d, h, false);
        out->o = matrix(l, CV_T_O, "o_proj", 1, h, p->n_heads * d, false);
        out->q_bias = vector(l, CV_T_Q_BIAS, "q_proj.bias", p->n_heads * d, true);
        out->k_bias = vector(l, CV_T_K_BIAS, "k_proj.bias", p->n_kv_heads * d, true);
        out->v_bias = vector(l, CV_T_V_BIAS, "v_proj.bias", p->n_kv_heads * d, true);
    }
    out->o_bias = vector(l, CV_T_O_BIAS, "o_proj.bias", h, true);
    if (p->flags & CV_LAYER_MOE) {
        size_t e = s->n_experts;
        if (!e) return cv_fail(l->err, CV_E_PLAN, "layer %u has experts, but the plan counts none", p->index);
        cv_moe_weights *m = &out->moe;
        out->router = matrix(l, CV_T_ROUTER, "router", 1, e, h, false);
        m->gate = part(l, CV_T_EXPERT_GATE, "experts.gate_proj", e, 0, h);
        m->up = part(l, CV_T_EXPERT_UP, "experts.up_proj", e, m->gate ? m->gate->rows : 0, h);
        m->down = part(l, CV_T_EXPERT_DOWN, "experts.down_proj", e, h, m->gate ? m->gate->rows : 0);
        m->shared_gate = part(l, CV_T_SHARED_GATE, "shared_expert.gate_proj", 1, 0, h);
        m->shared_up = part(l, CV_T_SHARED_UP, "shared_expert.up_proj", 1, m->shared_gate ? m->shared_gate->rows : 0, h);
        m->shared_down = part(l, CV_T_SHARED_DOWN, "shared_expert.down_proj", 1, h, m->shared_gate ? m->shared_gate->rows : 0);
        check_whole(l, m->gate, m->up, m->down, "experts'");
        check_whole(l, m->shared_gate, m->shared_up, m->shared_down, "the shared expert's");
        widen(&s->max_ff, m->gate);
        widen(&s->max_ff, m->shared_gate);
    } else {
        out->gate = part(l, CV_T_GATE, "gate_proj", 1, 0, h);
        size_t ff = out->gate ? out->gate->rows : 0;
        out->up = part(l, CV_T_UP, "up_proj", 1, ff, h);
        out->down = part(l, CV_T_DOWN, "down_proj", 1, h, ff);
        check_whole(l, out->gate, out->up, out->down, "the MLP's");
        if (out->gate) {
            out->gate_bias = vector(l, CV_T_GATE_BIAS, "gate_proj.bias", ff, true);
            out->up_bias = vector(l, CV_T_UP_BIAS, "up_proj.bias", ff, true);
        }
        out->down_bias = vector(l, CV_T_DOWN_BIAS, "down_proj.bias", h, true);
        widen(&s->max_ff, out->gate);
    }
    return l->code;
}

static int read_layers(cv_model *m, const uint8_t *plan, const cv_plan *p, cv_err err) {
    const cv_plan_layer *records = (const cv_plan_layer *)(const void *)(plan + p->layers_offset);
    m->layers = calloc(p->n_layers, sizeof *m->layers);
    if (!m->layers) return cv_fail(err, CV_E_MEMORY, "no memory for the layer table");
    m->n_layers = p->n_layers;
    lookup l = {.m = m, .w = m->weights, .layer = -1, .split = p->tensor_size > 1, .err = err};
    if (!p->stage) m->embed = matrix(&l, CV_T_EMBED, "embed_tokens", 1, m->shape.vocab, m->shape.hidden, false);
    if (p->stage + 1 >= p->n_stages) {
        if (m->shape.vocab_rows) m->head = matrix(&l, CV_T_HEAD, "lm_head", 1, m->shape.vocab_rows, m->shape.hidden, false);
        m->final_norm = vector(&l, CV_T_FINAL_NORM, "norm", m->shape.hidden, false);
    }
    /* Of several stages each has its own layers, but rank 0's tables must serve them all. */
    m->has_full = p->n_stages > 1 && p->n_full_pages;
    m->has_chunked = p->n_stages > 1 && p->n_chunk_pages && p->chunk;
    for (size_t i = 0; !l.code && i < p->n_layers; i++) {
        l.layer = (int32_t)i;
        l.index = records[i].index;
        l.code = read_layer(&l, &records[i], &m->layers[i]);
    }
    const cv_weight *norm = cv_weights_matrix(m->weights, CV_T_ATTN_NORM, 0);
    m->shape.act_type = norm && norm->format == CV_FORMAT_F16 ? CV_F16 : CV_BF16;
    return l.code;
}

/* One pool: every page holds K and V of every layer of the kind. Reserved, not touched: the system gives memory page by page. */
static int reserve_pool(cv_model *m, bool chunked, size_t n_pages, cv_err err) {
    const cv_shape *s = &m->shape;
    cv_kv_pool *pool = &m->pools[chunked];
    size_t element = cv_kv_element_bytes(s->kv_type), head = s->page_tokens * cv_kv_token_elements(s->kv_type, s->head_dim), page = 0;
    for (size_t i = 0; i < m->n_layers; i++)
        if (((m->layers[i].flags & CV_LAYER_CHUNKED) != 0) == chunked) page += 2 * m->layers[i].n_kv_heads * head;
    pool->n_pages = n_pages;
    if (!page) return CV_OK;
    if (!n_pages) return cv_fail(err, CV_E_PLAN, "no pages for the %s cache", chunked ? "chunked" : "full");
    pool->page_bytes = page * element;
    if (n_pages > SIZE_MAX / 2 / pool->page_bytes) return cv_fail(err, CV_E_PLAN, "%zu cache pages of %zu bytes are too many", n_pages, pool->page_bytes);
    pool->bytes = n_pages * pool->page_bytes;
    void *p = mmap(NULL, pool->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return cv_fail(err, CV_E_MEMORY, "cannot reserve %zu bytes for the cache: %s", pool->bytes, strerror(errno));
    pool->memory = p;
    cv_want_huge_pages(p, pool->bytes);
    size_t at = 0;
    for (size_t i = 0; i < m->n_layers; i++) {
        cv_layer *l = &m->layers[i];
        if (((l->flags & CV_LAYER_CHUNKED) != 0) != chunked) continue;
        size_t half = l->n_kv_heads * head;
        l->kv = (cv_kv_layer){.k = (char *)p + at * element, .v = (char *)p + (at + half) * element, .page_stride = page, .head_stride = head};
        at += 2 * half;
    }
    return CV_OK;
}

int cv_model_open(const void *plan, size_t plan_size, cv_load_progress *progress, cv_model **out, cv_err err) {
    int code = check_head(plan, plan_size, err);
    if (code) return code;
    const cv_plan *p = plan;
    cv_model *m = calloc(1, sizeof *m);
    if (!m) return cv_fail(err, CV_E_MEMORY, "no memory");
    m->shape = (cv_shape){.hidden = p->hidden, .head_dim = p->head_dim, .vocab = p->vocab, .n_experts = p->n_experts, .experts_per_token = p->experts_per_token,
                          .page_tokens = p->page_tokens, .chunk = p->chunk, .vocab_rows = p->vocab_rows || p->tensor_size > 1 || p->n_stages > 1 ? p->vocab_rows : p->vocab, .max_tokens = p->max_tokens, .max_logits = p->max_logits, .kv_type = p->kv_type,
                          .rope_interleaved = (p->flags & CV_MODEL_ROPE_INTERLEAVED) != 0, .exact = p->compute == CV_COMPUTE_EXACT, .norm_eps = p->norm_eps,
                          .qk_norm_eps = p->qk_norm_eps, .attn_scale = p->attn_scale, .floor_scale = p->floor_scale, .n_threads = p->n_threads, .cpu_level = p->cpu_level};
    m->vocab_first = p->vocab_first;
    m->max_rows = p->max_rows;
    m->n_slots = p->n_slots;
    m->inv_freq = malloc(p->head_dim / 2 * sizeof(float));
    if (!m->inv_freq) code = cv_fail(err, CV_E_MEMORY, "no memory");
    else memcpy(m->inv_freq, (const uint8_t *)plan + p->inv_freq_offset, p->head_dim / 2 * sizeof(float));
    m->shape.inv_freq = m->inv_freq;
    if (!code) code = cv_weights_open(plan, p, progress, &m->weights, err);
    if (!code) code = read_layers(m, plan, p, err);
    if (!code) code = reserve_pool(m, false, p->n_full_pages, err);
    if (!code) code = reserve_pool(m, true, p->n_chunk_pages, err);
    if (code) {
        cv_model_close(m);
        return code;
    }
    *out = m;
    return CV_OK;
}

void cv_model_close(cv_model *m) {
    if (!m) return;
    for (size_t i = 0; i < 2; i++)
        if (m->pools[i].memory) munmap(m->pools[i].memory, m->pools[i].bytes);
    cv_weights_close(m->weights);
    free(m->layers);
    free(m->inv_freq);
    free(m);
}
