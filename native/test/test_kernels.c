/* test_kernels.c — compares every kernel set of this machine with scalar.c, bit for bit, over many shapes and kinds of
 * numbers (ordinary, zero, subnormal, huge; no infinities or NaN unless a test says so). Prints a line a test and set, then
 * "N passed, N failed"; exits with 1 if any failed. Buffers have the exact size that the contract gives and only natural
 * alignment, so that a sanitizer sees every access outside. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../backend/cpu/number_formats.h"
#include "kernel_sets.h"

typedef struct {
    const cv_cpu_kernels *scalar, *set;
    uint64_t random;
    char failure[256]; /* the first one of the running test */
} context;

static uint32_t next_random(context *c) {
    c->random ^= c->random << 13;
    c->random ^= c->random >> 7;
    c->random ^= c->random << 17;
    return (uint32_t)(c->random >> 32);
}

static size_t below(context *c, size_t n) { return next_random(c) % n; }

static void fail(context *c, const char *format, ...) {
    if (c->failure[0]) return;
    va_list args;
    va_start(args, format);
    vsnprintf(c->failure, sizeof c->failure, format, args);
    va_end(args);
}

static void *need(void *p) {
    if (!p) {
        fputs("out of memory\n", stderr);
        exit(2);
    }
    return p;
}

/* n bytes at an address that is a multiple of `align` and of nothing larger, ending where the allocation ends. */
typedef struct { void *base; uint8_t *p; } block;
static block take(size_t n, size_t align) {
    block b;
    b.base = need(malloc(n + align + (align < 16 ? 0 : 64)));
    uintptr_t at = (uintptr_t)b.base;
    if (align >= 64) at = (at + 63) & ~(uintptr_t)63;
    else at += align; /* malloc gives multiples of 16 */
    b.p = (uint8_t *)at;
    return b;
}

/* A float buffer of the engine: 64-byte aligned. */
static float *take_floats(size_t n) { return need(aligned_alloc(64, (n * sizeof(float) + 63) / 64 * 64)); }

enum { ORDINARY, ZERO, SUBNORMAL, HUGE_NUMBERS, MIXED, N_KINDS };

static float number(context *c, int kind) {
    const float x = (float)(int32_t)next_random(c) * 0x1p-31f;
    switch (kind) {
    case ORDINARY: return x;
    case ZERO: return next_random(c) & 1 ? 0.0f : -0.0f;
    case SUBNORMAL: return x * 0x1p-130f;
    case HUGE_NUMBERS: return x * 0x1p50f;
    default: return x * ldexpf(1.0f, (int)below(c, 40) - 30);
    }
}

static void fill(context *c, float *x, size_t n, int kind) {
    for (size_t i = 0; i < n; i++) x[i] = number(c, kind);
}

/* rows x cols numbers with rows padded by zeros to ld. */
static float *take_rows(context *c, size_t rows, size_t cols, size_t ld, int kind) {
    float *x = take_floats(rows * ld);
    for (size_t r = 0; r < rows; r++) {
        fill(c, x + r * ld, cols, kind);
        for (size_t i = cols; i < ld; i++) x[r * ld + i] = 0;
    }
    return x;
}

/* Two equal output buffers that no kernel's result equals. */
static void take_outputs(size_t n, float **a, float **b) {
    *a = take_floats(n);
    *b = take_floats(n);
    for (size_t i = 0; i < n; i++) (*a)[i] = (*b)[i] = cv_bits_to_f32(0x7fabcdefu);
}

static void same_floats(context *c, const float *want, const float *got, size_t n, const char *what) {
    for (size_t i = 0; i < n; i++)
        if (cv_f32_to_bits(want[i]) != cv_f32_to_bits(got[i])) {
            fail(c, "%s: element %zu is %a, scalar has %a", what, i, (double)got[i], (double)want[i]);
            return;
        }
}

static void store_scale(uint8_t *base, size_t i, uint32_t type, float f) {
    uint16_t h = type == CV_F16 ? cv_f32_to_f16(f) : cv_f32_to_bf16(f);
    if (type == CV_F32) memcpy(base + 4 * i, &f, 4);
    else memcpy(base + 2 * i, &h, 2);
}

/* ---- weights ---- */

typedef struct { cv_weight w; block data, scales, biases; float global[2]; } weight;

