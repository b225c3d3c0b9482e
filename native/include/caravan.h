/* caravan.h — the whole interface of libcaravan, the only header that TypeScript mirrors.
 *
 * The library loads one rank's share of a Llama / Llama 4 model from a *load plan*, and computes *steps*: one forward
 * pass over a ragged batch of sequences, sampling included. It has no globals, prints nothing and never exits.
 *
 * Threads: every function may be called from one control thread; cv_abort, cv_stats and cv_event_fd from any thread.
 * cv_submit never blocks: a compute thread owned by the engine runs steps in the order they were submitted. When one
 * ends, a byte is written to the event descriptor and cv_collect hands its result out.
 *
 * Errors: functions that return int give CV_OK (0) or a negative CV_E* code and, where they take (err, err_size),
 * a zero-terminated English sentence. Memory passed in belongs to the caller and is not kept after the call returns.
 *
 * All records below are little-endian, naturally aligned and sent as bytes; src/engine/layout.ts mirrors them and a
 * test compares every offset (cv_layout).
 */
#ifndef CARAVAN_H
#define CARAVAN_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define CV_API __attribute__((visibility("default")))
#else
#define CV_API
#endif

#define CV_ABI_VERSION 3u

enum {
    CV_OK = 0,
    CV_E_ARGUMENT = -1,    /* a caller's mistake: bad handle, bad size, bad step */
    CV_E_PLAN = -2,        /* the load plan contradicts itself or a file */
    CV_E_IO = -3,          /* a file cannot be opened, is shorter than planned, or cannot be mapped */
    CV_E_MEMORY = -4,      /* an allocation failed */
    CV_E_UNSUPPORTED = -5, /* format, shape or device that this build cannot compute */
    CV_E_AGAIN = -6,       /* cv_collect: that ticket has not ended yet */
    CV_E_BUSY = -7,        /* cv_submit: queue full */
    CV_E_ABORTED = -8,     /* cv_abort was called */
    CV_E_BUFFER = -9,      /* cv_collect: the buffer is too small; *out_size says what is needed */
    CV_E_STEP = -10,       /* computing failed (not a number in the logits, backend error) */
    CV_E_GROUP = -11       /* a rank of the group failed, went silent, or broke the protocol; the group is over */
};

/* ------------------------------------------------------------------------------------------------ load plan ---- */

#define CV_PLAN_MAGIC 0x4e4c5043u /* "CPLN" */
#define CV_NO_FILE 0xffffffffu

enum { CV_DEVICE_CPU = 0, CV_DEVICE_METAL = 1 };
enum { CV_COMPUTE_FAST = 0, CV_COMPUTE_EXACT = 1 };

/* Element types of float tensors, of scales and of the KV cache. */
enum { CV_F32 = 1, CV_F16 = 2, CV_BF16 = 3, CV_E8M0 = 4, CV_E4M3 = 5,
       CV_Q8 = 6 /* KV cache only: a head's d values of one token as int8 in groups of 32, then d/32 float32 scales */ };

/* Weight formats. AFFINE: unsigned codes of `bits` bits (2,3,4,5,6,8), one little-endian bit stream a row,
 * value = code*scale + bias for each group of `group` columns. MXFP4/MXFP8/NVFP4 as in MLX (no biases). */
enum { CV_FORMAT_F32 = 1, CV_FORMAT_F16 = 2, CV_FORMAT_BF16 = 3, CV_FORMAT_AFFINE = 4, CV_FORMAT_MXFP4 = 5, CV_FORMAT_MXFP8 = 6, CV_FORMAT_NVFP4 = 7 };

/* Tensor slots. Matrices are [rows = outputs, cols = inputs]; experts have a leading dimension. */
enum {
    CV_T_EMBED = 1, CV_T_FINAL_NORM, CV_T_HEAD,
    CV_T_ATTN_NORM, CV_T_FFN_NORM,
    CV_T_Q, CV_T_K, CV_T_V, CV_T_O,
    CV_T_Q_BIAS, CV_T_K_BIAS, CV_T_V_BIAS, CV_T_O_BIAS,
    CV_T_GATE, CV_T_UP, CV_T_DOWN,                         /* dense MLP */
    CV_T_GATE_BIAS, CV_T_UP_BIAS, CV_T_DOWN_BIAS,
    CV_T_ROUTER,                                           /* [experts, hidden] */
    CV_T_EXPERT_GATE, CV_T_EXPERT_UP, CV_T_EXPERT_DOWN,    /* experts > 1 allowed */
    CV_T_SHARED_GATE, CV_T_SHARED_UP, CV_T_SHARED_DOWN,
    CV_T_COUNT
};

