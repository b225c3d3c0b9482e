/* bench_kernels.c — speed of every kernel set on one thread, beside what the machine can do: reading memory, int8 and
 * float32 multiply-adds. Each figure is the median of RUNS runs in this process with the best in parentheses; compare only
 * figures of one run of the program. Arguments: megabytes of weights that decode reads (default 160), "quick" for fewer runs, a
 * set's name for that set alone. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../backend/cpu/number_formats.h"
#include "kernel_sets.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { COLS = 5120, PREFILL_ROWS = 512, PREFILL_TOKENS = 256, MOST_RUNS = 9 };

typedef struct { double median, best; } seconds;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Runs fn(context) `runs` times after one warm-up. */
static seconds measure(int runs, void (*fn)(void *), void *context) {
    double t[MOST_RUNS];
    fn(context);
    for (int i = 0; i < runs; i++) {
        t[i] = now();
        fn(context);
        t[i] = now() - t[i];
    }
    qsort(t, (size_t)runs, sizeof t[0], ascending);
    return (seconds){t[runs / 2], t[0]};
}

static void *take(size_t n) {
    void *p = aligned_alloc(64, (n + 63) / 64 * 64 + 64);
    if (!p) {
        fputs("out of memory\n", stderr);
        exit(2);
    }
    memset(p, 1, n);
    return p;
}

/* ---- limits of the machine ---- */

typedef struct { const uint8_t *p; size_t n; uint64_t sink; } read_job;

static void read_all(void *context) {
    read_job *j = context;
    uint64_t s[8] = {0};
    for (size_t i = 0; i + 64 <= j->n; i += 64) {
        __builtin_prefetch(j->p + i + 4096, 0, 2);
        uint64_t v[8];
        memcpy(v, j->p + i, 64);
        for (int l = 0; l < 8; l++) s[l] ^= v[l];
    }
    for (int l = 0; l < 8; l++) j->sink ^= s[l];
}

#if defined(__x86_64__)
enum { PEAK_STEPS = 1000000 };
__attribute__((target("avx512f,avx512vnni"))) static void int8_peak(void *context) {
    __m512i acc[12], x = _mm512_set1_epi32(*(int *)context), y = _mm512_set1_epi32(3);
    for (int i = 0; i < 12; i++) acc[i] = _mm512_setzero_si512();
    for (int k = 0; k < PEAK_STEPS; k++) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) acc[i] = _mm512_dpbusd_epi32(acc[i], x, y);
        __asm__ volatile("" : "+v"(x));
    }
    for (int i = 1; i < 12; i++) acc[0] = _mm512_add_epi32(acc[0], acc[i]);
    *(int *)context ^= _mm512_cvtsi512_si32(acc[0]);
}
__attribute__((target("avx512f"))) static void float_peak(void *context) {
    __m512 acc[12], x = _mm512_set1_ps(*(float *)context), y = _mm512_set1_ps(1e-3f);
    for (int i = 0; i < 12; i++) acc[i] = _mm512_set1_ps((float)i);
    for (int k = 0; k < PEAK_STEPS; k++) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) acc[i] = _mm512_fmadd_ps(acc[i], x, y);
        __asm__ volatile("" : "+v"(x));
    }
    for (int i = 1; i < 12; i++) acc[0] = _mm512_add_ps(acc[0], acc[i]);
    *(float *)context = _mm512_reduce_add_ps(acc[0]) * 1e-9f;
}
#endif

/* ---- products ---- */

typedef struct {
    const cv_cpu_kernels *k;
    cv_weight w;
    cv_qact a;
    float *x, *out;
    void *scratch;
    size_t rows, n, step; /* step: rows a call */
} product;

static void run_quantized(void *context) {
    product *p = context;
    p->a.n = p->n;
    for (size_t r = 0; r < p->rows; r += p->step) p->k->qmatmul(&p->w, 0, r, r + p->step < p->rows ? r + p->step : p->rows, &p->a, p->out, p->rows, p->scratch);
}

static void run_float(void *context) {
    product *p = context;
    for (size_t r = 0; r < p->rows; r += p->step) p->k->fmatmul(&p->w, 0, r, r + p->step < p->rows ? r + p->step : p->rows, p->x, p->n, COLS, p->out, p->rows, p->scratch);
}