static weight take_weight(context *c, uint32_t format, unsigned bits, size_t group, uint32_t scale_type, size_t rows, size_t cols, int kind) {
    weight m = {.w = {.format = format, .bits = bits, .group = (uint32_t)group, .scale_type = scale_type, .experts = 2, .rows = rows, .cols = cols}};
    cv_weight *w = &m.w;
    const size_t element = format == CV_FORMAT_F32 ? 4 : format == CV_FORMAT_F16 || format == CV_FORMAT_BF16 ? 2 : 0;
    w->row_bytes = element ? cols * element : cols * bits / 8;
    w->expert_bytes = rows * w->row_bytes;
    m.data = take(2 * w->expert_bytes, element ? element : 4);
    w->data = m.data.p;
    for (size_t i = 0; i < 2 * w->expert_bytes; i++) m.data.p[i] = (uint8_t)next_random(c);
    if (element)
        for (size_t i = 0; i < 2 * rows * cols; i++) store_scale(m.data.p, i, format == CV_FORMAT_F32 ? CV_F32 : format == CV_FORMAT_F16 ? CV_F16 : CV_BF16,
                                                                number(c, format == CV_FORMAT_F16 && kind == HUGE_NUMBERS ? ORDINARY : kind));
    if (format == CV_FORMAT_MXFP8)
        for (size_t i = 0; i < 2 * w->expert_bytes; i++)
            if ((m.data.p[i] & 0x7f) == 0x7f) m.data.p[i] = 1;
    if (!group) return m;
    const size_t size = scale_type == CV_F32 ? 4 : scale_type == CV_F16 || scale_type == CV_BF16 ? 2 : 1;
    w->scale_row_bytes = cols / group * size;
    w->expert_scale_bytes = rows * w->scale_row_bytes;
    m.scales = take(2 * w->expert_scale_bytes, size);
    m.biases = take(2 * w->expert_scale_bytes, size);
    w->scales = m.scales.p;
    if (format == CV_FORMAT_AFFINE) w->biases = m.biases.p;
    for (size_t i = 0; i < 2 * rows * cols / group; i++) {
        if (size == 1) {
            m.scales.p[i] = (uint8_t)(scale_type == CV_E8M0 ? 100 + below(c, 50) : below(c, 0x7f));
            continue;
        }
        const int k = scale_type == CV_F16 && kind == HUGE_NUMBERS ? MIXED : kind;
        store_scale(m.scales.p, i, scale_type, number(c, k) * (kind == SUBNORMAL && scale_type == CV_F16 ? 0x1p110f : 1.0f));
        store_scale(m.biases.p, i, scale_type, number(c, k) * 8.0f);
    }
    if (format == CV_FORMAT_NVFP4) {
        m.global[0] = 1.7f;
        m.global[1] = 0.3f;
        w->global_scale = NULL; /* set by the caller, to m.global where m stays */
    }
    return m;
}

static void free_weight(weight *m) {
    free(m->data.base);
    free(m->scales.base);
    free(m->biases.base);
}

/* Activations as scalar.c quantizes them; beyond the groups of a row lies rubbish, as the contract allows. */
static cv_qact take_qact(context *c, size_t n, size_t cols, size_t group, int kind) {
    cv_qact a = {.n = n, .cols = cols, .group = group, .q_stride = (cols + 63) / 64 * 64, .g_stride = cv_pad16(cols / group)};
    int8_t *q = need(aligned_alloc(64, n * a.q_stride));
    float *scale = take_floats(n * a.g_stride), *sum = take_floats(n * a.g_stride), *x = take_floats(cols);
    memset(q, 0, n * a.q_stride);
    memset(scale, 0xff, n * a.g_stride * sizeof(float));
    memset(sum, 0xff, n * a.g_stride * sizeof(float));
    for (size_t t = 0; t < n; t++) {
        fill(c, x, cols, kind);
        c->scalar->quantize(x, cols, group, q + t * a.q_stride, scale + t * a.g_stride, sum + t * a.g_stride);
    }
    free(x);
    a.q = q;
    a.scale = scale;
    a.sum = sum;
    return a;
}

static void free_qact(cv_qact *a) {
    free((void *)(uintptr_t)a->q);
    free((void *)(uintptr_t)a->scale);
    free((void *)(uintptr_t)a->sum);
}

/* ---- tests of the slots ---- */

