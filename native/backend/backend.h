/* backend.h — what the model graph (engine/) asks of a device. A backend implements these operations; the graph is
 * written once against them. At most eight calls a layer; none waits for a result, so a GPU can record them all.
 *
 * Pointers are device memory that the backend handed out or mapped (`alloc`, `map`); on the CPU and on unified memory they
 * are ordinary pointers. Activations are opaque rows: backend->act_bytes an element.
 */
#ifndef CV_BACKEND_H
#define CV_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../include/caravan.h"

/* Memory that a device is to reach: whole tensors, cache pools. */
typedef struct {
    const void *memory;
    size_t bytes;
} cv_memory;

/* A matrix (or `experts` of them) as the backend reads it. Rows are outputs, columns inputs. Borrowed: the mapping or the
 * copy belongs to the engine's weight store. */
typedef struct cv_weight {
    uint32_t format, bits, group, scale_type;
    size_t experts, rows, cols;
    const uint8_t *data; /* row r of expert e at data + e*expert_bytes + r*row_bytes */
    size_t row_bytes, expert_bytes;
    const uint8_t *scales, *biases; /* row r of expert e at + e*expert_scale_bytes + r*scale_row_bytes */
    size_t scale_row_bytes, expert_scale_bytes;
    const float *global_scale; /* [experts] or NULL */
} cv_weight;

/* One layer's keys and values: page p of kv head h: keys at k + (p*page_stride + h*head_stride) elements, [page_tokens, head_dim];
 * values at the same place of v. */
typedef struct {
    void *k, *v;
    size_t page_stride, head_stride; /* elements of cv_kv_element_bytes */
} cv_kv_layer;

/* One sequence's part of a step, decoded from cv_step_row. */
typedef struct {
    uint64_t first_position;
    size_t n_tokens, first_token; /* first_token: index of its first row among the step's tokens */
    const uint32_t *full_pages, *chunk_pages;
    size_t n_full_pages, n_chunk_pages;
    uint64_t chunk_base;
} cv_seq;

/* A step as the operations see it: n_tokens activation rows. */
typedef struct {
    size_t n_seqs, n_tokens;
    const cv_seq *seqs;
    const uint32_t *tokens;    /* [n_tokens] ids, all known */
    const uint64_t *positions; /* [n_tokens] */
    const uint32_t *token_seq; /* [n_tokens] index into seqs */
} cv_batch;

/* Shapes and constants fixed at load. */
typedef struct {
    size_t hidden, head_dim, vocab, n_experts, experts_per_token, page_tokens, chunk;
    size_t vocab_rows; /* of the head on this rank; vocab when it is whole */
    size_t max_tokens, max_logits;
    size_t max_heads, max_kv_heads, max_ff; /* widest layer; max_ff: widest of MLP, expert, shared expert */
    uint32_t kv_type;
    uint32_t act_type; /* CV_BF16 or CV_F16: the model's type, which activations on a GPU have beside a cache of 8 bits */
    bool rope_interleaved, exact;
    float norm_eps, qk_norm_eps, attn_scale, floor_scale;
    const float *inv_freq; /* [head_dim/2] */
    uint32_t n_threads, cpu_level;
} cv_shape;

/* On a rank that has no part of the experts, or of the shared expert, its three are NULL; never all six. */
typedef struct {
    const cv_weight *gate, *up, *down; /* experts */
    const cv_weight *shared_gate, *shared_up, *shared_down;
} cv_moe_weights;

/* Bytes of a cache element: of CV_Q8, whose tokens are not of one type, a byte. */
static inline size_t cv_kv_element_bytes(uint32_t kv_type) { return kv_type == CV_F32 ? 4 : kv_type == CV_Q8 ? 1 : 2; }

/* Elements that one token of one head takes in the cache. */
static inline size_t cv_kv_token_elements(uint32_t kv_type, size_t head_dim) { return kv_type == CV_Q8 ? head_dim + head_dim / 32 * sizeof(float) : head_dim; }

/* Work of the host in the middle of a step (a sum over ranks): makes of x [n] what the step goes on with. CV_OK, or an error that ends the step. */
typedef struct {
    int (*run)(void *context, const void *part, float *x, size_t n);
    void *context;
    const void *part;
} cv_host_work;

typedef struct cv_backend cv_backend;

