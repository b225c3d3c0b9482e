/* model.h — a loaded model as the graph sees it: shapes, layers, weights and KV pools. Built from a load plan. */
#ifndef CV_MODEL_H
#define CV_MODEL_H

#include "../backend/backend.h"
#include "error.h"
#include "weights.h"

typedef struct {
    uint32_t index, flags;
    size_t n_heads, n_kv_heads;
    const float *attn_norm, *ffn_norm;              /* [hidden] */
    const cv_weight *q, *k, *v, *o;                 /* [heads*d, hidden], [kv*d, hidden] x2, [hidden, heads*d]; NULL without heads */
    const float *q_bias, *k_bias, *v_bias, *o_bias; /* or NULL */
    const cv_weight *gate, *up, *down;              /* dense: [ff, hidden] x2, [hidden, ff] */
    const float *gate_bias, *up_bias, *down_bias;
    const cv_weight *router; /* [experts, hidden] */
    cv_moe_weights moe;
    cv_kv_layer kv;
} cv_layer;

/* Pages of one kind of layer: [n_pages][layers of the kind][K, V][kv head][page_tokens][head_dim]. */
typedef struct {
    void *memory;
    size_t bytes, n_pages, page_bytes;
} cv_kv_pool;

typedef struct cv_model {
    cv_shape shape;
    float *inv_freq; /* [head_dim/2] */
    size_t n_layers;
    cv_layer *layers;
    const cv_weight *embed, *head; /* NULL where another stage (or, for the head, another rank) has them */
    const float *final_norm;
    cv_weights *weights;
    cv_kv_pool pools[2]; /* full, chunked */
    size_t max_rows, n_slots;
    size_t vocab_first; /* of this rank's rows of the head */
    bool has_full, has_chunked;
} cv_model;

/* Whether this rank has a part of a layer's attention, or of its feed-forward network. */
static inline bool cv_layer_attends(const cv_layer *l) { return l->n_heads > 0; }
static inline bool cv_layer_feeds(const cv_layer *l) { return l->gate || l->moe.gate || l->moe.shared_gate; }

/* Reads and checks the plan, maps the weights, reserves the cache. On failure nothing is left behind. */
int cv_model_open(const void *plan, size_t plan_size, cv_load_progress *progress, cv_model **out, cv_err err);
void cv_model_close(cv_model *m);

#endif
