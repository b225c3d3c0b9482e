/* kernels.h — the CPU backend's kernel table and the arithmetic that every kernel set must reproduce bit for bit.
 *
 * THE CONTRACT. A row's arithmetic depends on its own data and position only. Decode and prefill kernels, and all
 * instruction sets, compute the same sums in the same order, so a row has the same bits alone, in a batch, in any piece
 * of a prompt, on any number of threads, and on any kernel set. scalar.c is the definition; tests compare every set with
 * it for equality of bits. The orders:
 *
 *  dot16(x, y, n)   n a multiple of 16 (callers pad with zeros). 16 lanes, lane l takes k = l, l+16, l+32, …:
 *                   lane = fma(x[k], y[k], lane), starting at +0. Then the tree: s8[i] = lane[i] + lane[i+8] (i<8),
 *                   s4[i] = s8[i] + s8[i+4], s2[i] = s4[i] + s4[i+2], result = s2[0] + s2[1].
 *  sum16(x, n)      the same with lane = lane + x[k].
 *  qdot(w, a, K)    quantized weights times int8 activations, groups g = 0 … K/group-1:
 *                     idot_g = Σ code*q (exact integer)
 *                     r_g = fma(s_w[g]*s_a[g], (float)idot_g, b_w[g]*sum_a[g])   (each product rounded to float32)
 *                     chain[g mod 4] = chain[g mod 4] + r_g, starting at +0
 *                     result = (chain[0] + chain[1]) + (chain[2] + chain[3])
 *                   s_w, b_w converted to float32 from their stored type; s_a, sum_a from quantize().
 *  cv_exp           the polynomial in scalar.c (cv_exp_scalar), fma and integer operations only.
 *  Division and square root are IEEE; no reciprocal estimates, no -ffast-math, no contraction by the compiler
 *  (-ffp-contract=off), no flush-to-zero.
 *
 * Kernels allocate nothing and touch no state but their arguments. Pointers to weights are naturally aligned for their
 * element type only; float buffers of the engine are aligned to 64 bytes with padded rows (cv_pad16).
 */
#ifndef CV_CPU_KERNELS_H
#define CV_CPU_KERNELS_H

#include "../backend.h"

/* Where rows of an affine weight begin. NULL: nowhere. */
typedef struct {
    const uint8_t *data, *scales, *biases;
} cv_weight_rows;

/* Row `row` of expert e. */
static inline cv_weight_rows cv_weight_rows_at(const cv_weight *w, size_t e, size_t row) {
    const size_t scale = e * w->expert_scale_bytes + row * w->scale_row_bytes;
    return (cv_weight_rows){w->data + e * w->expert_bytes + row * w->row_bytes, w->scales ? w->scales + scale : NULL, w->biases ? w->biases + scale : NULL};
}

/* Activations of n rows as int8, one scale a group. */
typedef struct {
    const int8_t *q;    /* [n, q_stride], cols valid, rest zero */
    const float *scale; /* [n, g_stride] s_a */
    const float *sum;   /* [n, g_stride] s_a * (float)Σq, rounded once */
    size_t n, cols, group;
    size_t q_stride; /* bytes, a multiple of 64 */
    size_t g_stride; /* floats, a multiple of 16 */
    cv_weight_rows next; /* what the thread reads after this product: a kernel may prefetch its first bytes */
} cv_qact;

