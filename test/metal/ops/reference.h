/* reference.h — the operations in double precision, written from their definitions and from the number formats' alone: neither backend's
 * code is used. A reference takes the CPU backend's result, which must be near it, and puts its own in its place; Metal's is compared
 * with that. */
#ifndef CV_METAL_REFERENCE_H
#define CV_METAL_REFERENCE_H

#include "ops.h"

/* Largest difference of the CPU's exact mode from the reference, over the outputs' root mean square. */
#define REFERENCE_BOUND 2e-5

static inline void ref_take(op_world *w, const char *what, float *cpu, const double *exact, size_t n) {
    double squares = 0, worst = 0;
    for (size_t i = 0; i < n; i++) squares += exact[i] * exact[i];
    const double rms = sqrt(squares / (double)n) + 1e-30;
    for (size_t i = 0; i < n; i++) {
        double difference = fabs(cpu[i] - exact[i]) / rms;
        if (!(difference <= worst)) worst = difference;
        cpu[i] = (float)exact[i];
    }
    cv_check(&w->c->checks, worst <= REFERENCE_BOUND, "%s on the CPU: %.3g of the rms %g away from double precision", what, worst, rms);
}

static inline double *ref_room(size_t n) { return op_need(calloc(n + 1, sizeof(double))); }

/* ---- number formats ---- */

/* OCP: a sign, `exponent_bits` with this bias, `mantissa_bits`; no infinities in weights. */
static inline double ref_small_float(unsigned code, int exponent_bits, int mantissa_bits, int bias) {
    unsigned mantissa = code & ((1u << mantissa_bits) - 1), exponent = code >> mantissa_bits & ((1u << exponent_bits) - 1);
    double magnitude = exponent ? ldexp(1.0 + ldexp(mantissa, -mantissa_bits), (int)exponent - bias) : ldexp(mantissa, 1 - bias - mantissa_bits);
    return code >> (exponent_bits + mantissa_bits) & 1 ? -magnitude : magnitude;
}

static inline double ref_scale(uint32_t type, const uint8_t *p, size_t i) {
    uint16_t half;
    float single;
    memcpy(&half, p + 2 * i * (type == CV_F16 || type == CV_BF16), sizeof half * (type == CV_F16 || type == CV_BF16));
    switch (type) {
    case CV_F32: memcpy(&single, p + 4 * i, sizeof single); return single;
    case CV_F16: return ref_small_float(half, 5, 10, 15);
    case CV_BF16: return ref_small_float(half, 8, 7, 127);
    case CV_E8M0: return ldexp(1, p[i] - 127);
    default: return ref_small_float(p[i], 4, 3, 7);
    }
}

/* `bits` bits of a row from bit `at` on: rows are streams of bits, the lowest first. */
static inline unsigned ref_bits(const uint8_t *row, size_t at, unsigned bits) {
    unsigned code = 0;
    for (unsigned i = 0; i < bits; i++) code |= (row[(at + i) / 8] >> (at + i) % 8 & 1u) << i;
    return code;
}

static inline double ref_weight(const cv_weight *w, size_t expert, size_t r, size_t c) {
    const uint8_t *row = w->data + expert * w->expert_bytes + r * w->row_bytes;
    size_t scales = expert * w->expert_scale_bytes + r * w->scale_row_bytes, g = w->group ? c / w->group : 0;
    double global = w->global_scale ? (double)w->global_scale[expert] / 2688.0 : 1.0;
    switch (w->format) {
    case CV_FORMAT_F32:
    case CV_FORMAT_F16:
    case CV_FORMAT_BF16: return ref_scale(w->format == CV_FORMAT_F32 ? CV_F32 : w->format == CV_FORMAT_F16 ? CV_F16 : CV_BF16, row, c);
    case CV_FORMAT_AFFINE: return ref_bits(row, c * w->bits, w->bits) * ref_scale(w->scale_type, w->scales + scales, g) + ref_scale(w->scale_type, w->biases + scales, g);
    case CV_FORMAT_MXFP8: return ref_small_float(row[c], 4, 3, 7) * ref_scale(w->scale_type, w->scales + scales, g);
    default: return ref_small_float(ref_bits(row, 4 * c, 4), 2, 1, 1) * ref_scale(w->scale_type, w->scales + scales, g) * global;
    }
}