static void one_qmatmul(context *c, unsigned bits, size_t group, uint32_t type, size_t groups, size_t n, size_t rows, size_t row0, size_t row1, int kind) {
    const size_t cols = groups * group, ldo = rows + below(c, 3);
    weight m = take_weight(c, CV_FORMAT_AFFINE, bits, group, type, rows, cols, kind);
    cv_qact a = take_qact(c, n, cols, group, kind == SUBNORMAL ? ORDINARY : kind);
    float *want, *got;
    take_outputs(n * ldo, &want, &got);
    void *scratch = need(aligned_alloc(64, (c->scalar->scratch_bytes(cols) + c->set->scratch_bytes(cols) + 63) / 64 * 64));
    const size_t expert = below(c, 2);
    c->scalar->qmatmul(&m.w, expert, row0, row1, &a, want, ldo, scratch);
    free(scratch);
    scratch = need(aligned_alloc(64, (c->set->scratch_bytes(cols) + 63) / 64 * 64));
    c->set->qmatmul(&m.w, expert, row0, row1, &a, got, ldo, scratch);
    char what[128];
    snprintf(what, sizeof what, "%u bits, group %zu, scale type %u, %zu columns, n %zu, rows %zu to %zu, kind %d", bits, group, (unsigned)type, cols, n, row0, row1, kind);
    same_floats(c, want, got, n * ldo, what);
    free(scratch);
    free(want);
    free(got);
    free_qact(&a);
    free_weight(&m);
}

static void qmatmul_bits(context *c, unsigned bits) {
    static const size_t group_sizes[] = {32, 64, 128};
    static const uint32_t types[] = {CV_F32, CV_F16, CV_BF16};
    for (size_t g = 0; g < 3; g++)
        for (size_t s = 0; s < 3; s++) {
            for (size_t n = 1; n <= 33; n += n < 18 ? 1 : 5) { /* every count of activation rows, odd shapes */
                const size_t rows = 1 + below(c, 70), row0 = below(c, rows), row1 = row0 + 1 + below(c, rows - row0);
                one_qmatmul(c, bits, group_sizes[g], types[s], 1 + below(c, 21), n, rows, row0, row1, (int)below(c, N_KINDS));
            }
            for (size_t n = 1; n <= 17; n += 8) one_qmatmul(c, bits, group_sizes[g], types[s], 5120 / group_sizes[g], n, 48, 0, 48, ORDINARY);
            one_qmatmul(c, bits, group_sizes[g], types[s], 18, 130, 36, 0, 35, MIXED);
        }
}

static void test_qmatmul_4(context *c) { qmatmul_bits(c, 4); }
static void test_qmatmul_6(context *c) { qmatmul_bits(c, 6); }
static void test_qmatmul_8(context *c) { qmatmul_bits(c, 8); }

/* The largest codes and activations everywhere: integer paths must not saturate. */
static void test_qmatmul_extremes(context *c) {
    static const unsigned bits[] = {4, 6, 8};
    for (size_t b = 0; b < 3; b++)
        for (size_t group = 32; group <= 128; group *= 2)
            for (int sign = -1; sign <= 1; sign += 2)
                for (size_t n = 1; n <= 20; n += 19) {
                    const size_t cols = 4 * group, rows = 16;
                    weight m = take_weight(c, CV_FORMAT_AFFINE, bits[b], group, CV_F16, rows, cols, ORDINARY);
                    memset(m.data.p, 0xff, 2 * m.w.expert_bytes);
                    cv_qact a = take_qact(c, n, cols, group, ORDINARY);
                    memset((void *)(uintptr_t)a.q, sign * 127, n * a.q_stride);
                    float *want, *got;
                    take_outputs(n * rows, &want, &got);
                    void *scratch = need(aligned_alloc(64, (c->set->scratch_bytes(cols) + 63) / 64 * 64));
                    c->scalar->qmatmul(&m.w, 1, 0, rows, &a, want, rows, NULL);
                    c->set->qmatmul(&m.w, 1, 0, rows, &a, got, rows, scratch);
                    same_floats(c, want, got, n * rows, "all codes and activations at their largest");
                    free(scratch);
                    free(want);
                    free(got);
                    free_qact(&a);
                    free_weight(&m);
                }
}