enum {
    CV_LAYER_CHUNKED = 1,     /* keys live in the chunked pool; attention stays inside the chunk of cv_plan_model.chunk tokens */
    CV_LAYER_ROPE = 2,
    CV_LAYER_QK_NORM = 4,     /* weightless per-head RMS norm of q and k, after RoPE */
    CV_LAYER_TEMPERATURE = 8, /* q *= 1 + attn_scale*ln(1 + floor((t+1)/floor_scale)) */
    CV_LAYER_MOE = 16
};

enum {
    CV_MODEL_ROPE_INTERLEAVED = 1, /* pairs (2j, 2j+1); else (j, j + head_dim/2) */
    CV_MODEL_CHECK_RANKS = 2       /* after every step the ranks of a stage compare checksums of their hidden states; a difference is CV_E_GROUP (tests) */
};

/* Where a tensor's bytes are. Byte b of row r of expert e is at offset + e*outer_stride + r*row_stride + b.
 * With CV_TENSOR_TRANSPOSED the source is [experts][cols][rows]: element (e, r, c) is at
 * offset + e*outer_stride + c*row_stride + r*element_size (float formats only). */
typedef struct {
    uint32_t file; /* index into the plan's files, CV_NO_FILE when absent */
    uint32_t reserved;
    uint64_t offset;
    uint64_t outer_stride;
    uint64_t row_stride;
} cv_plan_source; /* 32 bytes */

enum { CV_TENSOR_TRANSPOSED = 1 };

typedef struct {
    uint32_t slot;       /* CV_T_* */
    int32_t layer;       /* position in the plan's layer table, -1 for global tensors */
    uint32_t format;     /* CV_FORMAT_* */
    uint32_t bits;       /* AFFINE only */
    uint32_t group;      /* columns a scale, quantized formats only */
    uint32_t scale_type; /* CV_F32/F16/BF16 for AFFINE, CV_E8M0 for MXFP*, CV_E4M3 for NVFP4 */
    uint32_t flags;      /* CV_TENSOR_* */
    uint32_t reserved;
    uint64_t experts; /* 1 for plain matrices and vectors */
    uint64_t rows;    /* vectors: rows = 1, cols = length */
    uint64_t cols;
    cv_plan_source weight;
    cv_plan_source scales;       /* [experts, rows, cols/group] */
    cv_plan_source biases;       /* AFFINE */
    cv_plan_source global_scale; /* NVFP4, optional: float32 [experts] */
} cv_plan_tensor; /* 184 bytes */

typedef struct {
    uint32_t index; /* global layer number (messages only) */
    uint32_t flags; /* CV_LAYER_* */
    uint32_t n_heads;
    uint32_t n_kv_heads;
} cv_plan_layer; /* 16 bytes */

typedef struct {
    uint64_t path_offset; /* into the plan; UTF-8, zero-terminated */
    uint64_t size;        /* bytes the file must have */
} cv_plan_file; /* 16 bytes */

typedef struct {
    uint32_t magic;   /* CV_PLAN_MAGIC */
    uint32_t version; /* CV_ABI_VERSION */
    uint64_t total_size;
    uint32_t n_files, n_layers, n_tensors, flags; /* flags: CV_MODEL_* */
    uint64_t files_offset;   /* cv_plan_file[n_files] */
    uint64_t layers_offset;  /* cv_plan_layer[n_layers] */
    uint64_t tensors_offset; /* cv_plan_tensor[n_tensors] */
    uint64_t inv_freq_offset; /* float32[head_dim/2] */
    uint32_t hidden, head_dim, vocab, n_experts;
    uint32_t experts_per_token;
    uint32_t chunk;        /* attention chunk in tokens, a multiple of page_tokens; 0 = no chunked layers */
    uint32_t page_tokens;  /* tokens a page: 16, 32, 64 or 128 */
    uint32_t n_full_pages; /* pages of the pool for layers with full attention */
    uint32_t n_chunk_pages;
    uint32_t kv_type;      /* CV_F32, CV_F16, CV_BF16 or CV_Q8 */
    uint32_t device;       /* CV_DEVICE_* */
    uint32_t compute;      /* CV_COMPUTE_* */
    uint32_t n_threads;    /* compute threads, 1 to 256 */
    uint32_t max_rows;     /* sequences a step */
    uint32_t max_tokens;   /* new tokens a step, all sequences together */
    uint32_t max_logits;   /* positions a step for which logits are computed, >= max_rows */
    uint32_t n_slots;      /* sequence slots that remember their last sampled token */
    float norm_eps, qk_norm_eps, attn_scale, floor_scale;
    uint32_t cpu_level;    /* 0 = best the machine has; else a CV_CPU_* to force one (tests, bench) */
    /* This rank's place, see "A rank's plan" below. All 0: a model on one rank. */
    uint32_t tensor_rank, tensor_size, stage, n_stages;
    uint32_t vocab_first, vocab_rows;
} cv_plan;

