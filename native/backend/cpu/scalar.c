/* scalar.c — the definition of the CPU backend's arithmetic: every kernel in its simplest form. Orders of operations are
 * stated in kernels.h; the fast sets are compared with this file bit for bit. */
#include "kernels.h"

#include <math.h>
#include <string.h>

#include "number_formats.h"
#include "scalar.h"

static float tree16(const float lane[16]) {
    float s[8];
    for (int i = 0; i < 8; i++) s[i] = lane[i] + lane[i + 8];
    for (int i = 0; i < 4; i++) s[i] = s[i] + s[i + 4];
    for (int i = 0; i < 2; i++) s[i] = s[i] + s[i + 2];
    return s[0] + s[1];
}

static float dot16(const float *x, const float *y, size_t n) {
    float lane[16] = {0};
    for (size_t k = 0; k < n; k += 16)
        for (size_t l = 0; l < 16; l++) lane[l] = fmaf(x[k + l], y[k + l], lane[l]);
    return tree16(lane);
}

static float sum16(const float *x, size_t n) {
    float lane[16] = {0};
    for (size_t k = 0; k < n; k += 16)
        for (size_t l = 0; l < 16; l++) lane[l] = lane[l] + x[k + l];
    return tree16(lane);
}

/* e^x as 2^n * p(r), r = x - n ln2 in two parts (Cody & Waite), p the Taylor polynomial of degree 7 on |r| <= ln2/2.
 * Arguments are clamped to [-87, 88], where the result and 2^n are normal numbers. Relative error below 2e-7. */
