/* cpu.h — inside of the CPU backend: its state, activations in the forms that kernels read, and matrix jobs. */
#ifndef CV_CPU_H
#define CV_CPU_H

#include "kernels.h"
#include "threads.h"

enum { CV_N_GROUPS = 3 }; /* quantization groups of 32, 64 and 128 columns */
enum { CV_NEED_FLOAT = 1, CV_NEED_Q32 = 2, CV_NEED_Q64 = 4, CV_NEED_Q128 = 8 };
enum { CV_ACT_UNIT = 128 };       /* rows of hidden activations are cut at multiples of the largest quantization group */
enum { CV_TILE_FLOATS = 1 << 16 }; /* values of the largest tile that a task computes in its thread's scratch */
enum { CV_ATTN_BLOCK = 256 };                      /* keys of one softmax block, counted from the first key a query sees */
enum { CV_ATTN_QUERIES = 64 };                     /* query vectors of one tile (tokens * heads of a group), most */

/* Rows of activations: float32 and, where a matrix wants it, int8 by group. */
typedef struct {
    size_t max_rows, max_cols;
    size_t cols, ldx, q_stride; /* of the rows that are in it now */
    float *x;
    int8_t *q[CV_N_GROUPS];
    float *scale[CV_N_GROUPS], *sum[CV_N_GROUPS];
} cv_act;

/* Scratch of one thread. */
typedef struct {
    void *kernel;       /* kernels->scratch_bytes */
    float *tile[2];     /* [token_block, row_block] of the job, CV_TILE_FLOATS values */
    float *queries;     /* [CV_ATTN_QUERIES, head_dim] */
    float *page;        /* [page_tokens, head_dim]: keys or values of a quantized cache, as float32 */
    float *scores;      /* [CV_ATTN_QUERIES, CV_ATTN_BLOCK] */
    float *block_out;   /* [CV_ATTN_QUERIES, head_dim] */
    float *out;         /* [CV_ATTN_QUERIES, head_dim] */
} cv_cpu_scratch;

/* One matrix product, cut into tasks of rows x tokens. */
typedef struct {
    const cv_weight *w[2]; /* w[1]: gate and up, joined by SwiGLU */
    const float *bias[2];
    size_t expert;
    const cv_act *in;
    size_t in_first, n; /* activation rows in_first … in_first+n-1 */
    /* plain: out[t*ldo + r] = or += */
    float *out;
    size_t ldo;
    bool add;
    bool float_input; /* read float32 whatever the weights' format is */
    /* SwiGLU: rows out_first … of act, in the forms act_needs */
    cv_act *act;
    size_t act_first;
    uint32_t act_needs;
    /* cut */
    size_t row_block, token_block, row_tasks, token_tasks, first_task;
} cv_job;

enum { CV_AHEAD_RUNS = 1024 }; /* products of a step whose weights are remembered */

/* Weights that a product of the last small step read first. */
typedef struct {
    cv_threads_range weights[CV_THREADS_AHEAD];
    size_t n;
} cv_ahead;

/* Partial softmax of one query vector over one block. */
typedef struct {
    float m, l;
} cv_attn_part;

typedef struct cv_cpu {
    cv_backend base;
    const cv_cpu_kernels *k;
    cv_threads *threads;
    cv_cpu_scratch *scratch; /* [threads] */
    const cv_batch *batch;
    float *cos, *sin; /* [max_tokens, head_dim/2] */
    cv_act in, mid;   /* inputs of qkv/o/MLP/shared; hidden of MLP/shared */
    cv_act expert_in, expert_mid;
    float *router_logits; /* [max_tokens, n_experts] */
    uint32_t *expert_of;  /* [max_tokens*K] chosen, by token then rank */
    float *score_of;
    uint32_t *place_of;  /* [max_tokens*K] row in expert_in */
    uint32_t *expert_first; /* [n_experts+1] first row of each expert */
    uint32_t *tile_first;   /* [max_tokens+1] first token of each attention tile */
    float *expert_out;   /* [max_tokens*K, hidden] */
    float *shared_out;   /* [max_tokens, hidden] */
    cv_job *jobs;        /* [n_experts + 4] */
    cv_ahead *ahead;     /* [CV_AHEAD_RUNS] by the number of cv_run_jobs calls since begin() */
    size_t run;          /* of them so far */
    /* attention split over blocks */
    cv_attn_part *parts;
    float *part_out;
    size_t max_parts; /* query vectors x blocks */
} cv_cpu;

static inline size_t cv_pad64(size_t n) { return (n + 63) & ~(size_t)63; }
static inline size_t cv_group_columns(size_t i) { return (size_t)32 << i; }

/* How w reads its input: one CV_NEED_* bit. */
uint32_t cv_needs_of(const cv_cpu *c, const cv_weight *w);

int cv_act_open(cv_cpu *c, cv_act *a, size_t rows, size_t cols);
void cv_act_close(cv_act *a);
/* Sets the width of the rows to come. */
void cv_act_shape(cv_act *a, size_t cols);
/* The forms `needs` of columns [c0, c1) of row r, from x (c0.. c1). c0 and c1 are multiples of 128 or the row's ends. */
void cv_act_store(const cv_cpu *c, cv_act *a, size_t r, size_t c0, size_t c1, const float *x, uint32_t needs);
/* Row t of c->in = RMSNorm(h[t]) (norm NULL: h[t] itself), in parallel over the batch's tokens. */
void cv_act_fill(cv_cpu *c, const float *h, size_t ldh, size_t n, const uint32_t *rows, const float *norm, float eps, size_t cols, uint32_t needs);

/* Runs the jobs, all tasks in one parallel run. */
void cv_run_jobs(cv_cpu *c, cv_job *jobs, size_t n_jobs);
/* Splits n items over the threads when that pays: fn(context, item, thread). */
void cv_parallel(cv_cpu *c, size_t n, size_t least, cv_task_fn fn, void *context);

int cv_cpu_attention(cv_backend *b, uint32_t flags, size_t n_heads, size_t n_kv_heads, const void *q, const cv_kv_layer *kv, void *out);
int cv_cpu_norm_route(cv_backend *b, const void *h, const float *norm, const cv_weight *router);
int cv_cpu_moe_up(cv_backend *b, const void *h, const float *norm, const cv_moe_weights *w);
int cv_cpu_moe_down(cv_backend *b, const cv_moe_weights *w, bool accumulate, void *h);
int cv_cpu_moe_open(cv_cpu *c);
void cv_cpu_moe_close(cv_cpu *c);

/* count*size zeroed bytes aligned to 64, NULL when too large or not to be had. */
void *cv_alloc_array(size_t count, size_t size);
/* The same for what the backend keeps until it is closed: counted in its scratch_bytes. */
void *cv_cpu_reserve(cv_cpu *c, size_t count, size_t size);

#endif
