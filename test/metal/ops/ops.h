/* ops.h — the Metal backend beside the CPU backend: the same operation on both, outputs compared. The CPU backend in exact mode
 * (float32 everywhere, scalar.c's arithmetic) is the reference; Metal runs on the fake runtime. */
#ifndef CV_METAL_OPS_H
#define CV_METAL_OPS_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../../native/backend/cpu/number_formats.h"
#include "../../../native/backend/metal/metal.h"
#include "../../../native/test/check.h"

/* Largest difference over the outputs' root mean square, by the kernels' type. A decoded weight or activation is rounded to it
 * once (2^-11 or 2^-8 of it), a sum of hundreds of such terms grows with the root of their number. */
static inline double op_bound(uint32_t type) { return type == CV_F32 ? 2e-5 : type == CV_F16 ? 6e-3 : 5e-2; }
static inline const char *op_type(uint32_t type) { return type == CV_F32 ? "f32" : type == CV_F16 ? "f16" : "bf16"; }

typedef struct {
    cv_checks checks;
    unsigned long long random;
    const char *failure;
} op_context;

static inline size_t op_below(op_context *c, size_t n) { return (size_t)(cv_random(&c->random) >> 33) % n; }
static inline float op_number(op_context *c) { return (float)(int32_t)(cv_random(&c->random) >> 32) * 0x1p-31f; }

static inline void *op_need(void *p) {
    if (p) return p;
    fputs("out of memory\n", stderr);
    exit(2);
}

/* Memory of whole pages, zeroed. */
static inline void *op_pages(size_t bytes) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? op_need(NULL) : p;
}

/* n bytes that end where their pages end, with nothing mapped behind: a kernel that reads one more is seen. */
static inline uint8_t *op_part(size_t n) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), bytes = (n + page - 1) / page * page;
    uint8_t *p = op_pages(bytes + page);
    if (mprotect(p + bytes, page, PROT_NONE)) op_need(NULL);
    return p + bytes - n;
}

static inline void op_encode(uint32_t type, const float *x, void *out, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (type == CV_F32) ((float *)out)[i] = x[i];
        else ((uint16_t *)out)[i] = type == CV_F16 ? cv_f32_to_f16(x[i]) : cv_f32_to_bf16(x[i]);
    }
}
static inline float op_decode(uint32_t type, const void *x, size_t i) { return cv_scale_to_f32(x, i, type); }

/* Random numbers that `type` holds exactly. */
static inline void op_fill(op_context *c, uint32_t type, float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t coded = 0;
        x[i] = op_number(c);
        op_encode(type, &x[i], &coded, 1);
        x[i] = op_decode(type, &coded, 0);
    }
}

/* ---- weights ---- */

typedef struct {
    uint32_t format, bits, group, scale_type;
    bool global;
} op_format;

/* All that the engine reads. */
static const op_format op_formats[] = {
    {CV_FORMAT_F32, 0, 0, 0, false},
    {CV_FORMAT_F16, 0, 0, 0, false},
    {CV_FORMAT_BF16, 0, 0, 0, false},
    {CV_FORMAT_AFFINE, 2, 32, CV_F16, false},
    {CV_FORMAT_AFFINE, 3, 64, CV_BF16, false},
    {CV_FORMAT_AFFINE, 4, 64, CV_BF16, false},
    {CV_FORMAT_AFFINE, 4, 32, CV_F16, false},
    {CV_FORMAT_AFFINE, 4, 128, CV_F32, false},
    {CV_FORMAT_AFFINE, 5, 128, CV_BF16, false},
    {CV_FORMAT_AFFINE, 6, 64, CV_F16, false},
    {CV_FORMAT_AFFINE, 8, 32, CV_BF16, false},
    {CV_FORMAT_MXFP4, 0, 32, CV_E8M0, false},
    {CV_FORMAT_MXFP8, 0, 32, CV_E8M0, false},
    {CV_FORMAT_NVFP4, 0, 16, CV_E4M3, false},
    {CV_FORMAT_NVFP4, 0, 16, CV_E4M3, true},
};
enum { OP_FORMATS = sizeof op_formats / sizeof op_formats[0] };