float cv_exp_scalar(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = nearbyintf(x * 1.44269504f);
    float r = fmaf(n, -0.693145752f, x);
    r = fmaf(n, -1.42860677e-6f, r);
    float p = fmaf(1.98412698e-4f, r, 1.38888889e-3f);
    p = fmaf(p, r, 8.33333333e-3f);
    p = fmaf(p, r, 4.16666667e-2f);
    p = fmaf(p, r, 1.66666667e-1f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    return p * cv_bits_to_f32((uint32_t)((int32_t)n + 127) << 23);
}

static void quantize(const float *x, size_t n, size_t group, int8_t *q, float *scale, float *sum) {
    for (size_t g = 0; g < n / group; g++) {
        const float *v = x + g * group;
        float amax = 0;
        for (size_t i = 0; i < group; i++) {
            float a = fabsf(v[i]);
            if (a > amax) amax = a;
        }
        float s = amax / 127.0f, inverse = amax > 0 ? 127.0f / amax : 0.0f;
        if (inverse > 3.0e38f) inverse = 0.0f; /* amax below 2^-121 or so: the group is as good as zero */
        int32_t total = 0;
        for (size_t i = 0; i < group; i++) {
            int32_t c = (int32_t)nearbyintf(v[i] * inverse);
            q[g * group + i] = (int8_t)c;
            total += c;
        }
        scale[g] = s;
        sum[g] = s * (float)total;
    }
}

/* Code k of a row's little-endian bit stream. */
static unsigned code_at(const uint8_t *row, size_t k, unsigned bits) {
    size_t bit = k * bits, byte = bit >> 3;
    unsigned shift = bit & 7, v = row[byte];
    if (shift + bits > 8) v |= (unsigned)row[byte + 1] << 8;
    return (v >> shift) & ((1u << bits) - 1);
}

static const uint8_t *row_data(const cv_weight *w, size_t e, size_t r) { return w->data + e * w->expert_bytes + r * w->row_bytes; }

static size_t scale_offset(const cv_weight *w, size_t e, size_t r) { return e * w->expert_scale_bytes + r * w->scale_row_bytes; }

static void qmatmul(const cv_weight *w, size_t e, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch) {
    (void)scratch;
    size_t groups = w->cols / w->group;
    for (size_t r = row0; r < row1; r++) {
        const uint8_t *codes = row_data(w, e, r);
        const uint8_t *scales = w->scales + scale_offset(w, e, r), *biases = w->biases + scale_offset(w, e, r);
        for (size_t t = 0; t < a->n; t++) {
            const int8_t *q = a->q + t * a->q_stride;
            float chain[4] = {0};
            for (size_t g = 0; g < groups; g++) {
                int32_t idot = 0;
                for (size_t k = g * w->group; k < (g + 1) * w->group; k++) idot += (int32_t)code_at(codes, k, w->bits) * q[k];
                float s = cv_scale_to_f32(scales, g, w->scale_type) * a->scale[t * a->g_stride + g];
                float b = cv_scale_to_f32(biases, g, w->scale_type) * a->sum[t * a->g_stride + g];
                chain[g & 3] = chain[g & 3] + fmaf(s, (float)idot, b);
            }
            out[t * ldo + r] = (chain[0] + chain[1]) + (chain[2] + chain[3]);
        }
    }
}

void cv_decode_row_scalar(const cv_weight *w, size_t e, size_t r, float *out) {
    const uint8_t *row = row_data(w, e, r);
    const uint8_t *scales = w->scales ? w->scales + scale_offset(w, e, r) : NULL;
    const uint8_t *biases = w->biases ? w->biases + scale_offset(w, e, r) : NULL;
    float global = w->global_scale ? w->global_scale[e] / (448.0f * 6.0f) : 1.0f;
    for (size_t k = 0; k < w->cols; k++) {
        size_t g = w->group ? k / w->group : 0;
        switch (w->format) {
        case CV_FORMAT_F32: out[k] = cv_scale_to_f32(row, k, CV_F32); break;
        case CV_FORMAT_F16: out[k] = cv_scale_to_f32(row, k, CV_F16); break;
        case CV_FORMAT_BF16: out[k] = cv_scale_to_f32(row, k, CV_BF16); break;
        case CV_FORMAT_AFFINE:
            out[k] = fmaf((float)code_at(row, k, w->bits), cv_scale_to_f32(scales, g, w->scale_type), cv_scale_to_f32(biases, g, w->scale_type));
            break;
        case CV_FORMAT_MXFP8: out[k] = cv_e4m3_to_f32(row[k]) * cv_scale_to_f32(scales, g, w->scale_type); break;
        default: { /* MXFP4, NVFP4 */
            float v = cv_e2m1_to_f32(code_at(row, k, 4)) * cv_scale_to_f32(scales, g, w->scale_type);
            out[k] = w->global_scale ? v * global : v;
        }
        }
    }
    for (size_t k = w->cols; k < cv_pad16(w->cols); k++) out[k] = 0;
}

static void fmatmul(const cv_weight *w, size_t e, size_t row0, size_t row1, const float *x, size_t n, size_t ldx, float *out, size_t ldo, void *scratch) {
    float *row = scratch;
    for (size_t r = row0; r < row1; r++) {
        cv_decode_row_scalar(w, e, r, row);
        for (size_t t = 0; t < n; t++) out[t * ldo + r] = dot16(row, x + t * ldx, cv_pad16(w->cols));
    }
}

static size_t scratch_bytes(size_t cols) { return cv_pad16(cols) * sizeof(float); }

static void rms_norm(const float *x, const float *w, size_t n, float eps, float *y) {
    float r = 1.0f / sqrtf(dot16(x, x, cv_pad16(n)) / (float)n + eps);
    for (size_t i = 0; i < n; i++) y[i] = w ? (x[i] * r) * w[i] : x[i] * r;
    for (size_t i = n; i < cv_pad16(n); i++) y[i] = 0;
}

static void swiglu(const float *gate, const float *up, float *out, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = (gate[i] / (1.0f + cv_exp_scalar(-gate[i]))) * up[i];
}

static void add(float *x, const float *y, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = x[i] + y[i];
}

static void rope(float *x, const float *cos, const float *sin, size_t d, int interleaved) {
    size_t half = d / 2;
    for (size_t j = 0; j < half; j++) {
        size_t ia = interleaved ? 2 * j : j, ib = interleaved ? 2 * j + 1 : j + half;
        float a = x[ia], b = x[ib], c = cos[j], s = sin[j];
        x[ia] = fmaf(a, c, -(b * s));
        x[ib] = fmaf(b, c, a * s);
    }
}

static void store_kv(const float *x, void *out, uint32_t type, size_t n) {
    if (type == CV_F32) {
        memcpy(out, x, n * sizeof(float));
        return;
    }
    uint16_t *h = out;
    for (size_t i = 0; i < n; i++) h[i] = type == CV_F16 ? cv_f32_to_f16(x[i]) : cv_f32_to_bf16(x[i]);
}

static float load_kv(const void *base, size_t i, uint32_t type) { return cv_scale_to_f32(base, i, type); }

static void attn_scores(const float *queries, size_t n_q, size_t ldq, const void *keys, uint32_t type, size_t len, size_t d, float scale, float *s, size_t lds, const void *next) {
    (void)next;
    float key[256];
    for (size_t t = 0; t < len; t++) {
        for (size_t i = 0; i < d; i++) key[i] = load_kv(keys, t * d + i, type);
        for (size_t q = 0; q < n_q; q++) s[q * lds + t] = scale * dot16(queries + q * ldq, key, d);
    }
}

static float attn_softmax(float *s, size_t len, float *m) {
    float top = s[0];
    for (size_t t = 1; t < len; t++) top = s[t] > top ? s[t] : top;
    for (size_t t = 0; t < len; t++) s[t] = cv_exp_scalar(s[t] - top);
    for (size_t t = len; t < cv_pad16(len); t++) s[t] = 0;
    *m = top;
    return sum16(s, cv_pad16(len));
}

static void attn_values(const float *p, size_t n_q, size_t ldp, const uint32_t *len, const void *values, uint32_t type, size_t d, float *out, size_t ldo, const void *next) {
    (void)next;
    for (size_t q = 0; q < n_q; q++)
        for (size_t t = 0; t < len[q]; t++)
            for (size_t i = 0; i < d; i++) out[q * ldo + i] = fmaf(p[q * ldp + t], load_kv(values, t * d + i, type), out[q * ldo + i]);
}

static size_t argmax(const float *x, size_t n) {
    size_t best = 0;
    for (size_t i = 1; i < n; i++)
        if (x[i] > x[best] || (x[best] != x[best] && x[i] == x[i])) best = i;
    return best;
}

const cv_cpu_kernels *cv_kernels_scalar(void) {
    static const cv_cpu_kernels table = {
        .level = CV_CPU_SCALAR, .quantize = quantize, .qmatmul = qmatmul, .decode_row = cv_decode_row_scalar, .fmatmul = fmatmul,
        .scratch_bytes = scratch_bytes, .rms_norm = rms_norm, .swiglu = swiglu, .add = add, .rope = rope, .store_kv = store_kv,
        .attn_scores = attn_scores, .attn_softmax = attn_softmax, .attn_values = attn_values, .argmax = argmax,
    };
    return &table;
}