/* out[t][r] (+)= row r · x[t] + bias[r] */
static inline void ref_product(const cv_weight *w, size_t expert, const double *x, size_t n, const float *bias, bool add, double *out) {
    double *row = ref_room(w->cols);
    for (size_t r = 0; r < w->rows; r++) {
        for (size_t c = 0; c < w->cols; c++) row[c] = ref_weight(w, expert, r, c);
        for (size_t t = 0; t < n; t++) {
            double sum = bias ? bias[r] : 0;
            for (size_t c = 0; c < w->cols; c++) sum += row[c] * x[t * w->cols + c];
            out[t * w->rows + r] = (add ? out[t * w->rows + r] : 0) + sum;
        }
    }
    free(row);
}

/* RMSNorm of n rows; rows: which ones, or NULL. To be freed. */
static inline double *ref_norm(const op_world *w, const float *h, const float *norm, size_t n, const uint32_t *rows) {
    size_t cols = w->shape.hidden;
    double *out = ref_room(n * cols);
    for (size_t t = 0; t < n; t++) {
        const float *x = h + (rows ? rows[t] : t) * cols;
        double squares = 0;
        for (size_t c = 0; c < cols; c++) squares += (double)x[c] * x[c];
        for (size_t c = 0; c < cols; c++) out[t * cols + c] = x[c] / sqrt(squares / (double)cols + (double)w->shape.norm_eps) * norm[c];
    }
    return out;
}

static inline double ref_silu(double x) { return x / (1.0 + exp(-x)); }

/* out[t] += down · (silu(gate·x) * (up·x)) */
static inline void ref_swiglu(const cv_weight *gate, const cv_weight *up, const cv_weight *down, size_t expert, const double *x, size_t n, const float *gate_bias, const float *up_bias, double *out) {
    size_t ff = gate->rows;
    double *g = ref_room(n * ff), *u = ref_room(n * ff);
    ref_product(gate, expert, x, n, gate_bias, false, g);
    ref_product(up, expert, x, n, up_bias, false, u);
    for (size_t i = 0; i < n * ff; i++) g[i] = ref_silu(g[i]) * u[i];
    ref_product(down, expert, g, n, NULL, true, out);
    free(g);
    free(u);
}

/* The K largest logits choose, the lower number among equals; an expert's input is scaled by the sigmoid of its logit. */
static inline void ref_experts(const op_world *w, const float *h, const float *norm, const cv_weight *router, const cv_moe_weights *e, size_t n, double *out) {
    size_t cols = w->shape.hidden, experts = w->shape.n_experts, chosen = w->shape.experts_per_token;
    double *m = ref_norm(w, h, norm, n, NULL), *logits = ref_room(n * experts), *x = ref_room(n * cols), *y = ref_room(n * cols);
    ref_product(router, 0, m, n, NULL, false, logits);
    for (size_t k = 0; k < chosen; k++) {
        for (size_t i = 0; i < experts && e->gate; i++) { /* all tokens whose k-th choice it is */
            size_t *who = op_need(calloc(n, sizeof *who)), some = 0;
            for (size_t t = 0; t < n; t++) {
                const double *l = logits + t * experts;
                size_t before = 0;
                for (size_t j = 0; j < experts; j++) before += l[j] > l[i] || (l[j] == l[i] && j < i);
                if (before != k) continue;
                for (size_t c = 0; c < cols; c++) x[some * cols + c] = m[t * cols + c] / (1.0 + exp(-l[i]));
                who[some++] = t;
            }
            memset(y, 0, n * cols * sizeof *y);
            if (some) ref_swiglu(e->gate, e->up, e->down, i, x, some, NULL, NULL, y);
            for (size_t s = 0; s < some; s++)
                for (size_t c = 0; c < cols; c++) out[who[s] * cols + c] += y[s * cols + c];
            free(who);
        }
    }
    if (e->shared_gate) ref_swiglu(e->shared_gate, e->shared_up, e->shared_down, 0, m, n, NULL, NULL, out);
    free(m);
    free(logits);
    free(x);
    free(y);
}