static inline size_t op_row_bytes(const op_format *f, size_t cols) {
    switch (f->format) {
    case CV_FORMAT_F32: return cols * 4;
    case CV_FORMAT_F16:
    case CV_FORMAT_BF16: return cols * 2;
    case CV_FORMAT_AFFINE: return cols * f->bits / 8;
    case CV_FORMAT_MXFP8: return cols;
    default: return cols / 2;
    }
}

static inline void op_fill_scale(op_context *c, uint32_t type, uint8_t *p, size_t i, float size) {
    float x = op_number(c) * size;
    if (type == CV_E8M0) p[i] = (uint8_t)(120 + op_below(c, 5));
    else if (type == CV_E4M3) p[i] = (uint8_t)(32 + op_below(c, 32));
    else op_encode(type, &x, p + i * (type == CV_F32 ? 4 : 2), 1);
}

/* A random matrix whose rows and experts may be some bytes apart; nothing is mapped behind its parts' last bytes. */
static inline cv_weight *op_weight(op_context *c, const op_format *f, size_t experts, size_t rows, size_t cols) {
    size_t slack = op_below(c, 2) * 8, scale = f->scale_type == CV_F32 ? 4 : f->scale_type == CV_F16 || f->scale_type == CV_BF16 ? 2 : 1;
    size_t row = op_row_bytes(f, cols) + slack, groups = f->group ? cols / f->group : 0, scale_row = groups * scale + slack;
    cv_weight *w = op_need(calloc(1, sizeof *w));
    *w = (cv_weight){.format = f->format, .bits = f->bits, .group = f->group, .scale_type = f->scale_type, .experts = experts, .rows = rows, .cols = cols,
                     .row_bytes = row, .expert_bytes = rows * row + slack, .scale_row_bytes = scale_row, .expert_scale_bytes = rows * scale_row + slack};
    uint8_t *data = op_part(experts * w->expert_bytes - 2 * slack);
    for (size_t i = 0; i < experts * w->expert_bytes - 2 * slack; i++) {
        data[i] = (uint8_t)(cv_random(&c->random) >> 40);
        if (f->format == CV_FORMAT_MXFP8) data[i] &= 0xb7; /* magnitudes up to 1, no NaN */
    }
    for (size_t e = 0; e < experts && f->format <= CV_FORMAT_BF16; e++)
        for (size_t r = 0; r < rows; r++)
            for (size_t k = 0; k < cols; k++) {
                float x = op_number(c);
                op_encode(f->format, &x, data + e * w->expert_bytes + r * row + k * (f->format == CV_FORMAT_F32 ? 4 : 2), 1);
            }
    w->data = data;
    if (!groups) return w;
    size_t bytes = experts * w->expert_scale_bytes - 2 * slack; /* no slack behind the last row and the last expert */
    uint8_t *scales = op_part(bytes), *biases = op_part(bytes);
    for (size_t e = 0; e < experts; e++)
        for (size_t r = 0; r < rows; r++)
            for (size_t g = 0; g < groups; g++) {
                size_t at = e * w->expert_scale_bytes + r * scale_row;
                op_fill_scale(c, f->scale_type, scales + at, g, 2.0f / (float)(1u << (f->bits ? f->bits : 4)));
                op_fill_scale(c, f->scale_type, biases + at, g, 1.0f);
            }
    w->scales = scales;
    if (f->format == CV_FORMAT_AFFINE) w->biases = biases;
    if (f->global) {
        float *global = (float *)(void *)op_part(experts * sizeof *global);
        for (size_t e = 0; e < experts; e++) global[e] = 2688.0f * (0.5f + 0.5f * op_number(c) * op_number(c));
        w->global_scale = global;
    }
    return w;
}

/* ---- two backends ---- */

enum { OP_MOST_TOKENS = 2048 }; /* of a step: the largest piece of a prompt */

typedef struct {
    op_context *c;
    cv_shape shape, exact; /* Metal's; the reference's */
    cv_backend *gpu, *cpu;
    float inv_freq[64];
    uint32_t type;
    cv_batch batch;
    cv_seq seqs[8];
    uint32_t tokens[OP_MOST_TOKENS], token_seq[OP_MOST_TOKENS];
    uint64_t positions[OP_MOST_TOKENS];
} op_world;