/* A rank's plan, where a group computes one model: n_stages pipeline stages of tensor_size ranks each; rank = stage*tensor_size +
 * tensor_rank. Sizes of the model (hidden, head_dim, vocab, n_experts, chunk), of the step (max_*, n_slots), of the pages (their
 * tokens, type and numbers) and compute are equal in all plans; pages are counted for the whole model even where a stage has no layer of the kind.
 *
 * Stage. The layer table holds the stage's own layers, and cv_plan_tensor.layer points into it; cv_plan_layer.index and flags are the whole
 * model's. CV_T_EMBED only on stage 0; CV_T_FINAL_NORM and CV_T_HEAD only on the last. All ranks of a stage hold the same layers.
 *
 * Tensor rank. n_heads and n_kv_heads are the rank's own, with whole groups (n_heads / n_kv_heads as in the model); both may be 0.
 *   by rows     q, k, v and their biases: its heads. gate, up and their biases, expert gate/up (of every expert), shared gate/up: its part of the width.
 *   by columns  o: its heads. down, expert down, shared down: the same part of the width as gate/up. Cut at multiples of the matrix's `group`
 *               (of weights, scales and biases of quantization alike); so the width's parts end at multiples of `group` of `down`.
 *   whole       embedding, norms, router (also where the rank has no expert's part).
 *   once        o's and down's additive bias vectors (CV_T_O_BIAS, CV_T_DOWN_BIAS): only on tensor rank 0, also where it has no part of the matrix.
 *   head        rows [vocab_first, vocab_first + vocab_rows); vocab_rows may be 0. The ranks of the last stage hold all rows, in rank order, each once.
 * A rank without a part of a matrix lacks the tensor (and gate, up, down go together). On stages without a head vocab_first = vocab_rows = 0. */

/* CPU kernel sets, from the definition to the fastest. */
enum { CV_CPU_SCALAR = 1, CV_CPU_AVX2 = 2, CV_CPU_AVX512 = 3, CV_CPU_AVX512_VNNI = 4, CV_CPU_AMX = 5, CV_CPU_NEON = 16, CV_CPU_NEON_DOT = 17, CV_CPU_NEON_I8MM = 18 };

/* ------------------------------------------------------------------------------------------------ step --------- */

#define CV_STEP_MAGIC 0x50545343u /* "CSTP" */
#define CV_TOKEN_LAST 0xffffffffu /* as a token: the token last sampled for this row's slot (a step may be queued before it is known) */

enum { CV_LOGITS_NONE = 0, CV_LOGITS_LAST = 1, CV_LOGITS_ALL = 2 };
enum {
    CV_ROW_SAMPLE = 1,        /* sample after the last token (needs logits != NONE) */
    CV_ROW_RETURN_LOGITS = 2, /* raw logits in the result */
    CV_ROW_LOGPROB = 4,       /* the sampled token's log-probability (else 0); implied by n_top_logprobs > 0 */
    CV_ROW_SAMPLE_ALL = 8,    /* with CV_ROW_SAMPLE and logits ALL: sample behind every one of the row's tokens (drafts to be compared with the
                                 samples); no alternatives or penalties, which depend on what is accepted; a mask for every token */
    CV_ROW_MASK_LATER = 16    /* with CV_ROW_SAMPLE: the row's masks come by cv_give_masks while the step is computed, and it samples when they are there.
                                 Not in a pipeline */
};

/* One sequence's part of a step. Page tables: entry i of the full table holds positions [i*P, (i+1)*P); entry i of the
 * chunk table holds positions [chunk_base + i*P, …). Tables must cover every position that the row's queries read or
 * write. All offsets are byte offsets into the step. */