typedef struct { uint32_t format; unsigned bits; size_t group; uint32_t scale_type; } weight_kind;
static const weight_kind weight_kinds[] = {
    {CV_FORMAT_F32, 0, 0, 0}, {CV_FORMAT_F16, 0, 0, 0}, {CV_FORMAT_BF16, 0, 0, 0},
    {CV_FORMAT_AFFINE, 2, 32, CV_F16}, {CV_FORMAT_AFFINE, 3, 64, CV_BF16}, {CV_FORMAT_AFFINE, 4, 32, CV_F32}, {CV_FORMAT_AFFINE, 4, 64, CV_F16},
    {CV_FORMAT_AFFINE, 4, 128, CV_BF16}, {CV_FORMAT_AFFINE, 5, 32, CV_F16}, {CV_FORMAT_AFFINE, 6, 32, CV_BF16}, {CV_FORMAT_AFFINE, 6, 64, CV_F16},
    {CV_FORMAT_AFFINE, 6, 128, CV_F32}, {CV_FORMAT_AFFINE, 8, 32, CV_F16}, {CV_FORMAT_AFFINE, 8, 64, CV_BF16}, {CV_FORMAT_AFFINE, 8, 128, CV_F16},
    {CV_FORMAT_MXFP4, 4, 32, CV_E8M0}, {CV_FORMAT_MXFP8, 8, 32, CV_E8M0}, {CV_FORMAT_NVFP4, 4, 16, CV_E4M3},
};
enum { N_WEIGHT_KINDS = sizeof weight_kinds / sizeof weight_kinds[0] };

static weight any_weight(context *c, size_t kind, size_t rows, size_t groups_or_cols, int numbers) {
    const weight_kind *k = &weight_kinds[kind];
    return take_weight(c, k->format, k->bits, k->group, k->scale_type, rows, k->group ? groups_or_cols * k->group : groups_or_cols, numbers);
}

static void test_decode_row(context *c) {
    for (size_t kind = 0; kind < N_WEIGHT_KINDS; kind++)
        for (size_t i = 0; i < 24; i++) {
            weight m = any_weight(c, kind, 3, 1 + below(c, weight_kinds[kind].group ? 12 : 300), (int)(i % N_KINDS));
            if (weight_kinds[kind].format == CV_FORMAT_NVFP4 && i % 2) m.w.global_scale = m.global;
            float *want, *got;
            const size_t n = cv_pad16(m.w.cols);
            take_outputs(n, &want, &got);
            const size_t e = below(c, 2), r = below(c, 3);
            c->scalar->decode_row(&m.w, e, r, want);
            c->set->decode_row(&m.w, e, r, got);
            char what[96];
            snprintf(what, sizeof what, "weight kind %zu, %zu columns", kind, m.w.cols);
            same_floats(c, want, got, n, what);
            free(want);
            free(got);
            free_weight(&m);
        }
}

static void one_fmatmul(context *c, size_t kind, size_t groups_or_cols, size_t n, size_t rows, size_t row0, size_t row1, int numbers) {
    weight m = any_weight(c, kind, rows, groups_or_cols, numbers);
    const size_t cols = m.w.cols, ldx = cv_pad16(cols) + 16 * below(c, 2), ldo = rows + below(c, 3), e = below(c, 2);
    float *x = take_rows(c, n, cols, ldx, numbers == SUBNORMAL ? ORDINARY : numbers), *want, *got;
    take_outputs(n * ldo, &want, &got);
    void *scratch = need(aligned_alloc(64, (c->scalar->scratch_bytes(cols) + 63) / 64 * 64));
    c->scalar->fmatmul(&m.w, e, row0, row1, x, n, ldx, want, ldo, scratch);
    free(scratch);
    scratch = need(aligned_alloc(64, (c->set->scratch_bytes(cols) + 63) / 64 * 64));
    c->set->fmatmul(&m.w, e, row0, row1, x, n, ldx, got, ldo, scratch);
    char what[128];
    snprintf(what, sizeof what, "weight kind %zu, %zu columns, n %zu, rows %zu to %zu, numbers %d", kind, cols, n, row0, row1, numbers);
    same_floats(c, want, got, n * ldo, what);
    free(scratch);
    free(x);
    free(want);
    free(got);
    free_weight(&m);
}