static inline void op_open(op_world *w, op_context *c, const cv_shape *shape, const cv_memory *shared, size_t n_shared) {
    char err[512] = "";
    w->c = c;
    w->shape = *shape;
    w->type = shape->kv_type;
    for (size_t i = 0; i < shape->head_dim / 2; i++) w->inv_freq[i] = powf(10000.0f, -2.0f * (float)i / (float)shape->head_dim);
    w->shape.inv_freq = w->inv_freq;
    w->exact = w->shape;
    w->exact.exact = true;
    w->exact.n_threads = 1;
    if (cv_backend_cpu_open(&w->exact, &w->cpu, err, sizeof err)) cv_check(&c->checks, false, "CPU: %s", err);
    else if (cv_backend_metal_open(&w->shape, shared, n_shared, &w->gpu, err, sizeof err)) cv_check(&c->checks, false, "Metal: %s", err);
}

static inline void op_close(op_world *w) {
    if (w->gpu) w->gpu->ops->close(w->gpu);
    if (w->cpu) w->cpu->ops->close(w->cpu);
}

static inline void *op_alloc(cv_backend *b, size_t bytes) {
    void *p = NULL;
    return op_need(b->ops->alloc(b, bytes, &p) ? NULL : p);
}

/* A step of n tokens of one sequence at position 0, for operations that do not look at positions. */
static inline void op_plain_batch(op_world *w, size_t n) {
    static const uint32_t pages[64] = {0};
    w->seqs[0] = (cv_seq){.n_tokens = n, .full_pages = pages, .chunk_pages = pages, .n_full_pages = 64, .n_chunk_pages = 64};
    for (size_t t = 0; t < n; t++) {
        w->tokens[t] = (uint32_t)op_below(w->c, w->shape.vocab);
        w->positions[t] = t;
        w->token_seq[t] = 0;
    }
    w->batch = (cv_batch){.n_seqs = 1, .n_tokens = n, .seqs = w->seqs, .tokens = w->tokens, .positions = w->positions, .token_seq = w->token_seq};
}

static inline bool op_begin(op_world *w) {
    return cv_check(&w->c->checks, !w->cpu->ops->begin(w->cpu, &w->batch) && !w->gpu->ops->begin(w->gpu, &w->batch), "begin refused");
}
static inline bool op_finish(op_world *w, int code) {
    char err[4096] = "";
    int finished = w->gpu->ops->finish(w->gpu, err, sizeof err);
    w->cpu->ops->finish(w->cpu, err, 0);
    return cv_check(&w->c->checks, !code && !finished, "%d %d: %s", code, finished, err);
}

/* Compares n outputs of `type` with float32 references: within `bound` of their root mean square. An output that is many times that
 * may also be off by what rounding two factors of its own size to the activations' type does: half a unit in the last place each. */
static inline void op_compare(op_world *w, const char *what, uint32_t type, const void *got, const float *want, size_t n, double bound) {
    double squares = 0, worst = 0;
    size_t at = 0;
    for (size_t i = 0; i < n; i++) squares += (double)want[i] * want[i];
    double rms = sqrt(squares / (double)n) + 1e-30, half_unit = w->type == CV_BF16 ? 0x1p-8 : w->type == CV_F16 ? 0x1p-11 : 0;
    for (size_t i = 0; i < n; i++) {
        double difference = (fabs((double)op_decode(type, got, i) - want[i]) - 2 * half_unit * fabs((double)want[i])) / rms;
        if (!(difference <= worst)) {
            worst = difference;
            at = i;
        }
    }
    if (getenv("OPS_VERBOSE")) printf("#   %s %s: %.3g of rms %.3g\n", what, op_type(w->type), worst, rms);
    cv_check(&w->c->checks, worst <= bound, "%s: output %zu of %zu is %g, should be %g (%.3g of the rms %g, bound %g)", what, at, n, (double)op_decode(type, got, at), (double)want[at], worst, rms, bound);
}

#endif