typedef struct {
    uint64_t first_position; /* of the row's first new token */
    uint32_t n_tokens;       /* >= 1 */
    uint32_t slot;           /* < n_slots */
    uint64_t tokens_offset;      /* uint32[n_tokens] */
    uint64_t full_pages_offset;  /* uint32[n_full_pages] */
    uint64_t chunk_pages_offset; /* uint32[n_chunk_pages] */
    uint64_t chunk_base;         /* first position of the chunk table, a multiple of page_tokens */
    uint32_t n_full_pages, n_chunk_pages;
    uint32_t logits; /* CV_LOGITS_*: positions for which logits are computed */
    uint32_t flags;  /* CV_ROW_* */
    /* Sampling; order (as Hugging Face and vLLM): bias, mask, penalties, temperature, top_k, top_p, min_p, xtc, draw. */
    uint64_t seed;     /* the sequence's random stream; drawn numbers depend on (seed, position, token id) only */
    float temperature; /* 0 = greedy; first index wins ties */
    float top_p;       /* 1 = off */
    float min_p;       /* 0 = off */
    float xtc_probability, xtc_threshold; /* 0 = off */
    float repetition_penalty;             /* 1 = off */
    float presence_penalty, frequency_penalty; /* 0 = off */
    uint32_t top_k;          /* 0 = off */
    uint32_t n_top_logprobs; /* 0..64 alternatives returned */
    uint64_t bias_offset;    /* cv_step_bias[n_bias] */
    uint64_t history_offset; /* cv_step_history[n_history], for the penalties */
    uint64_t mask_offset;    /* uint32[(vocab+31)/32], bit set = allowed; 0 = no mask. With CV_ROW_SAMPLE_ALL [n_tokens] of them */
    uint32_t n_bias, n_history;
    uint64_t xtc_keep_offset; /* uint32[n_xtc_keep]: tokens that XTC never removes (newline, end) */
    uint32_t n_xtc_keep;
    uint32_t reserved;
} cv_step_row; /* 160 bytes */

typedef struct { uint32_t token; float bias; } cv_step_bias;
/* in_output: how often the token was generated (presence, frequency); in_context: prompt or output (repetition). */
typedef struct { uint32_t token, in_output, in_context; } cv_step_history;
/* Page copies made before the step (copy on write). pool: 0 full, 1 chunked. */
typedef struct { uint32_t pool, from, to, reserved; } cv_step_copy;

typedef struct {
    uint32_t magic, version;
    uint64_t total_size; /* a multiple of 8 */
    uint32_t n_rows, n_copies;
    uint64_t rows_offset;   /* cv_step_row[n_rows] */
    uint64_t copies_offset; /* cv_step_copy[n_copies] */
    uint32_t timeout_ms;    /* a rank that waits longer than this for another one inside this step declares the group over; 0 = the engine's own bound */
    uint32_t reserved;
} cv_step; /* 48 bytes */

/* ------------------------------------------------------------------------------------------------ result ------- */

/* Why a row of a step that was computed has no token. Its slot has none then either: a later row that asks for it (CV_TOKEN_LAST) fails alone, too. */
enum {
    CV_ROW_OK = 0,
    CV_ROW_NOT_A_NUMBER = 1, /* its logits are not numbers: the weights are damaged or overflow */
    CV_ROW_NO_CHOICE = 2,    /* no token may be chosen: all are masked or banned */
    CV_ROW_NO_TOKEN = 3      /* CV_TOKEN_LAST of a slot whose row failed or that has sampled nothing yet */
};

typedef struct {
    uint32_t token;      /* sampled token, CV_TOKEN_LAST when none was asked for */
    float logprob;       /* natural log-probability of `token` before temperature and filters, after bias, mask and penalties */
    uint32_t n_top;
    uint32_t n_logits;   /* positions whose logits follow at logits_offset (0 unless CV_ROW_RETURN_LOGITS) */
    uint64_t top_offset;    /* cv_result_top[n_top], most probable first; with CV_ROW_SAMPLE_ALL the samples instead, by position */
    uint64_t logits_offset; /* float32 [n_logits, vocab] */
    uint32_t status;        /* CV_ROW_*; the other rows of the step are not concerned */
    uint32_t reserved;
} cv_result_row; /* 40 bytes */

typedef struct { uint32_t token; float logprob; } cv_result_top;