/* A matrix of about `bytes` with codes of any value and scales near 2^-7. */
static cv_weight take_matrix(uint32_t format, unsigned bits, size_t group, size_t bytes, const uint8_t *data) {
    cv_weight w = {.format = format, .bits = bits, .group = (uint32_t)group, .scale_type = CV_F16, .experts = 1, .cols = COLS, .data = data};
    w.row_bytes = COLS * bits / 8;
    w.rows = bytes / w.row_bytes;
    if (group) {
        w.scale_row_bytes = COLS / group * 2;
        uint16_t *s = take(w.rows * w.scale_row_bytes);
        for (size_t i = 0; i < w.rows * COLS / group; i++) s[i] = (uint16_t)(0x2000 + i % 512);
        w.scales = w.biases = (const uint8_t *)s;
    }
    return w;
}

static void report_set(const cv_cpu_kernels *k, const uint8_t *data, size_t bytes, int runs) {
    static const struct { const char *name; uint32_t format; unsigned bits; size_t group; bool exact; } kinds[] = {
        {"4 bits, group 64", CV_FORMAT_AFFINE, 4, 64, false}, {"4 bits, group 32", CV_FORMAT_AFFINE, 4, 32, false}, {"6 bits, group 64", CV_FORMAT_AFFINE, 6, 64, false},
        {"8 bits, group 64", CV_FORMAT_AFFINE, 8, 64, false}, {"bf16", CV_FORMAT_BF16, 16, 0, true}, {"f16", CV_FORMAT_F16, 16, 0, true}, {"4 bits, as floats", CV_FORMAT_AFFINE, 4, 64, true},
    };
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        product p = {.k = k, .w = take_matrix(kinds[i].format, kinds[i].bits, kinds[i].group, bytes, data)};
        p.scratch = take(k->scratch_bytes(COLS));
        p.x = take(PREFILL_TOKENS * COLS * sizeof(float));
        for (size_t j = 0; j < PREFILL_TOKENS * COLS; j++) p.x[j] = (float)(j % 251) - 125.0f;
        void (*run)(void *) = kinds[i].exact ? run_float : run_quantized;
        if (!kinds[i].exact) {
            const size_t groups = COLS / kinds[i].group, g_stride = cv_pad16(groups);
            int8_t *q = take(PREFILL_TOKENS * COLS);
            float *scale = take(PREFILL_TOKENS * g_stride * sizeof(float)), *sum = take(PREFILL_TOKENS * g_stride * sizeof(float));
            for (size_t t = 0; t < PREFILL_TOKENS; t++) k->quantize(p.x + t * COLS, COLS, kinds[i].group, q + t * COLS, scale + t * g_stride, sum + t * g_stride);
            p.a = (cv_qact){.q = q, .scale = scale, .sum = sum, .cols = COLS, .group = kinds[i].group, .q_stride = COLS, .g_stride = g_stride};
        }
        p.out = take((p.w.rows * 8 > PREFILL_ROWS * PREFILL_TOKENS ? p.w.rows * 8 : PREFILL_ROWS * PREFILL_TOKENS) * sizeof(float));
        p.step = 128;
        p.rows = p.w.rows;
        p.n = 1;
        const double read = (double)p.rows * (double)(p.w.row_bytes + 2 * p.w.scale_row_bytes) * 1e-9;
        const seconds one = measure(runs, run, &p);
        printf("%-12s %-17s decode n=1 %6.1f (%.1f) GB/s", cv_cpu_name(k->level), kinds[i].name, read / one.median, read / one.best);
        p.rows = p.w.rows < 4 * PREFILL_ROWS ? p.w.rows : 4 * PREFILL_ROWS;
        p.n = 8;
        const double few = (double)p.rows * COLS * 8 * 1e-9;
        const seconds eight = measure(runs, run, &p);
        printf("   n=8 %6.1f", few / eight.median);
        p.n = 32;
        p.rows = PREFILL_ROWS;
        const double some = (double)p.rows * COLS * 32 * 1e-9;
        const seconds thirty_two = measure(runs, run, &p);
        printf("   n=32 %6.1f", some / thirty_two.median);
        p.n = PREFILL_TOKENS;
        const double many = (double)p.rows * COLS * PREFILL_TOKENS * 1e-9;
        const seconds all = measure(runs, run, &p);
        printf("   n=%d %6.1f (%.1f) GMAC/s\n", PREFILL_TOKENS, many / all.median, many / all.best);
        free(p.scratch);
        free(p.x);
        free(p.out);
        free((void *)(uintptr_t)p.a.q);
        free((void *)(uintptr_t)p.a.scale);
        free((void *)(uintptr_t)p.a.sum);
        free((void *)(uintptr_t)p.w.scales);
    }
}

/* ---- attention ---- */

enum { HEAD = 128, KEYS = 4096, QUERIES = 5 };
typedef struct { const cv_cpu_kernels *k; float *q, *s, *out; uint16_t *cache; uint32_t len[QUERIES]; } attention;

