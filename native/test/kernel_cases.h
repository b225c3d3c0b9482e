/* kernel_cases.h — random numbers, weights, activations and output buffers for test_kernels.c. Buffers have the exact size
 * that the contract gives and only natural alignment, so that a sanitizer sees every access outside. */
#ifndef CV_TEST_KERNEL_CASES_H
#define CV_TEST_KERNEL_CASES_H

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
static inline float *take_rows(context *c, size_t rows, size_t cols, size_t ld, int kind) {
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

#endif