typedef struct {
    uint64_t ticket;
    uint64_t total_size;
    uint32_t n_rows, reserved;
    uint64_t rows_offset; /* cv_result_row[n_rows] */
    uint64_t compute_ns;  /* time from the start of the step to its end, through all stages */
    uint64_t queued_ns;   /* time between submit and start */
    uint64_t exchange_ns; /* of compute_ns, rank 0's share in reduces, gathers and handing over (and waiting for the other ranks there) */
    uint64_t mask_ns;     /* of compute_ns, waiting for masks (CV_ROW_MASK_LATER) */
} cv_result;

typedef struct {
    uint64_t weights_mapped, weights_copied; /* bytes */
    uint64_t kv_bytes, scratch_bytes;        /* bytes reserved at open */
    uint64_t steps, tokens;                  /* computed so far */
    uint64_t compute_ns;                     /* in steps */
    uint64_t kernel_ns;                      /* of that, inside backend operations and the reduces between them */
    uint64_t exchange_ns;                    /* of that, exchanging with other ranks (and waiting for them) */
    uint64_t rank_checks;                    /* hidden states compared with the other ranks' (CV_MODEL_CHECK_RANKS) */
    uint32_t n_threads, cpu_level;
} cv_stats_record;

/* ------------------------------------------------------------------------------------------------ group -------- */

/* The ranks of one instance, each a process of its own, connected for one *epoch*. Making one has two halves, because no rank
 * knows the others' ports before: cv_group_open listens and gives this rank's *address* (opaque bytes); whoever made the
 * ranks carries all addresses to all of them; cv_group_connect connects and votes on the transport. Rank r is tensor
 * rank r % tensor_size of pipeline stage r / tensor_size. */
typedef struct cv_group cv_group;

enum { CV_RDMA_UC = 1, CV_RDMA_RC = 2, CV_RDMA_APPLE_RULES = 4 /* refuse what Apple's devices refuse (tests) */ };
enum { CV_TRANSPORT_AUTO = 0, CV_TRANSPORT_SHM = 1, CV_TRANSPORT_RDMA = 2, CV_TRANSPORT_TCP = 3 };

typedef struct {
    uint32_t version;      /* CV_ABI_VERSION */
    uint32_t rank, size;   /* 0 <= rank < size <= 64 */
    uint32_t transport;    /* CV_TRANSPORT_*: AUTO tries shared memory (all ranks on one host), RDMA, TCP; another one forces it */
    uint64_t epoch;        /* of the instance; a rank of another epoch is refused */
    uint8_t key[32];       /* session key from the control plane: MAC of every TCP frame */
    uint8_t instance[16];  /* id of the instance; the same on all ranks */
    char host[256];        /* numeric address under which the other ranks reach this one over TCP, IPv6 without scope; "" = 127.0.0.1, loopback only */
    char rdma_device[512]; /* device for each other rank: one name, names by rank with commas ("", for this one), or a pattern with %r (this rank) and
                              %p (the other); "" = the devices whose IPv4 addresses are nearest to each other */
    char no_rdma[200];     /* why this rank takes no part in RDMA: the others hear it, and nobody tries; "" = it may */
    uint32_t silence_ms;   /* a peer that sends nothing for this long while somebody waits is dead; 0 = 1000 */
    uint32_t max_message;  /* bytes of the largest message, 0 = 64 MiB */
    uint32_t rdma_flags;   /* CV_RDMA_*, the same on all ranks; 0 = unreliable queue pairs on macOS, reliable ones elsewhere */
    uint32_t reserved[5];
} cv_group_options; /* 1072 bytes */

typedef struct {
    uint32_t transport;        /* what was voted for, CV_TRANSPORT_* */
    uint32_t failed;           /* 1 after the first error */
    uint64_t reduces, reduce_ns, reduce_bytes; /* all-reduces so far: their number, time and bytes of this rank's vectors */
    uint64_t messages, message_bytes;          /* sent */
    uint64_t mac_ns;                           /* spent on MACs and checksums */
    uint32_t round_trip_us;                    /* median of the pings when connecting, to the farthest rank */
    uint32_t strangers;                        /* connections turned away while connecting */
} cv_group_stats_record;

/* *address_size: in: room, out: bytes used (at most 4096). *out is owned by the caller until cv_group_close. */
CV_API int cv_group_open(const void *options, size_t options_size, void *address, size_t *address_size, cv_group **out, char *err, size_t err_size);

