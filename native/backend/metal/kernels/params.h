/* params.h — records that the host hands to kernels, read by C and by Metal alike. */
#ifndef CV_METAL_PARAMS_H
#define CV_METAL_PARAMS_H

#ifdef __METAL__
typedef uint cv_u32;
typedef ulong cv_u64;
#else
#include <stdint.h>
typedef uint32_t cv_u32;
typedef uint64_t cv_u64;
#endif

/* Numbers of function constants. Weights A to D of a kernel: format, bits, group, scale type from the first number on. */
enum {
    CV_FC_A = 0, CV_FC_B = 4, CV_FC_C = 8, CV_FC_D = 12,
    CV_FC_SAME_FORMATS = 16, /* bool: all weights have A's format */
    CV_FC_NORM = 17,         /* bool: the input is RMS-normalised on the way in */
    CV_FC_INPUT_FLOAT = 18,  /* bool: the input is float32, else of the kernel's type */
    CV_FC_OUTPUT = 19,       /* CV_OUT_* */
    CV_FC_BIAS = 20,         /* bool */
    CV_FC_ROWS = 21,         /* bool: input row i is row_index[i] */
    CV_FC_SWIGLU = 22,       /* bool: matmul of gate and up, joined */
    CV_FC_EXPERTS = 23,      /* 0: one matrix; 1: rows sorted by expert, gathered from tokens; 2: sorted rows */
    CV_FC_LAYER = 24         /* CV_LAYER_* flags of caravan.h, and CV_LAYER_CACHE8 */
};
enum { CV_LAYER_CACHE8 = 256 }; /* the cache has 8 bits (CV_Q8) */
enum { CV_OUT_TYPED = 0, CV_OUT_FLOAT = 1, CV_OUT_ADD = 2 };

enum {
    CV_FEW = 16,                /* most tokens of a step that goes through the matrix-vector kernels */
    CV_MATVEC_SIMDGROUPS = 2,   /* of a threadgroup of the matrix-vector kernels */
    CV_MATVEC_INPUTS = 16,      /* most inputs for which they read a weight once */
    CV_MATMUL_TOKENS = 32, CV_MATMUL_ROWS = 64, CV_MATMUL_COLS = 32, /* tile of the matrix-matrix kernel */
    CV_ATTN_TILE = 32,          /* queries of a tile of prefill attention */
    CV_ATTN_SPLITS = 64,        /* most parts that one query's keys are split into */
    CV_ATTN_SPLIT_KEYS = 256,   /* least keys of a part; parts have a multiple of it */
    CV_ATTN_SIMDGROUPS = 4,
    CV_STORE_SIMDGROUPS = 4,    /* of a threadgroup that writes the cache */
    CV_MOST_HEAD_DIM = 128,
    CV_ATTN_GROUP = 8,          /* most query heads that share a threadgroup of decode attention */
    CV_MOST_CHOSEN = 8,         /* experts a token */
    CV_MOST_EXPERTS = 1024,
    CV_SORT_THREADS = 256,
    CV_TOP_MOST = 64,
    CV_HAND_OVER_THREADS = 256
};

/* Words that host and GPU share while the host adds over ranks. Hand-overs have numbers that count up, past 0, for ever; they are compared
 * by their difference. ARRIVED: the last one that the GPU has come to; RELEASED: the last one that the host has let go on; GAVE_UP: the one for
 * which the host came too late, 0: none. */
enum { CV_WORD_ARRIVED = 0, CV_WORD_RELEASED = 1, CV_WORD_GAVE_UP = 2, CV_HAND_OVER_WORDS = 64 };

/* A weight matrix (or a stack of experts). has_global: the third buffer holds float32 [experts] (NVFP4), else biases. */
typedef struct {
    cv_u64 row_bytes, expert_bytes, scale_row_bytes, expert_scale_bytes;
    cv_u32 rows, cols, has_global, reserved;
} cv_matrix; /* 48 bytes */

/* Up to three matrices over one input. Outputs [n, rows]. */
typedef struct {
    cv_matrix m[3];
    cv_u32 first_block[3]; /* first row block of each matrix; those that are not there: the number of all blocks */
    cv_u32 n;              /* input rows */
    float eps;
    cv_u32 reserved;
} cv_matvec_params;

typedef struct {
    cv_matrix gate, up, shared_gate, shared_up; /* shared_*: experts only; what this rank has no part of has no rows (and chosen is 0) */
    cv_u32 n, n_experts, chosen;
    float eps;
} cv_up_params;

typedef struct {
    cv_matrix down, shared_down; /* what this rank has no part of has no columns */
    cv_u32 n, n_experts, chosen, add; /* add: to what h holds; else h is written */
} cv_down_params;

typedef struct {
    cv_matrix a, b;
    cv_u32 n, reserved; /* rows of x; experts: of all sorted rows */
} cv_matmul_params;

/* A token of the step: its id, the factor of its queries, and its keys in both page pools (0 full, 1 chunked): where its
 * page list starts in the step's page table, and how many keys it sees, itself included. */
typedef struct {
    cv_u32 id;
    float temperature;
    cv_u32 first_page[2], keys[2];
} cv_token; /* 24 bytes */

/* Consecutive tokens of one sequence whose keys begin at the same place. */
typedef struct {
    cv_u32 first, n;
} cv_tile;

/* Rows first … first+n-1 of the sorted rows, of one expert. */
typedef struct {
    cv_u32 expert, first, n;
} cv_expert_tile;

typedef struct {
    cv_u64 page_stride, head_stride; /* elements */
    cv_u32 n_tokens, n_heads, n_kv_heads, page_tokens, pool, n_splits, group;
    cv_u32 head_dim, interleaved;
    float scale, qk_norm_eps;
    cv_u32 reserved;
} cv_attention_params;

/* chosen: 0 where this rank has no part of the experts; shared: whether it has one of the shared expert. */
typedef struct {
    cv_u32 n, n_experts, chosen, hidden, shared;
} cv_moe_params;

typedef struct {
    cv_u32 n, hidden, has_rows;
    float eps;
} cv_norm_params;

typedef struct {
    cv_u32 n, top;
} cv_head_params;

/* n numbers; patience: how often the GPU looks for the host. */
typedef struct {
    cv_u32 n, number, patience, reserved;
} cv_hand_over_params;

#endif
