/* graph.c — the decoder of Llama and Llama 4 (design: llama4.md 1.2). Six or seven operations a layer:
 *
 *   q,k,v = W·norm(h) | rope, qk norm, temperature, cache | attention | h += o·a
 *   dense: act = swiglu(W·norm(h)) | h += down·act      experts: route(norm(h)) | hidden of experts and shared | h += sum
 *
 * Split over tensor ranks, `h +=` becomes: tensor rank 0 adds its partial sum to h, the others replace theirs by it, and the sum over
 * the ranks, in their order, is the new h, the same bits everywhere. So the residual comes in once and costs nothing.
 */
#include "graph.h"

#include <string.h>
#include <time.h>

static int reserve(cv_backend *b, size_t rows, size_t width, size_t element, void **out, size_t *total) {
    if (width && rows > SIZE_MAX / 2 / width / element) return CV_E_MEMORY;
    *total += rows * width * element;
    return b->ops->alloc(b, rows * width * element, out);
}

int cv_graph_open(const cv_model *m, cv_backend *b, cv_activations *a, cv_err err) {
    const cv_shape *s = &m->shape;
    size_t q = s->max_heads * s->head_dim, kv = s->max_kv_heads * s->head_dim, n = s->max_tokens, e = b->act_bytes;
    void *logits = NULL;
    *a = (cv_activations){0};
    int code = reserve(b, n, s->hidden, e, &a->h, &a->bytes);
    if (!code) code = reserve(b, n, q, e, &a->q, &a->bytes);
    if (!code) code = reserve(b, n, kv, e, &a->k, &a->bytes);
    if (!code) code = reserve(b, n, kv, e, &a->v, &a->bytes);
    if (!code) code = reserve(b, n, q, e, &a->attended, &a->bytes);
    if (!code) code = reserve(b, s->max_logits, s->vocab_rows, sizeof(float), &logits, &a->bytes);
    a->logits = logits;
    return code ? cv_fail(err, CV_E_MEMORY, "no memory for the activations of %zu tokens", n) : CV_OK;
}

void cv_graph_close(cv_backend *b, cv_activations *a) {
    void *all[] = {a->h, a->q, a->k, a->v, a->attended, a->logits};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        if (all[i]) b->ops->free(b, all[i]);
    *a = (cv_activations){0};
}

typedef struct {
    cv_backend *b;
    cv_activations *a;
    cv_place *place;
    size_t n_tokens, hidden;
} run_state;

/* Whether this rank adds to h (or, among tensor ranks, replaces it by its part of the sum). */
static bool adds(const run_state *r) { return r->place->tensor_rank == 0; }

/* Before the host touches h. */
static int settle(const run_state *r) { return r->b->ops->sync ? r->b->ops->sync(r->b) : CV_OK; }

/* What a rank without a part of a block adds: nothing, but the bias that tensor rank 0 holds. */
static int add_nothing(const run_state *r, const float *bias) {
    float *h = r->a->h;
    int code = settle(r);
    if (code) return code;
    if (!adds(r)) memset(h, 0, r->n_tokens * r->hidden * sizeof *h);
    else if (bias)
        for (size_t t = 0; t < r->n_tokens; t++)
            for (size_t i = 0; i < r->hidden; i++) h[t * r->hidden + i] += bias[i];
    return CV_OK;
}

/* The sum over the ranks, where there are several. */
static int join(const run_state *r) {
    if (!cv_place_splits(r->place)) return CV_OK;
    int code = settle(r);
    return code ? code : cv_place_reduce(r->place, r->a->h, r->n_tokens * r->hidden);
}

static int attention_block(const run_state *r, const cv_layer *l) {
    cv_backend *b = r->b;
    cv_activations *a = r->a;
    const cv_backend_ops *o = b->ops;
    if (!cv_layer_attends(l)) {
        int code = add_nothing(r, l->o_bias);
        return code ? code : join(r);
    }
    const cv_weight *const w[3] = {l->q, l->k, l->v};
    const float *const bias[3] = {l->q_bias, l->k_bias, l->v_bias};
    int code = o->norm_qkv(b, a->h, l->attn_norm, w, bias, a->q, a->k, a->v);
    if (!code) code = o->rope_store(b, l->flags, l->n_heads, l->n_kv_heads, a->q, a->k, a->v, &l->kv);
    if (!code) code = o->attention(b, l->flags, l->n_heads, l->n_kv_heads, a->q, &l->kv, a->attended);
    if (!code) code = o->linear(b, a->attended, l->o, l->o_bias, adds(r), a->h);
    return code ? code : join(r);
}

static int feed_forward(const run_state *r, const cv_layer *l) {
    cv_backend *b = r->b;
    cv_activations *a = r->a;
    const cv_backend_ops *o = b->ops;
    int code;
    if (!cv_layer_feeds(l)) {
        code = add_nothing(r, l->down_bias);
        return code ? code : join(r);
    }
    if (l->flags & CV_LAYER_MOE) {
        code = o->norm_route(b, a->h, l->ffn_norm, l->router);
        if (!code) code = o->moe_up(b, a->h, l->ffn_norm, &l->moe);
        if (!code) code = o->moe_down(b, &l->moe, adds(r), a->h);
        return code ? code : join(r);
    }
    void *act = NULL;
    code = o->norm_mlp(b, a->h, l->ffn_norm, l->gate, l->up, l->down, l->gate_bias, l->up_bias, &act);
    if (!code) code = o->linear(b, act, l->down, l->down_bias, adds(r), a->h);
    return code ? code : join(r);
}

static uint64_t now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

int cv_graph_run(const cv_model *m, cv_backend *b, cv_activations *a, cv_place *place, const cv_batch *batch, const uint32_t *rows, size_t n_rows, const atomic_bool *stop, uint64_t *kernel_ns, cv_err err) {
    const cv_backend_ops *o = b->ops;
    const run_state r = {b, a, place, batch->n_tokens, m->shape.hidden};
    char text[256] = "";
    uint64_t start = now_ns();
    int code = o->begin(b, batch);
    if (code) return cv_fail(err, code, "the %s backend refused a step of %zu tokens", o->name, batch->n_tokens);
    if (cv_place_first(place)) code = o->embed(b, m->embed, a->h);
    for (size_t i = 0; !code && i < m->n_layers; i++) {
        if (atomic_load_explicit(stop, memory_order_relaxed)) code = CV_E_ABORTED;
        if (!code) code = attention_block(&r, &m->layers[i]);
        if (!code) code = feed_forward(&r, &m->layers[i]);
    }
    if (!code && n_rows && m->head) code = o->head(b, a->h, rows, n_rows, m->final_norm, m->head, a->logits);
    int finished = o->finish(b, text, sizeof text);
    *kernel_ns += now_ns() - start;
    if (code == CV_E_GROUP || (code == CV_E_ABORTED && place->group && !atomic_load(stop))) return cv_place_failed(place, code, err);
    if (code == CV_E_ABORTED) return cv_fail(err, code, "the engine was told to stop");
    if (!code) code = finished;
    return code ? cv_fail(err, code, "the %s backend failed: %s", o->name, text[0] ? text : "operation refused") : CV_OK;
}