/* addresses: all ranks' addresses one after the other, sizes [size] in bytes. Blocks up to timeout_ms. `note` receives why a faster
 * transport was not taken, "" when there is nothing to say. */
CV_API int cv_group_connect(cv_group *group, const void *addresses, const uint64_t *sizes, uint32_t timeout_ms, char *note, size_t note_size, char *err, size_t err_size);

/* The same without blocking: starts connecting in a thread of the group; poll until it is not CV_E_AGAIN. */
CV_API int cv_group_connect_start(cv_group *group, const void *addresses, const uint64_t *sizes, uint32_t timeout_ms, char *err, size_t err_size);
CV_API int cv_group_connect_poll(cv_group *group, char *note, size_t note_size, char *err, size_t err_size);

/* What the connection of two ranks gives: both call it at the same time, on a connected group of two. round_trip_us: of 8 bytes,
 * median of 21; bandwidth: bytes/s one way, over about `most_ms` of sending. Blocks for most_ms and at most 3 s more. */
CV_API int cv_group_measure(cv_group *group, uint32_t most_ms, double *round_trip_us, double *bandwidth, char *err, size_t err_size);

/* This machine's RDMA devices: a line each, fields divided by tabs: name, port state (4 = active), IPv4 address of its GID or "", what is
 * wrong with it or "". CV_E_UNSUPPORTED with the reason where the system has no library for them. Where a port is wedged the library
 * may never come back: call it in a process that can be killed. */
CV_API int cv_rdma_devices(char *out, size_t out_size, char *err, size_t err_size);

/* Ends every call of this rank with CV_E_ABORTED and tells the other ranks. Any thread, does not block. */
CV_API void cv_group_abort(cv_group *group, const char *why);
/* Any thread. err: the first error's text, "" while there is none. */
CV_API int cv_group_stats(cv_group *group, cv_group_stats_record *out, char *err, size_t err_size);
/* Close the engine that uses the group first. NULL is allowed. */
CV_API void cv_group_close(cv_group *group);

/* ------------------------------------------------------------------------------------------------ functions ---- */

typedef struct cv_engine cv_engine;

/* CV_ABI_VERSION of the library. */
CV_API uint32_t cv_abi(void);

/* Writes "record.field=offset,size" lines for every record above into out; returns the bytes needed. */
CV_API size_t cv_layout(char *out, size_t out_size);

/* Name of a kernel set, and the best set of this machine. CARAVAN_CPU in the environment names the highest set that is used. */
CV_API uint32_t cv_cpu_best(void);
CV_API const char *cv_cpu_name(uint32_t level);

/* Why a set that this processor has is not used, as half a sentence; empty where there is none. */
CV_API const char *cv_cpu_note(void);

/* What this machine can do at most, for bench. They block for about a second and disturb everything else that computes.
 * Bandwidth: reading a buffer of `bytes` (1 MiB to 512 GiB, allocated) with n_threads. int8: multiply-adds of a kernel set's
 * widest int8 instruction, level 0 = the machine's best; CV_E_UNSUPPORTED for a set that this machine or build has none of. */
CV_API int cv_measure_bandwidth(uint64_t bytes, uint32_t n_threads, double *bytes_per_second);
CV_API int cv_measure_int8(uint32_t level, uint32_t n_threads, double *multiply_adds_per_second);

/* What the Metal backend would run on, as lines "key=value": name, working_set (bytes that commands may use at once), max_buffer
 * (bytes of the largest buffer), macos (its version), build (the system's), residency (1: there are residency sets).
 * CV_E_UNSUPPORTED with the reason where there is no Metal device. */
CV_API int cv_metal_info(char *out, size_t out_size, char *err, size_t err_size);

/* Case `index` of the GPU's self-test: kernels beside the CPU backend's exact arithmetic. Lines: name, skipped (1: bfloat16 without has_bfloat),
 * ok, worst (largest difference as a share of what is allowed), where, error. CV_E_ARGUMENT past the last case. Blocks. */
CV_API int cv_metal_selftest(uint32_t index, uint32_t has_bfloat, char *out, size_t out_size, char *err, size_t err_size);
/* Speed of a product with a matrix of about `bytes`. Lines: name, bytes, multiply_adds, seconds (the best of five). CV_E_ARGUMENT past the last. */
CV_API int cv_metal_speed(uint32_t index, uint64_t bytes, char *out, size_t out_size, char *err, size_t err_size);