static void test_fmatmul(context *c) {
    for (size_t kind = 0; kind < N_WEIGHT_KINDS; kind++) {
        for (size_t n = 1; n <= 33; n += n < 10 ? 1 : 6) {
            const size_t rows = 1 + below(c, 40), row0 = below(c, rows), row1 = row0 + 1 + below(c, rows - row0);
            one_fmatmul(c, kind, 1 + below(c, weight_kinds[kind].group ? 10 : 300), n, rows, row0, row1, (int)below(c, N_KINDS));
        }
        one_fmatmul(c, kind, weight_kinds[kind].group ? 5120 / weight_kinds[kind].group : 5120, 5, 36, 3, 36, ORDINARY);
    }
}

static void test_quantize(context *c) {
    for (size_t group = 32; group <= 128; group *= 2)
        for (size_t i = 0; i < 60; i++) {
            const size_t groups = 1 + below(c, 20), n = groups * group;
            float *x = take_floats(n), *scale, *scale2, *sum, *sum2;
            fill(c, x, n, (int)(i % N_KINDS));
            if (i > 40) /* halves, which round to even */
                for (size_t k = 0; k < n; k++) x[k] = k % group == 0 ? 127.0f : (float)((int)below(c, 253) - 126) + 0.5f;
            if (i == 59) x[0] = 0x1p-149f;
            take_outputs(groups, &scale, &scale2);
            take_outputs(groups, &sum, &sum2);
            int8_t *q = need(aligned_alloc(64, (n + 63) / 64 * 64)), *q2 = need(aligned_alloc(64, (n + 63) / 64 * 64));
            c->scalar->quantize(x, n, group, q, scale, sum);
            c->set->quantize(x, n, group, q2, scale2, sum2);
            if (memcmp(q, q2, n)) fail(c, "codes differ: group %zu, n %zu, case %zu", group, n, i);
            same_floats(c, scale, scale2, groups, "scales");
            same_floats(c, sum, sum2, groups, "sums");
            free(x);
            free(q);
            free(q2);
            free(scale);
            free(scale2);
            free(sum);
            free(sum2);
        }
}

static void test_rms_norm(context *c) {
    for (size_t i = 0; i < 120; i++) {
        const size_t n = i < 40 ? i + 1 : 1 + below(c, 6000), ld = cv_pad16(n);
        const int kind = i % N_KINDS == HUGE_NUMBERS ? MIXED : (int)(i % N_KINDS);
        float *x = take_rows(c, 1, n, ld, kind), *want, *got;
        block weights = take(n * sizeof(float), sizeof(float));
        float *w = (float *)(void *)weights.p;
        fill(c, w, n, MIXED);
        take_outputs(ld, &want, &got);
        c->scalar->rms_norm(x, i % 3 ? w : NULL, n, 1e-5f, want);
        c->set->rms_norm(x, i % 3 ? w : NULL, n, 1e-5f, got);
        same_floats(c, want, got, ld, "norm");
        free(x);
        free(weights.base);
        free(want);
        free(got);
    }
}

static void test_swiglu_and_add(context *c) {
    for (size_t i = 0; i < 150; i++) {
        const size_t n = i < 70 ? i + 1 : 1 + below(c, 3000);
        float *gate = take_floats(n), *up = take_floats(n), *want, *got;
        fill(c, gate, n, (int)(i % N_KINDS));
        for (size_t k = 0; k < n; k++) gate[k] *= i % 2 ? 100.0f : 10.0f; /* across the clamp of exp */
        fill(c, up, n, (int)(i / N_KINDS % N_KINDS));
        take_outputs(n, &want, &got);
        c->scalar->swiglu(gate, up, want, n);
        c->set->swiglu(gate, up, got, n);
        same_floats(c, want, got, n, "swiglu");
        c->scalar->add(want, up, n);
        c->set->add(got, up, n);
        same_floats(c, want, got, n, "add");
        free(gate);
        free(up);
        free(want);
        free(got);
    }
}

static void test_rope(context *c) {
    static const size_t widths[] = {2, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 256};
    for (size_t i = 0; i < sizeof widths / sizeof widths[0] * 10; i++) {
        const size_t d = widths[i / 10];
        float *want = take_floats(d), *got = take_floats(d), *cosine = take_floats(d / 2), *sine = take_floats(d / 2);
        fill(c, want, d, (int)(i / 2 % N_KINDS));
        memcpy(got, want, d * sizeof(float));
        fill(c, cosine, d / 2, ORDINARY);
        fill(c, sine, d / 2, ORDINARY);
        c->scalar->rope(want, cosine, sine, d, i % 2);
        c->set->rope(got, cosine, sine, d, i % 2);
        same_floats(c, want, got, d, i % 2 ? "interleaved" : "halves");
        free(want);
        free(got);
        free(cosine);
        free(sine);
    }
}

