/* selftest_tensors.c — see selftest.h. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../../engine/error.h"
#include "../cpu/number_formats.h"
#include "selftest.h"

const cv_selftest_format cv_selftest_formats[] = {
    {CV_FORMAT_AFFINE, 4, 64, CV_BF16, "4 bits, groups of 64"},   {CV_FORMAT_AFFINE, 8, 64, CV_BF16, "8 bits, groups of 64"},   {CV_FORMAT_AFFINE, 6, 64, CV_F16, "6 bits, groups of 64"},
    {CV_FORMAT_AFFINE, 5, 128, CV_BF16, "5 bits, groups of 128"}, {CV_FORMAT_AFFINE, 3, 64, CV_BF16, "3 bits, groups of 64"},   {CV_FORMAT_AFFINE, 2, 32, CV_F16, "2 bits, groups of 32"},
    {CV_FORMAT_AFFINE, 4, 32, CV_F16, "4 bits, groups of 32"},    {CV_FORMAT_AFFINE, 4, 128, CV_F32, "4 bits, groups of 128"},  {CV_FORMAT_MXFP4, 0, 32, CV_E8M0, "mxfp4"},
    {CV_FORMAT_MXFP8, 0, 32, CV_E8M0, "mxfp8"},                   {CV_FORMAT_NVFP4, 0, 16, CV_E4M3, "nvfp4"},                  {CV_FORMAT_BF16, 0, 0, 0, "bfloat16"},
    {CV_FORMAT_F16, 0, 0, 0, "float16"},                          {CV_FORMAT_F32, 0, 0, 0, "float32"},
};
_Static_assert(sizeof cv_selftest_formats / sizeof cv_selftest_formats[0] == CV_SELFTEST_FORMATS, "formats");

size_t cv_selftest_element(uint32_t type) { return type == CV_F32 ? 4 : type == CV_E8M0 || type == CV_E4M3 ? 1 : 2; }

static uint64_t draw(cv_selftest *t) {
    t->random ^= t->random >> 12;
    t->random ^= t->random << 25;
    t->random ^= t->random >> 27;
    return t->random * 0x2545f4914f6cdd1dull;
}

float cv_selftest_number(cv_selftest *t) { return (float)(int32_t)(draw(t) >> 32) * 0x1p-31f; }

void *cv_selftest_memory(cv_selftest *t, size_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (bytes + page) / page * page;
    void *p = NULL;
    if (t->n_blocks == CV_SELFTEST_BLOCKS || posix_memalign(&p, page, whole)) {
        t->no_memory = true;
        return NULL;
    }
    t->blocks[t->n_blocks++] = p;
    return memset(p, 0, whole);
}

static void encode(uint32_t type, float x, void *out, size_t i) {
    if (type == CV_F32) ((float *)out)[i] = x;
    else ((uint16_t *)out)[i] = type == CV_F16 ? cv_f32_to_f16(x) : cv_f32_to_bf16(x);
}

float *cv_selftest_numbers(cv_selftest *t, uint32_t type, size_t n) {
    float *x = cv_selftest_memory(t, (n + 16) * sizeof *x);
    for (size_t i = 0; x && i < n; i++) {
        uint32_t coded = 0;
        encode(type, cv_selftest_number(t), &coded, 0);
        x[i] = cv_scale_to_f32((const uint8_t *)&coded, 0, type);
    }
    return x;
}

void *cv_selftest_encoded(cv_selftest *t, uint32_t type, const float *x, size_t n) {
    void *out = cv_selftest_memory(t, (n + 16) * cv_selftest_element(type));
    for (size_t i = 0; out && x && i < n; i++) encode(type, x[i], out, i);
    return out;
}

static size_t row_bytes(const cv_selftest_format *f, size_t cols) {
    switch (f->format) {
    case CV_FORMAT_F32: return cols * 4;
    case CV_FORMAT_F16:
    case CV_FORMAT_BF16: return cols * 2;
    case CV_FORMAT_AFFINE: return cols * f->bits / 8;
    case CV_FORMAT_MXFP8: return cols;
    default: return cols / 2;
    }
}

static void *random_scales(cv_selftest *t, uint32_t type, size_t n, float size) {
    uint8_t *p = cv_selftest_memory(t, n * cv_selftest_element(type));
    for (size_t i = 0; p && i < n; i++) {
        if (type == CV_E8M0) p[i] = (uint8_t)(120 + draw(t) % 5);
        else if (type == CV_E4M3) p[i] = (uint8_t)(32 + draw(t) % 32);
        else encode(type, cv_selftest_number(t) * size, p, i);
    }
    return p;
}

cv_weight *cv_selftest_weight(cv_selftest *t, const cv_selftest_format *f, size_t experts, size_t rows, size_t cols) {
    cv_weight *w = cv_selftest_memory(t, sizeof *w);
    size_t row = row_bytes(f, cols), groups = f->group ? cols / f->group : 0, n = experts * rows;
    if (!w) return NULL;
    *w = (cv_weight){.format = f->format, .bits = f->bits, .group = f->group, .scale_type = f->scale_type, .experts = experts, .rows = rows, .cols = cols, .row_bytes = row, .expert_bytes = rows * row};
    if (f->format <= CV_FORMAT_BF16) {
        uint32_t type = f->format == CV_FORMAT_F32 ? CV_F32 : f->format == CV_FORMAT_F16 ? CV_F16 : CV_BF16;
        uint8_t *data = cv_selftest_memory(t, n * row);
        for (size_t i = 0; data && i < n * cols; i++) encode(type, cv_selftest_number(t), data, i);
        w->data = data;
        return w;
    }
    uint8_t *data = cv_selftest_memory(t, n * row);
    for (size_t i = 0; data && i < n * row; i += 8) {
        uint64_t bits = draw(t) ^ draw(t) << 7;
        if (f->format == CV_FORMAT_MXFP8) bits &= 0xb7b7b7b7b7b7b7b7ull; /* magnitudes up to 1, no NaN */
        memcpy(data + i, &bits, n * row - i < 8 ? n * row - i : 8);
    }
    w->data = data;
    w->scale_row_bytes = groups * cv_selftest_element(f->scale_type);
    w->expert_scale_bytes = rows * w->scale_row_bytes;
    w->scales = random_scales(t, f->scale_type, n * groups, 2.0f / (float)(1u << (f->bits ? f->bits : 4)));
    if (f->format == CV_FORMAT_AFFINE) w->biases = random_scales(t, f->scale_type, n * groups, 1.0f);
    return w;
}