/* ---- rotation and attention ---- */

/* One head of d elements at a position: rotation, weightless norm, temperature, as the flags say. */
static inline void ref_rotate(const op_world *w, uint32_t flags, uint64_t position, const float *in, double *out) {
    const cv_shape *s = &w->shape;
    size_t d = s->head_dim;
    double squares = 0, factor = 1;
    for (size_t j = 0; j < d / 2; j++) {
        size_t a = s->rope_interleaved ? 2 * j : j, b = s->rope_interleaved ? 2 * j + 1 : j + d / 2;
        float angle = (float)position * s->inv_freq[j]; /* a float32 product, as Hugging Face computes it */
        bool turns = flags & CV_LAYER_ROPE;
        double c = turns ? cos((double)angle) : 1, sine = turns ? sin((double)angle) : 0;
        out[a] = in[a] * c - in[b] * sine;
        out[b] = in[b] * c + in[a] * sine;
        squares += out[a] * out[a] + out[b] * out[b];
    }
    if (flags & CV_LAYER_QK_NORM) factor /= sqrt(squares / (double)d + (double)s->qk_norm_eps);
    if (flags & CV_LAYER_TEMPERATURE && s->floor_scale > 0) factor *= 1.0 + (double)s->attn_scale * log(1.0 + floor(((double)position + 1.0) / (double)s->floor_scale));
    for (size_t i = 0; i < d; i++) out[i] *= factor;
}

/* Element i of a token's head in a cache. */
static inline double ref_cached(const char *pool, const cv_kv_layer *kv, uint32_t kv_type, size_t d, size_t page, size_t head, size_t slot, size_t i) {
    size_t at = page * kv->page_stride + head * kv->head_stride + slot * cv_kv_token_elements(kv_type, d);
    float single;
    memcpy(&single, kv_type == CV_Q8 ? pool + at + d + i / 32 * sizeof single : pool + (at + i) * sizeof single, sizeof single);
    return kv_type == CV_Q8 ? (double)(int8_t)pool[at + i] * (double)single : (double)single;
}

/* Attention of one query head over the keys first … last of a sequence. pages: its list from key 0 on. */
static inline void ref_attend(const op_world *w, const cv_kv_layer *kv, uint32_t kv_type, const uint32_t *pages, size_t kv_head, uint64_t first, uint64_t last, const float *q, double *out) {
    size_t d = w->shape.head_dim, page_tokens = w->shape.page_tokens;
    double *score = ref_room(last - first + 1), most = -INFINITY, total = 0;
    for (uint64_t t = first; t <= last; t++) {
        double sum = 0;
        for (size_t i = 0; i < d; i++) sum += q[i] * ref_cached(kv->k, kv, kv_type, d, pages[t / page_tokens], kv_head, t % page_tokens, i);
        score[t - first] = sum / sqrt((double)d);
        most = fmax(most, score[t - first]);
    }
    memset(out, 0, d * sizeof *out);
    for (uint64_t t = first; t <= last; t++) {
        double weight = exp(score[t - first] - most);
        total += weight;
        for (size_t i = 0; i < d; i++) out[i] += weight * ref_cached(kv->v, kv, kv_type, d, pages[t / page_tokens], kv_head, t % page_tokens, i);
    }
    for (size_t i = 0; i < d; i++) out[i] /= total;
    free(score);
}

#endif