static const uint32_t kv_types[] = {CV_F32, CV_F16, CV_BF16};

static void test_store_kv(context *c) {
    for (size_t i = 0; i < 300; i++) {
        const uint32_t type = kv_types[i % 3];
        const size_t n = 1 + below(c, 200), size = type == CV_F32 ? 4 : 2;
        float *x = take_floats(n);
        for (size_t k = 0; k < n; k++) { /* any bits but NaN: overflow, infinity, ties, subnormals */
            const uint32_t bits = i % 2 ? next_random(c) : (next_random(c) & 0xbfffffffu) + 0x10000000u;
            x[k] = (bits & 0x7f800000u) == 0x7f800000u ? number(c, MIXED) * 65536.0f : cv_bits_to_f32(i % 4 < 2 ? bits & 0xfffff000u : bits);
        }
        uint8_t *want = need(calloc(n, size)), *got = need(calloc(n, size));
        c->scalar->store_kv(x, want, type, n);
        c->set->store_kv(x, got, type, n);
        if (memcmp(want, got, n * size)) fail(c, "stored values differ: type %u, n %zu", (unsigned)type, n);
        free(x);
        free(want);
        free(got);
    }
}

/* len x d random values of a KV cache. */
static void *take_cache(context *c, uint32_t type, size_t n, int kind) {
    float *x = take_floats(n);
    fill(c, x, n, type == CV_F16 && kind == HUGE_NUMBERS ? MIXED : kind);
    void *cache = need(aligned_alloc(64, (n * 4 + 63) / 64 * 64));
    c->scalar->store_kv(x, cache, type, n);
    free(x);
    return cache;
}

static void test_attn_scores(context *c) {
    static const size_t widths[] = {16, 32, 48, 64, 80, 128, 256};
    for (size_t i = 0; i < 210; i++) {
        const uint32_t type = kv_types[i % 3];
        const size_t d = widths[below(c, 7)], len = i < 20 ? i + 1 : 1 + below(c, 130), n_q = 1 + below(c, i % 5 ? 12 : 40), ldq = d + 16 * below(c, 3), lds = cv_pad16(len);
        const int kind = (int)(i % N_KINDS);
        float *q = take_rows(c, n_q, d, ldq, kind), *want, *got;
        void *keys = take_cache(c, type, len * d, kind);
        take_outputs(n_q * lds, &want, &got);
        c->scalar->attn_scores(q, n_q, ldq, keys, type, len, d, 0.088388f, want, lds);
        c->set->attn_scores(q, n_q, ldq, keys, type, len, d, 0.088388f, got, lds);
        char what[96];
        snprintf(what, sizeof what, "type %u, d %zu, len %zu, queries %zu", (unsigned)type, d, len, n_q);
        same_floats(c, want, got, n_q * lds, what);
        free(q);
        free(keys);
        free(want);
        free(got);
    }
}

static void test_attn_softmax(context *c) {
    for (size_t i = 0; i < 200; i++) {
        const size_t len = i < 70 ? i + 1 : 1 + below(c, 2000), ld = cv_pad16(len);
        float *want, *got, m1 = 0, m2 = 0;
        take_outputs(ld, &want, &got);
        fill(c, want, len, (int)(i % N_KINDS));
        if (i % 3)
            for (size_t k = 0; k < len; k++) want[k] *= 60.0f;
        if (i % 7 == 0)
            for (size_t k = 0; k < len; k++) want[k] = want[k] > 0 ? (k % 2 ? 0.0f : -0.0f) : want[k]; /* zeros of both signs on top */
        memcpy(got, want, len * sizeof(float));
        const float a = c->scalar->attn_softmax(want, len, &m1), b = c->set->attn_softmax(got, len, &m2);
        same_floats(c, want, got, ld, "probabilities");
        same_floats(c, &a, &b, 1, "sum");
        same_floats(c, &m1, &m2, 1, "maximum");
        free(want);
        free(got);
    }
}