size_t cv_selftest_weight_bytes(const cv_weight *w) {
    size_t parts = w->format == CV_FORMAT_AFFINE ? 2 : w->scales ? 1 : 0;
    return w->experts * w->rows * (w->row_bytes + parts * w->scale_row_bytes);
}

int cv_selftest_open(cv_selftest *t, const cv_shape *shape, uint32_t type, bool with_reference, cv_err err) {
    t->type = type;
    t->random = 88172645463325252ull;
    t->gpu_shape = *shape;
    if (shape->kv_type != CV_Q8) t->gpu_shape.kv_type = type;
    t->gpu_shape.act_type = type;
    t->gpu_shape.exact = type == CV_F32;
    t->gpu_shape.inv_freq = t->inv_freq;
    for (size_t i = 0; i < shape->head_dim / 2; i++) t->inv_freq[i] = powf(10000.0f, -2.0f * (float)i / (float)shape->head_dim);
    t->cpu_shape = t->gpu_shape;
    if (shape->kv_type != CV_Q8) t->cpu_shape.kv_type = CV_F32;
    t->cpu_shape.exact = true;
    t->cpu_shape.n_threads = 1;
    int code = cv_backend_metal_open(&t->gpu_shape, NULL, 0, &t->gpu, err.text, err.size);
    if (!code && with_reference) code = cv_backend_cpu_open(&t->cpu_shape, &t->cpu, err.text, err.size);
    return code;
}

void cv_selftest_close(cv_selftest *t) {
    if (t->gpu) t->gpu->ops->close(t->gpu);
    if (t->cpu) t->cpu->ops->close(t->cpu);
    for (size_t i = 0; i < t->n_blocks; i++) free(t->blocks[i]);
    *t = (cv_selftest){0};
}