static void run_scores(void *context) {
    attention *a = context;
    a->k->attn_scores(a->q, QUERIES, HEAD, a->cache, CV_BF16, KEYS, HEAD, 0.088388f, a->s, KEYS, NULL);
}
static void run_softmax(void *context) {
    attention *a = context;
    float m;
    for (int i = 0; i < QUERIES; i++) a->k->attn_softmax(a->s + i * KEYS, KEYS, &m);
}
static void run_values(void *context) {
    attention *a = context;
    a->k->attn_values(a->s, QUERIES, KEYS, a->len, a->cache, CV_BF16, HEAD, a->out, HEAD, NULL);
}

static void report_attention(const cv_cpu_kernels *k, int runs) {
    attention a = {.k = k, .q = take(QUERIES * HEAD * sizeof(float)), .s = take(QUERIES * KEYS * sizeof(float)), .out = take(QUERIES * HEAD * sizeof(float)), .cache = take(KEYS * HEAD * 2)};
    for (int i = 0; i < QUERIES * HEAD; i++) a.q[i] = (float)(i % 17) * 0.1f - 0.8f;
    memset(a.out, 0, QUERIES * HEAD * sizeof(float));
    for (int i = 0; i < KEYS * HEAD; i++) a.cache[i] = (uint16_t)(0x3f00 + i % 128);
    for (int i = 0; i < QUERIES; i++) a.len[i] = KEYS;
    const double mac = (double)QUERIES * KEYS * HEAD * 1e-9, terms = (double)QUERIES * KEYS * 1e-9;
    const seconds scores = measure(runs, run_scores, &a), softmax = measure(runs, run_softmax, &a), values = measure(runs, run_values, &a);
    printf("%-12s attention, %d queries, %d bf16 keys of %d: scores %.1f GMAC/s, softmax %.2f G/s, values %.1f GMAC/s\n", cv_cpu_name(k->level), QUERIES, KEYS, HEAD, mac / scores.median,
           terms / softmax.median, mac / values.median);
    free(a.q);
    free(a.s);
    free(a.out);
    free(a.cache);
}

int main(int argc, char **argv) {
    size_t megabytes = 160;
    int runs = 5;
    const char *only = NULL;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "quick")) runs = 3;
        else if (argv[i][0] < '0' || argv[i][0] > '9') only = argv[i];
        else megabytes = (size_t)strtoul(argv[i], NULL, 10);
    }
    if (megabytes < 16) megabytes = 16;
    const size_t bytes = megabytes * 1000000;
    uint8_t *data = take(bytes);
    uint32_t v = 1;
    for (size_t i = 0; i + 2 <= bytes; i += 2) { /* as codes: anything; as bf16 or f16: numbers below 2 */
        v = v * 1664525u + 1013904223u;
        data[i] = (uint8_t)(v >> 24);
        data[i + 1] = (uint8_t)(0x30 + (v >> 12) % 12);
    }
    read_job reading = {.p = data, .n = bytes};
    const cv_cpu_kernels *sets[CV_TEST_MAX_SETS];
    const size_t n = cv_test_sets(sets);
    const seconds r = measure(runs, read_all, &reading);
    printf("one thread reads %.1f (%.1f) GB/s over %zu MB\n", (double)bytes * 1e-9 / r.median, (double)bytes * 1e-9 / r.best, megabytes);
#if defined(__x86_64__)
    if (cv_kernels_avx512_vnni()) {
        int seed = argc;
        float x = 0.5f;
        const seconds i8 = measure(runs, int8_peak, &seed), f32 = measure(runs, float_peak, &x);
        printf("peak: int8 %.1f, float32 %.1f GMAC/s\n", PEAK_STEPS * 12.0 * 64 * 1e-9 / i8.median, PEAK_STEPS * 12.0 * 16 * 1e-9 / f32.median);
    }
#endif
    for (size_t i = n; i-- > 0;) {
        if (only && strcmp(only, cv_cpu_name(sets[i]->level))) continue;
        if (!only && i + 1 < n && sets[i]->qmatmul == sets[i + 1]->qmatmul && sets[i]->fmatmul == sets[i + 1]->fmatmul) continue;
        report_set(sets[i], data, bytes, runs);
        report_attention(sets[i], runs);
    }
    const seconds again = measure(runs, read_all, &reading);
    printf("one thread reads %.1f (%.1f) GB/s at the end\n", (double)bytes * 1e-9 / again.median, (double)bytes * 1e-9 / again.best);
    free(data);
    return 0;
}