/* How long a hand-over of 5,120 numbers from the GPU to the host and back takes, in nanoseconds (0: not possible), in each way that a step has for the
 * sums over ranks. Lines: wait, look, event, spin, taken (the one that steps take). Blocks for about a second. */
CV_API int cv_metal_hand_over_times(char *out, size_t out_size, char *err, size_t err_size);

/* Cores for compute threads on a Mac, whose others are slow; 0 elsewhere. */
CV_API uint32_t cv_performance_cores(void);
/* Keeps the system from sleeping while idle until cv_may_sleep. CV_E_UNSUPPORTED but on macOS. */
CV_API int cv_stay_awake(const char *why, uint32_t *assertion, char *err, size_t err_size);
CV_API void cv_may_sleep(uint32_t assertion);

/* Opens an engine from a plan. On success *out is owned by the caller until cv_close. Every size in the plan is checked
 * against itself and against the files before anything is mapped or read.
 * group: the connected ranks that compute together, NULL for a model on one rank. Borrowed: it must outlive the engine. Rank 0 takes steps
 * (cv_submit); the engine of every other rank follows it as soon as it is open (cv_follow_state). */
CV_API int cv_open(const void *plan, size_t plan_size, cv_group *group, cv_engine **out, char *err, size_t err_size);

/* The same in a thread of its own, for callers that must not block: start, then poll until it is not CV_E_AGAIN. Polling gives
 * the bytes of weights that are in place. The last poll (CV_OK with *out, or the error) frees the loader. cv_load_cancel
 * makes loading end with CV_E_ABORTED soon; the loader must still be polled to its end. The plan is copied. */
typedef struct cv_loader cv_loader;
CV_API int cv_load_start(const void *plan, size_t plan_size, cv_group *group, cv_loader **out, char *err, size_t err_size);
CV_API int cv_load_poll(cv_loader *loader, uint64_t *bytes_done, cv_engine **out, char *err, size_t err_size);
CV_API void cv_load_cancel(cv_loader *loader);

/* Readable end of a pipe: one byte arrives for each step that ended; on a rank > 0 one byte when following has ended. Owned by the engine. */
CV_API int cv_event_fd(cv_engine *engine);

/* For ranks > 0: CV_E_AGAIN while the engine follows rank 0, CV_OK when rank 0 has closed its engine, else why following ended
 * (CV_E_GROUP, CV_E_ABORTED, …; err says which rank failed and how). CV_E_ARGUMENT for an engine that follows nobody. */
CV_API int cv_follow_state(cv_engine *engine, char *err, size_t err_size);

/* Queues a step (copied). *ticket counts up from 1. CV_E_BUSY when 64 are waiting. Rank 0 only. After a failure of the group every
 * step, queued or new, ends with its code and text (CV_E_GROUP). */
CV_API int cv_submit(cv_engine *engine, const void *step, size_t step_size, uint64_t *ticket, char *err, size_t err_size);

/* The masks of a row of a submitted step that has CV_ROW_MASK_LATER (copied), once: uint32[n][(vocab+31)/32], n = its tokens with CV_ROW_SAMPLE_ALL, else 1.
 * NULL: the row's sample does not matter any more. A step waits 30 s for its masks at most. Does nothing for a step that has ended. Any thread. */
CV_API int cv_give_masks(cv_engine *engine, uint64_t ticket, uint32_t row, const void *masks, size_t size, char *err, size_t err_size);

/* Result of a ticket, once: CV_E_AGAIN while it runs, CV_E_BUFFER with *out_size when out is too small, the step's own
 * error code and text if it failed. After CV_OK or a step's error the ticket is forgotten. */
CV_API int cv_collect(cv_engine *engine, uint64_t ticket, void *out, size_t out_capacity, uint64_t *out_size, char *err, size_t err_size);

/* Makes the running step and all queued ones end with CV_E_ABORTED as soon as possible (checked between operations).
 * The engine takes no further steps. With steps in flight, and on a rank > 0, the group is aborted with it; an idle rank 0 lets
 * the others go in peace (their cv_follow_state is CV_OK). Any thread. */
CV_API void cv_abort(cv_engine *engine);

CV_API int cv_stats(cv_engine *engine, cv_stats_record *out);

/* Aborts, waits for the compute thread, frees everything. NULL is allowed. */
CV_API void cv_close(cv_engine *engine);

#endif