typedef struct {
    const char *name;
    void (*close)(cv_backend *b);

    /* Device memory, zeroed, aligned to 64 bytes. */
    int (*alloc)(cv_backend *b, size_t bytes, void **out);
    void (*free)(cv_backend *b, void *p);

    /* Starts a step: uploads its tables, prepares cos/sin for its positions. The batch stays valid until finish(). */
    int (*begin)(cv_backend *b, const cv_batch *batch);
    /* Ends a step: everything recorded has been computed when it returns. CV_E_AGAIN, only of a step with joins: the host's work came too late
     * for the device, which has gone on without it. The first b->joined joins are done and x of the last one is right; the same batch must be
     * begun again and recorded from behind it, and then it does not happen again. */
    int (*finish)(cv_backend *b, char *err, size_t err_size);

    /* x [n], memory of alloc, becomes what `work` makes of it, when everything recorded before is computed and before what follows. Done when
     * finish returns, or earlier; x may be copied for it. What work points to stays valid until then. NULL: operations are computed when they
     * return, and the caller does the work itself. */
    int (*join)(cv_backend *b, const cv_host_work *work, float *x, size_t n);

    /* h[t] = table[token t] */
    int (*embed)(cv_backend *b, const cv_weight *table, void *h);

    /* q,k,v = W·RMSNorm(h) (+ bias). q [tokens, heads*d], k and v [tokens, kv_heads*d]. Biases may be NULL. */
    int (*norm_qkv)(cv_backend *b, const void *h, const float *norm, const cv_weight *const w[3], const float *const bias[3], void *q, void *k, void *v);

    /* RoPE, weightless QK norm and temperature as `flags` (CV_LAYER_*) say; k and v into the cache pages. */
    int (*rope_store)(cv_backend *b, uint32_t flags, size_t n_heads, size_t n_kv_heads, void *q, void *k, void *v, const cv_kv_layer *kv);

    /* out = attention of every token over its own pages (chunked: from its chunk's start). */
    int (*attention)(cv_backend *b, uint32_t flags, size_t n_heads, size_t n_kv_heads, const void *q, const cv_kv_layer *kv, void *out);

    /* h += W·x (+ bias). accumulate = false: h = W·x (a rank's partial sum, before an all-reduce). CV_E_ARGUMENT where W has more
     * columns than any input (hidden, max_heads*head_dim), or after norm_mlp not its number. */
    int (*linear)(cv_backend *b, const void *x, const cv_weight *w, const float *bias, bool accumulate, void *h);

    /* *act = silu(gate·m) * (up·m), m = RMSNorm(h), in the form that `down` reads; the backend's memory, to be given to
     * linear() with the same `down` as the next operation. */
    int (*norm_mlp)(cv_backend *b, const void *h, const float *norm, const cv_weight *gate, const cv_weight *up, const cv_weight *down, const float *gate_bias, const float *up_bias, void **act);

    /* Chooses experts: m = RMSNorm(h), logits = router·m, the K largest (first wins), score = sigmoid(logit). The backend keeps
     * the choice and the scores until moe_down, and may keep m until moe_up. */
    int (*norm_route)(cv_backend *b, const void *h, const float *norm, const cv_weight *router);
    /* Hidden activations of the chosen experts (input scaled by the score) and of the shared expert, of the h and norm that
     * norm_route was given. */
    int (*moe_up)(cv_backend *b, const void *h, const float *norm, const cv_moe_weights *w);
    /* h += (or =) Σ down_e·act_e + shared_down·act_shared, experts in the order they were chosen, shared last. */
    int (*moe_down)(cv_backend *b, const cv_moe_weights *w, bool accumulate, void *h);

    /* logits[i] = head·RMSNorm(h[rows[i]]), float32 [n_rows, vocab_rows]. */
    int (*head)(cv_backend *b, const void *h, const uint32_t *rows, size_t n_rows, const float *norm, const cv_weight *head, float *logits);
} cv_backend_ops;

struct cv_backend {
    const cv_backend_ops *ops;
    const cv_shape *shape;
    size_t act_bytes;
    size_t joined;        /* joins of the step that finish has ended with CV_E_AGAIN, that are done */
    size_t scratch_bytes; /* reserved by the backend itself when it was opened, beside what alloc() has handed out */
};

int cv_backend_cpu_open(const cv_shape *shape, cv_backend **out, char *err, size_t err_size);

#endif