static void test_attn_values(context *c) {
    static const size_t widths[] = {16, 32, 48, 64, 80, 128, 256};
    for (size_t i = 0; i < 150; i++) {
        const uint32_t type = kv_types[i % 3];
        const size_t d = widths[below(c, 7)], most = 1 + below(c, 100), n_q = 1 + below(c, 11), ldp = cv_pad16(most), ldo = d + 16 * below(c, 2);
        const int kind = i % N_KINDS == HUGE_NUMBERS ? MIXED : (int)(i % N_KINDS);
        float *p = take_rows(c, n_q, most, ldp, kind), *want, *got;
        void *values = take_cache(c, type, most * d, kind);
        uint32_t len[16];
        for (size_t q = 0; q < n_q; q++) len[q] = (uint32_t)(i % 4 ? below(c, most + 1) : most);
        take_outputs(n_q * ldo, &want, &got);
        for (size_t q = 0; q < n_q; q++) {
            fill(c, want + q * ldo, d, ORDINARY);
            memcpy(got + q * ldo, want + q * ldo, d * sizeof(float));
        }
        c->scalar->attn_values(p, n_q, ldp, len, values, type, d, want, ldo);
        c->set->attn_values(p, n_q, ldp, len, values, type, d, got, ldo);
        char what[96];
        snprintf(what, sizeof what, "type %u, d %zu, len %zu, queries %zu", (unsigned)type, d, most, n_q);
        same_floats(c, want, got, n_q * ldo, what);
        free(p);
        free(values);
        free(want);
        free(got);
    }
}

static void test_argmax(context *c) {
    for (size_t i = 0; i < 300; i++) {
        const size_t n = i < 70 ? i + 1 : 1 + below(c, 3000);
        float *x = take_floats(n);
        fill(c, x, n, (int)(i % N_KINDS));
        if (i % 4 == 1)
            for (size_t k = 0; k < n; k++) x[k] = (float)below(c, 3); /* many equal maxima */
        if (i % 4 == 2)
            for (size_t k = 0; k < n; k++)
                if (below(c, 2)) x[k] = NAN;
        if (i % 8 == 6)
            for (size_t k = 0; k < n; k++) x[k] = k == n - 1 && i % 16 == 6 ? -INFINITY : NAN;
        const size_t want = c->scalar->argmax(x, n), got = c->set->argmax(x, n);
        if (want != got) fail(c, "n %zu: %zu, scalar has %zu", n, got, want);
        free(x);
    }
}

int main(void) {
    static const struct { const char *name; void (*run)(context *); } tests[] = {
        {"qmatmul, 4 bits", test_qmatmul_4}, {"qmatmul, 6 bits", test_qmatmul_6}, {"qmatmul, 8 bits", test_qmatmul_8}, {"qmatmul at the largest codes", test_qmatmul_extremes},
        {"decode_row", test_decode_row}, {"fmatmul", test_fmatmul}, {"quantize", test_quantize}, {"rms_norm", test_rms_norm}, {"swiglu and add", test_swiglu_and_add},
        {"rope", test_rope}, {"store_kv", test_store_kv}, {"attn_scores", test_attn_scores}, {"attn_softmax", test_attn_softmax}, {"attn_values", test_attn_values}, {"argmax", test_argmax},
    };
    const cv_cpu_kernels *sets[CV_TEST_MAX_SETS];
    const size_t n_sets = cv_test_sets(sets);
    size_t passed = 0, failed = 0;
    if (n_sets == 0) puts("this processor has no kernel set beyond scalar: nothing to compare");
    for (size_t s = 0; s < n_sets; s++)
        for (size_t i = 0; i < sizeof tests / sizeof tests[0]; i++) {
            context c = {.scalar = cv_kernels_scalar(), .set = sets[s], .random = 0x9e3779b97f4a7c15ull + i};
            tests[i].run(&c);
            if (c.failure[0]) printf("not ok - %s: %s: %s\n", cv_cpu_name(sets[s]->level), tests[i].name, c.failure);
            else printf("ok - %s: %s has scalar's bits\n", cv_cpu_name(sets[s]->level), tests[i].name);
            *(c.failure[0] ? &failed : &passed) += 1;
        }
    printf("%zu passed, %zu failed\n", passed, failed);
    return failed ? 1 : 0;
}