typedef struct cv_cpu_kernels {
    uint32_t level; /* CV_CPU_* */

    /* One row of activations to int8. n is a multiple of group (32, 64 or 128). Per group: amax = max|x|;
     * scale = amax/127; inverse = 127/amax (0 when amax = 0); q = x*inverse rounded to nearest, ties to even. */
    void (*quantize)(const float *x, size_t n, size_t group, int8_t *q, float *scale, float *sum);

    /* out[t*ldo + r] = qdot(row r of expert e, activation row t), r in [row0,row1), t in [0, a->n).
     * AFFINE 4, 6 and 8 bits with group 32, 64, 128 == a->group; scales f16, bf16 or f32. scratch: scratch_bytes(cols). */
    void (*qmatmul)(const cv_weight *w, size_t expert, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch);

    /* Row r of expert e as float32: cols values, then zeros up to cv_pad16(cols). Any format. Affine values are
     * fma(code, scale, bias); fp4/fp8 values are code*scale (then *global_scale/(448*6) for NVFP4 that has one). */
    void (*decode_row)(const cv_weight *w, size_t expert, size_t row, float *out);

    /* out[t*ldo + r] = dot16(decoded row r, x row t). x [n, ldx], ldx >= cv_pad16(cols) with zero padding. Any format. */
    void (*fmatmul)(const cv_weight *w, size_t expert, size_t row0, size_t row1, const float *x, size_t n, size_t ldx, float *out, size_t ldo, void *scratch);

    /* Bytes of scratch that qmatmul and fmatmul need for matrices of at most cols columns. */
    size_t (*scratch_bytes)(size_t cols);

    /* y[i] = (x[i]*r)*w[i], r = 1/sqrt(dot16(x,x)/n + eps); w NULL = no weight; y may be x. Rows padded with zeros to cv_pad16(n). */
    void (*rms_norm)(const float *x, const float *w, size_t n, float eps, float *y);

    /* out[i] = (gate[i] / (1 + exp(-gate[i]))) * up[i] */
    void (*swiglu)(const float *gate, const float *up, float *out, size_t n);

    /* x[i] += y[i] */
    void (*add)(float *x, const float *y, size_t n);

    /* Rotates pairs of one head of d values in place: (a, b) -> (fma(a,c,-(b*s)), fma(b,c,a*s)), with b*s and a*s rounded.
     * interleaved: pairs (2j, 2j+1), else (j, j+d/2). cos, sin: [d/2]. */
    void (*rope)(float *x, const float *cos, const float *sin, size_t d, int interleaved);

    /* float32 to the KV cache's element type (round to nearest even). */
    void (*store_kv)(const float *x, void *out, uint32_t kv_type, size_t n);

    /* s[q*lds + t] = scale * dot16(query q, key t), q < n_q, t < len. queries [n_q, ldq] float32; keys [len, d] of kv_type,
     * contiguous; d a multiple of 16, at most 256. next: as many bytes as the keys have, which are read after this; a kernel may
     * prefetch them. NULL = none. */
    void (*attn_scores)(const float *queries, size_t n_q, size_t ldq, const void *keys, uint32_t kv_type, size_t len, size_t d, float scale, float *s, size_t lds, const void *next);

    /* In place: m = max(s[0..len)), s[t] = exp(s[t]-m) — zero from len up to cv_pad16(len) — returns sum16 of them. */
    float (*attn_softmax)(float *s, size_t len, float *m);

    /* out[q*ldo + i] = fma(p[q*ldp + t], v[t*d + i], out) for t = 0 … len[q]-1 in ascending order. values [*, d] of kv_type.
     * next: as in attn_scores. */
    void (*attn_values)(const float *p, size_t n_q, size_t ldp, const uint32_t *len, const void *values, uint32_t kv_type, size_t d, float *out, size_t ldo, const void *next);

    /* Index of the largest x (first wins; NaN never wins unless all are NaN: then 0). */
    size_t (*argmax)(const float *x, size_t n);
} cv_cpu_kernels;

/* The definition, and the sets of the machine's architecture. Each returns NULL when this processor cannot run it (the
 * cpuid / hwcap test is inside). Slots that a set does not override are the next lower set's. */
const cv_cpu_kernels *cv_kernels_scalar(void);
#if defined(__x86_64__)
const cv_cpu_kernels *cv_kernels_avx2(void);        /* AVX2 + FMA + F16C */
const cv_cpu_kernels *cv_kernels_avx512(void);      /* AVX-512 F, BW, DQ, VL, without VNNI */
const cv_cpu_kernels *cv_kernels_avx512_vnni(void); /* and VNNI */
const cv_cpu_kernels *cv_kernels_amx(void);         /* and AMX's int8 tiles. Takes the system's permission and tries them first (x86/amx.h): some 100 µs */
#elif defined(__aarch64__)
const cv_cpu_kernels *cv_kernels_neon(void);
const cv_cpu_kernels *cv_kernels_neon_dot(void);  /* sdot/udot */
const cv_cpu_kernels *cv_kernels_neon_i8mm(void); /* smmla/usmmla */
#endif

/* Best set at or below `level` (0 = best of the machine). */
const cv_cpu_kernels *cv_kernels_pick(uint32_t level);

/* Asks the cache for memory that is read soon. NULL: for none. */
static inline void cv_prefetch(const void *from, size_t bytes) {
    for (size_t i = 0; from && i < bytes; i += 64) __builtin_prefetch((const char *)from + i, 0, 2);
}

static inline size_t cv_pad16(size_t n) { return (n + 15) & ~(size_t)15; }

#endif
