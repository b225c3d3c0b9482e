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

/* h = Σ over the ranks, where there are several. */
static int sum(void *state, const void *part, float *h, size_t n) {
    (void)part;
    const run_state *r = state;
    return cv_place_splits(r->place) ? cv_place_reduce(r->place, h, n) : CV_OK;
}

/* The same on a rank without a part of the block: it adds nothing, but the bias [hidden] (or NULL) that tensor rank 0 holds. */
static int sum_without(void *state, const void *bias, float *h, size_t n) {
    const run_state *r = state;
    const float *each = bias;
    if (!adds(r)) memset(h, 0, n * sizeof *h);
    for (size_t i = 0; adds(r) && each && i < n; i++) h[i] += each[i % r->hidden];
    return sum(state, NULL, h, n);
}

static int join(run_state *r, int (*run)(void *, const void *, float *, size_t), const float *bias) {
    cv_backend *b = r->b;
    const cv_host_work work = {run, r, bias};
    size_t n = r->n_tokens * r->hidden;
    return b->ops->join ? b->ops->join(b, &work, r->a->h, n) : run(r, bias, r->a->h, n);
}

/* The end of a block that this rank has a part of: where there are several ranks, one join for each block, and none else. */
static int join_parts(run_state *r) { return cv_place_splits(r->place) ? join(r, sum, NULL) : CV_OK; }

static int attention_block(run_state *r, const cv_layer *l) {
    cv_backend *b = r->b;
    cv_activations *a = r->a;
    const cv_backend_ops *o = b->ops;
    if (!cv_layer_attends(l)) return join(r, sum_without, l->o_bias);
    const cv_weight *const w[3] = {l->q, l->k, l->v};
    const float *const bias[3] = {l->q_bias, l->k_bias, l->v_bias};
    int code = o->norm_qkv(b, a->h, l->attn_norm, w, bias, a->q, a->k, a->v);
    if (!code) code = o->rope_store(b, l->flags, l->n_heads, l->n_kv_heads, a->q, a->k, a->v, &l->kv);
    if (!code) code = o->attention(b, l->flags, l->n_heads, l->n_kv_heads, a->q, &l->kv, a->attended);
    if (!code) code = o->linear(b, a->attended, l->o, l->o_bias, adds(r), a->h);
    return code ? code : join_parts(r);
}

static int feed_forward(run_state *r, const cv_layer *l) {
    cv_backend *b = r->b;
    cv_activations *a = r->a;
    const cv_backend_ops *o = b->ops;
    int code;
    if (!cv_layer_feeds(l)) return join(r, sum_without, l->down_bias);
    if (l->flags & CV_LAYER_MOE) {
        code = o->norm_route(b, a->h, l->ffn_norm, l->router);
        if (!code) code = o->moe_up(b, a->h, l->ffn_norm, &l->moe);
        if (!code) code = o->moe_down(b, &l->moe, adds(r), a->h);
        return code ? code : join_parts(r);
    }
    void *act = NULL;
    code = o->norm_mlp(b, a->h, l->ffn_norm, l->gate, l->up, l->down, l->gate_bias, l->up_bias, &act);
    if (!code) code = o->linear(b, act, l->down, l->down_bias, adds(r), a->h);
    return code ? code : join_parts(r);
}

static uint64_t now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* Everything behind the first `joined` blocks. */
static int record(run_state *r, const cv_model *m, size_t joined, const uint32_t *rows, size_t n_rows, const atomic_bool *stop) {
    cv_backend *b = r->b;
    int code = cv_place_first(r->place) && !joined ? b->ops->embed(b, m->embed, r->a->h) : CV_OK;
    for (size_t block = joined; !code && block < 2 * m->n_layers; block++) {
        if (atomic_load_explicit(stop, memory_order_relaxed)) code = CV_E_ABORTED;
        else code = block % 2 ? feed_forward(r, &m->layers[block / 2]) : attention_block(r, &m->layers[block / 2]);
    }
    return !code && n_rows && m->head ? b->ops->head(b, r->a->h, rows, n_rows, m->final_norm, m->head, r->a->logits) : code;
}

int cv_graph_run(const cv_model *m, cv_backend *b, cv_activations *a, cv_place *place, const cv_batch *batch, const uint32_t *rows, size_t n_rows, const atomic_bool *stop, uint64_t *kernel_ns, cv_err err) {
    const cv_backend_ops *o = b->ops;
    run_state r = {b, a, place, batch->n_tokens, m->shape.hidden};
    char text[768] = "";
    uint64_t start = now_ns();
    size_t joined = 0;
    int code, finished;
    do {
        code = o->begin(b, batch);
        if (code) return cv_fail(err, code, "the %s backend refused a step of %zu tokens", o->name, batch->n_tokens);
        code = record(&r, m, joined, rows, n_rows, stop);
        finished = o->finish(b, text, sizeof text);
        joined += b->joined;
    } while (!code && finished == CV_E_AGAIN && b->joined);
    if (!code) code = finished;
    *kernel_ns += now_ns() - start;
    if (code == CV_E_GROUP || (code == CV_E_ABORTED && place->group && !atomic_load(stop))) return cv_place_failed(place, code, err);
    if (code == CV_E_ABORTED) return cv_fail(err, code, "the engine was told to stop");
    return code ? cv_fail(err, code, "the %s backend failed: %s", o->name, text[0] ? text : "operation refused") : CV_OK;
}
