/* selftest.c — the kernels on this machine's GPU beside the CPU backend's exact arithmetic, case by case, and how fast the ones of
 * decoding read memory: cv_metal_selftest and cv_metal_speed of caravan.h. */
#include "selftest.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../../engine/error.h"
#include "../cpu/number_formats.h"

enum { HIDDEN = 256, WIDTH = 128, VOCAB = 300, EXPERTS = 16, TYPES = 3, COUNTS = 4, PAGE = 16, PRODUCTS = CV_SELFTEST_FORMATS * TYPES, DIMS = 4, KINDS = 3, ATTENTIONS = DIMS * TYPES * KINDS,
       CACHES8 = (DIMS - 1) * TYPES * KINDS /* the same with a cache of 8 bits, which heads of 16 do not have */ };
static const uint32_t types[TYPES] = {CV_F32, CV_F16, CV_BF16};
static const char *const type_names[TYPES] = {"float32", "float16", "bfloat16"};

/* Tokens of a step: alone, a few, as many as the matrix-vector kernels take, and tiles. */
static const size_t token_counts[COUNTS] = {1, 3, 16, 40};

/* Largest difference over the root mean square of the outputs: what rounding to the type may do. */
static double bound_of(uint32_t type) { return type == CV_F32 ? 2e-5 : type == CV_F16 ? 6e-3 : 5e-2; }

/* Of a case: its worst output, as a share of what is allowed. */
typedef struct {
    double worst;
    char where[96], text[256];
    int code;
} verdict;

static void compare(cv_selftest *t, verdict *v, const char *what, size_t tokens, uint32_t type, const void *got, const float *want, size_t n, double bound) {
    double squares = 0, worst = 0;
    for (size_t i = 0; i < n; i++) squares += (double)want[i] * want[i];
    double rms = sqrt(squares / (double)n) + 1e-30;
    for (size_t i = 0; i < n; i++) {
        double difference = fabs((double)cv_scale_to_f32(got, i, type) - want[i]) / rms;
        if (!(difference <= worst)) worst = isnan(difference) ? 1e9 : difference;
    }
    (void)t;
    if (worst / bound <= v->worst) return;
    v->worst = worst / bound;
    snprintf(v->where, sizeof v->where, "%s, %zu tokens", what, tokens);
}

static bool begin(cv_selftest *t, verdict *v) {
    if (!v->code && t->no_memory) v->code = cv_fail((cv_err){v->text, sizeof v->text}, CV_E_MEMORY, "no memory for the test's tensors");
    if (!v->code) v->code = t->gpu->ops->begin(t->gpu, &t->batch);
    if (!v->code && t->cpu) v->code = t->cpu->ops->begin(t->cpu, &t->batch);
    return !v->code;
}

static bool finish(cv_selftest *t, verdict *v, int code) {
    int finished = t->gpu->ops->finish(t->gpu, v->text, sizeof v->text);
    if (t->cpu) t->cpu->ops->finish(t->cpu, NULL, 0);
    v->code = finished ? finished : code;
    return !v->code;
}

static void plain_batch(cv_selftest *t, size_t n) {
    static const uint32_t pages[4] = {0, 1, 2, 3};
    t->seqs[0] = (cv_seq){.n_tokens = n, .full_pages = pages, .n_full_pages = 4, .chunk_pages = pages, .n_chunk_pages = 4};
    for (size_t i = 0; i < n; i++) {
        t->tokens[i] = (uint32_t)(i * 37 % VOCAB);
        t->positions[i] = i;
        t->token_seq[i] = 0;
    }
    t->batch = (cv_batch){.n_seqs = 1, .n_tokens = n, .seqs = t->seqs, .tokens = t->tokens, .positions = t->positions, .token_seq = t->token_seq};
}

/* ---- products ---- */

/* Both backends' activations; a step's operations go over them in turn. */
typedef struct {
    float *h, *q[3], *logits, *norm;
    float *gpu_h, *gpu_logits;
    void *gpu_q[3];
} rows;

static void dense(cv_selftest *t, verdict *v, rows *r, const cv_selftest_format *f, size_t n) {
    const cv_backend_ops *x = t->cpu->ops, *y = t->gpu->ops;
    cv_weight *w[3], *o = cv_selftest_weight(t, f, 1, HIDDEN, HIDDEN), *gate = cv_selftest_weight(t, f, 1, WIDTH, HIDDEN), *up = cv_selftest_weight(t, f, 1, WIDTH, HIDDEN), *down = cv_selftest_weight(t, f, 1, HIDDEN, WIDTH);
    for (int i = 0; i < 3; i++) w[i] = cv_selftest_weight(t, f, 1, i ? HIDDEN / 2 : HIDDEN, HIDDEN);
    const cv_weight *const all[3] = {w[0], w[1], w[2]};
    const float *bias = cv_selftest_numbers(t, CV_F32, HIDDEN), *const biases[3] = {bias, NULL, bias};
    if (!begin(t, v)) return;
    int code = x->norm_qkv(t->cpu, r->h, r->norm, all, biases, r->q[0], r->q[1], r->q[2]) | y->norm_qkv(t->gpu, r->gpu_h, r->norm, all, biases, r->gpu_q[0], r->gpu_q[1], r->gpu_q[2]);
    if (!finish(t, v, code)) return;
    for (int i = 0; i < 3; i++) compare(t, v, "query, key, value", n, t->type, r->gpu_q[i], r->q[i], n * w[i]->rows, bound_of(t->type));
    /* the next product's input: the same on both */
    for (size_t i = 0; i < n * HIDDEN; i++) r->q[0][i] = cv_scale_to_f32(r->gpu_q[0], i, t->type);
    if (!begin(t, v)) return;
    if (finish(t, v, x->linear(t->cpu, r->q[0], o, bias, true, r->h) | y->linear(t->gpu, r->gpu_q[0], o, bias, true, r->gpu_h))) compare(t, v, "output", n, CV_F32, r->gpu_h, r->h, n * HIDDEN, bound_of(t->type));
    memcpy(r->gpu_h, r->h, n * HIDDEN * sizeof(float));
    void *act[2] = {NULL, NULL};
    if (!begin(t, v)) return;
    code = x->norm_mlp(t->cpu, r->h, r->norm, gate, up, down, NULL, NULL, &act[0]) | y->norm_mlp(t->gpu, r->gpu_h, r->norm, gate, up, down, NULL, NULL, &act[1]);
    if (!code) code = x->linear(t->cpu, act[0], down, NULL, false, r->h) | y->linear(t->gpu, act[1], down, NULL, false, r->gpu_h);
    if (finish(t, v, code)) compare(t, v, "MLP", n, CV_F32, r->gpu_h, r->h, n * HIDDEN, 2 * bound_of(t->type));
    memcpy(r->gpu_h, r->h, n * HIDDEN * sizeof(float));
}

static void experts(cv_selftest *t, verdict *v, rows *r, const cv_selftest_format *f, size_t n) {
    const cv_backend_ops *x = t->cpu->ops, *y = t->gpu->ops;
    cv_weight *router = cv_selftest_weight(t, &cv_selftest_formats[CV_SELFTEST_FORMATS - 1], 1, EXPERTS, HIDDEN);
    const cv_moe_weights w = {cv_selftest_weight(t, f, EXPERTS, WIDTH, HIDDEN), cv_selftest_weight(t, f, EXPERTS, WIDTH, HIDDEN), cv_selftest_weight(t, f, EXPERTS, HIDDEN, WIDTH),
                              cv_selftest_weight(t, f, 1, WIDTH, HIDDEN), cv_selftest_weight(t, f, 1, WIDTH, HIDDEN), cv_selftest_weight(t, f, 1, HIDDEN, WIDTH)};
    if (!begin(t, v)) return;
    int code = x->norm_route(t->cpu, r->h, r->norm, router) | y->norm_route(t->gpu, r->gpu_h, r->norm, router);
    if (!code) code = x->moe_up(t->cpu, r->h, r->norm, &w) | y->moe_up(t->gpu, r->gpu_h, r->norm, &w);
    if (!code) code = x->moe_down(t->cpu, &w, true, r->h) | y->moe_down(t->gpu, &w, true, r->gpu_h);
    if (finish(t, v, code)) compare(t, v, "experts", n, CV_F32, r->gpu_h, r->h, n * HIDDEN, 2 * bound_of(t->type));
    memcpy(r->gpu_h, r->h, n * HIDDEN * sizeof(float));
}

static void table_and_head(cv_selftest *t, verdict *v, rows *r, const cv_selftest_format *f, size_t n) {
    const cv_backend_ops *x = t->cpu->ops, *y = t->gpu->ops;
    cv_weight *table = cv_selftest_weight(t, f, 1, VOCAB, HIDDEN);
    const uint32_t wanted[2] = {(uint32_t)n - 1, 0};
    size_t n_rows = n > 1 ? 2 : 1;
    if (!begin(t, v)) return;
    int code = x->embed(t->cpu, table, r->h) | y->embed(t->gpu, table, r->gpu_h);
    if (!code) code = x->head(t->cpu, r->h, wanted, n_rows, r->norm, table, r->logits) | y->head(t->gpu, r->gpu_h, wanted, n_rows, r->norm, table, r->gpu_logits);
    if (!finish(t, v, code)) return;
    compare(t, v, "embedding", n, CV_F32, r->gpu_h, r->h, n * HIDDEN, 1e-6);
    compare(t, v, "logits", n, CV_F32, r->gpu_logits, r->logits, n_rows * VOCAB, bound_of(t->type));
}

static void products(size_t format, uint32_t type, verdict *v) {
    const cv_shape shape = {.hidden = HIDDEN, .head_dim = 32, .vocab = VOCAB, .vocab_rows = VOCAB, .n_experts = EXPERTS, .experts_per_token = 2, .page_tokens = PAGE, .max_tokens = CV_SELFTEST_TOKENS,
                            .max_logits = CV_SELFTEST_TOKENS, .max_heads = HIDDEN / 32, .max_kv_heads = HIDDEN / 32, .max_ff = HIDDEN, .norm_eps = 1e-5f, .qk_norm_eps = 1e-6f};
    const cv_selftest_format *f = &cv_selftest_formats[format];
    for (size_t i = 0; i < COUNTS && !v->code; i++) {
        cv_selftest t = {0};
        size_t n = token_counts[i], all = CV_SELFTEST_TOKENS * HIDDEN;
        v->code = cv_selftest_open(&t, &shape, type, true, (cv_err){v->text, sizeof v->text});
        rows r = {0};
        if (!v->code) {
            r.h = cv_selftest_numbers(&t, CV_F32, all);
            r.gpu_h = cv_selftest_encoded(&t, CV_F32, r.h, all);
            r.norm = cv_selftest_numbers(&t, CV_F32, HIDDEN);
            r.logits = cv_selftest_memory(&t, 2 * VOCAB * sizeof(float));
            r.gpu_logits = cv_selftest_memory(&t, 2 * VOCAB * sizeof(float));
            for (int k = 0; k < 3; k++) {
                r.q[k] = cv_selftest_memory(&t, all * sizeof(float));
                r.gpu_q[k] = cv_selftest_memory(&t, all * sizeof(float));
            }
            plain_batch(&t, n);
            dense(&t, v, &r, f, n);
            if (!v->code) experts(&t, v, &r, f, n);
            if (!v->code) table_and_head(&t, v, &r, f, n);
        }
        cv_selftest_close(&t);
    }
}

/* ---- attention ---- */

/* A cache of 8 bits with random codes, whose scales make them numbers of the order of 1. */
static void *codes(cv_selftest *t, size_t bytes, size_t head_dim) {
    size_t token = cv_kv_token_elements(CV_Q8, head_dim);
    char *p = cv_selftest_memory(t, bytes);
    for (size_t at = 0; p && at < bytes; at += token) {
        for (size_t i = 0; i < head_dim; i++) p[at + i] = (char)(int)(cv_selftest_number(t) * 127.0f);
        for (size_t i = 0; i < head_dim / 32; i++) ((float *)(void *)(p + at + head_dim))[i] = (1.0f + 0.5f * cv_selftest_number(t)) / 127.0f;
    }
    return p;
}

/* The GPU's cache of 8 bits beside the CPU's: rounding in the last place may move a code by one, and no more. The CPU's becomes the GPU's,
 * so that attention is compared over the same cache. */
static void compare_codes(verdict *v, char *cpu, const char *gpu, size_t bytes, size_t head_dim) {
    double worst = 0;
    for (size_t at = 0; at < bytes; at += cv_kv_token_elements(CV_Q8, head_dim)) {
        const float *x = (const float *)(const void *)(cpu + at + head_dim), *y = (const float *)(const void *)(gpu + at + head_dim);
        for (size_t i = 0; i < head_dim; i++) worst = fmax(worst, abs((int)(int8_t)cpu[at + i] - (int)(int8_t)gpu[at + i]) / 1.5);
        for (size_t i = 0; i < head_dim / 32; i++) worst = fmax(worst, fabs((double)x[i] - y[i]) / (1e-6 * fabs((double)x[i]) + 1e-30));
    }
    if (worst > v->worst && worst > 1) {
        v->worst = worst;
        snprintf(v->where, sizeof v->where, "the cache's codes and scales");
    }
    memcpy(cpu, gpu, bytes);
}

/* kind 0: a few tokens behind a short context, 1: a long context that is split, 2: a prompt in chunks. Two sequences. */
static void attention(size_t head_dim, uint32_t type, size_t kind, bool q8, verdict *v) {
    enum { KV_HEADS = 2, GROUP = 5, HEADS = KV_HEADS * GROUP, SEQS = CV_SELFTEST_SEQS };
    const size_t before = kind == 1 ? 600 : kind == 0 ? 21 : 0, now = kind == 2 ? 20 : 1, chunk = kind == 2 ? PAGE : 0, pages = (before + now + PAGE - 1) / PAGE, n = SEQS * now, head = PAGE * cv_kv_token_elements(q8 ? CV_Q8 : type, head_dim), page = 2 * KV_HEADS * head;
    const uint32_t flags = CV_LAYER_ROPE | CV_LAYER_QK_NORM | (kind == 2 ? CV_LAYER_CHUNKED : CV_LAYER_TEMPERATURE);
    const cv_shape shape = {.hidden = 64, .head_dim = head_dim, .vocab = 16, .vocab_rows = 16, .page_tokens = PAGE, .chunk = chunk, .kv_type = q8 ? CV_Q8 : type, .max_tokens = CV_SELFTEST_TOKENS, .max_logits = 1, .max_heads = HEADS, .max_kv_heads = KV_HEADS,
                            .max_ff = 64, .norm_eps = 1e-5f, .qk_norm_eps = 1e-5f, .attn_scale = 0.1f, .floor_scale = 16};
    cv_selftest t = {0};
    v->code = cv_selftest_open(&t, &shape, type, true, (cv_err){v->text, sizeof v->text});
    size_t cache = SEQS * pages * page, element = q8 ? 1 : cv_selftest_element(type), cpu_element = q8 ? 1 : sizeof(float), values = n * HEADS * head_dim;
    float *q[3] = {NULL}, *out = NULL;
    void *kv = v->code ? NULL : q8 ? codes(&t, cache, head_dim) : (void *)cv_selftest_numbers(&t, type, cache), *gpu_q[3] = {NULL}, *gpu_out = NULL;
    void *gpu_kv = v->code ? NULL : q8 ? cv_selftest_memory(&t, cache) : cv_selftest_encoded(&t, type, kv, cache);
    if (q8 && kv && gpu_kv) memcpy(gpu_kv, kv, cache);
    uint32_t *list = v->code ? NULL : cv_selftest_memory(&t, SEQS * pages * sizeof *list);
    for (int i = 0; !v->code && i < 3; i++) {
        q[i] = cv_selftest_numbers(&t, type, values);
        gpu_q[i] = cv_selftest_encoded(&t, type, q[i], values);
    }
    if (!v->code) {
        out = cv_selftest_memory(&t, values * sizeof(float));
        gpu_out = cv_selftest_memory(&t, values * sizeof(float));
    }
    if (!v->code && !t.no_memory) {
        for (size_t i = 0; i < SEQS * pages; i++) list[i] = (uint32_t)(SEQS * pages - 1 - i);
        for (size_t s = 0, at = 0; s < SEQS; s++) {
            t.seqs[s] = (cv_seq){.first_position = before, .n_tokens = now, .first_token = at, .full_pages = list + s * pages, .n_full_pages = pages, .chunk_pages = list + s * pages, .n_chunk_pages = pages};
            for (size_t i = 0; i < now; i++, at++) {
                t.positions[at] = before + i;
                t.token_seq[at] = (uint32_t)s;
            }
        }
        t.batch = (cv_batch){.n_seqs = SEQS, .n_tokens = n, .seqs = t.seqs, .tokens = t.tokens, .positions = t.positions, .token_seq = t.token_seq};
        const cv_kv_layer cpu = {kv, (char *)kv + page / 2 * cpu_element, page, head}, gpu = {gpu_kv, (char *)gpu_kv + page / 2 * element, page, head};
        const cv_backend_ops *x = t.cpu->ops, *y = t.gpu->ops;
        if (begin(&t, v)) {
            int code = x->rope_store(t.cpu, flags, HEADS, KV_HEADS, q[0], q[1], q[2], &cpu) | y->rope_store(t.gpu, flags, HEADS, KV_HEADS, gpu_q[0], gpu_q[1], gpu_q[2], &gpu);
            if (q8 && finish(&t, v, code)) {
                compare_codes(v, kv, gpu_kv, cache, head_dim);
                code = !begin(&t, v);
            }
            if (!code) code = x->attention(t.cpu, flags, HEADS, KV_HEADS, q[0], &cpu, out) | y->attention(t.gpu, flags, HEADS, KV_HEADS, gpu_q[0], &gpu, gpu_out);
            if (finish(&t, v, code)) {
                compare(&t, v, "rotated queries", n, type, gpu_q[0], q[0], values, bound_of(type));
                compare(&t, v, "attention", n, type, gpu_out, out, values, 2 * bound_of(type));
            }
        }
    } else if (!v->code) {
        v->code = cv_fail((cv_err){v->text, sizeof v->text}, CV_E_MEMORY, "no memory for the test's tensors");
    }
    cv_selftest_close(&t);
}

int cv_metal_selftest(uint32_t index, uint32_t has_bfloat, char *out, size_t out_size, char *text, size_t text_size) {
    static const size_t dims[DIMS] = {16, 32, 64, 128};
    static const char *const kinds[KINDS] = {"decoding", "decoding behind a long context", "a prompt in chunks"};
    cv_err err = {text, text_size};
    if (!out || !out_size || index >= PRODUCTS + ATTENTIONS + CACHES8) return cv_fail(err, CV_E_ARGUMENT, "there are %d cases", PRODUCTS + ATTENTIONS + CACHES8);
    bool product = index < PRODUCTS, q8 = index >= PRODUCTS + ATTENTIONS;
    size_t i = product ? index : q8 ? index - PRODUCTS - ATTENTIONS : index - PRODUCTS, type = i % TYPES, of = i / TYPES;
    size_t head_dim = q8 ? dims[1 + of % (DIMS - 1)] : dims[of % DIMS], kind = of / (q8 ? DIMS - 1 : DIMS);
    verdict v = {0};
    bool skipped = types[type] == CV_BF16 && !has_bfloat;
    char name[96];
    if (product) snprintf(name, sizeof name, "weights of %s, %s", cv_selftest_formats[of].name, type_names[type]);
    else snprintf(name, sizeof name, "attention, heads of %zu, %s, %s%s", head_dim, type_names[type], kinds[kind], q8 ? ", 8-bit cache" : "");
    if (product && !skipped) products(of, types[type], &v);
    else if (!skipped) attention(head_dim, types[type], kind, q8, &v);
    snprintf(out, out_size, "name=%s\nskipped=%d\nok=%d\nworst=%.4f\nwhere=%s\nerror=%s\n", name, skipped, !v.code && v.worst <= 1, v.worst, v.where, v.code ? (v.text[0] ? v.text : "an operation was refused") : "");
    return CV_OK;
}

/* ---- speed ---- */

static double now(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

int cv_metal_speed(uint32_t index, uint64_t bytes, char *out, size_t out_size, char *text, size_t text_size) {
    enum { COLS = 4096, REPEATS = 4, TRIALS = 5, FORMATS = 6 };
    /* format and tokens of a step */
    static const struct { size_t format, n; } kinds[FORMATS] = {{0, 1}, {0, 8}, {0, 16}, {1, 1}, {11, 1}, {0, 40}};
    cv_err err = {text, text_size};
    if (!out || !out_size || index >= FORMATS) return cv_fail(err, CV_E_ARGUMENT, "there are %d kernels to time", FORMATS);
    const cv_selftest_format *f = &cv_selftest_formats[kinds[index].format];
    size_t n = kinds[index].n, row = f->bits ? COLS * f->bits / 8 + COLS / f->group * 4 : COLS * 2, rows = (size_t)(bytes / row / 64 * 64);
    if (rows < 64) rows = 64;
    if (rows > UINT32_MAX / 64) return cv_fail(err, CV_E_ARGUMENT, "a matrix of %llu bytes is too large", (unsigned long long)bytes);
    const cv_shape shape = {.hidden = COLS, .head_dim = 128, .vocab = 16, .vocab_rows = 16, .page_tokens = PAGE, .max_tokens = CV_SELFTEST_TOKENS, .max_logits = 1, .max_heads = 32, .max_kv_heads = 8, .max_ff = rows};
    cv_selftest t = {0};
    verdict v = {0};
    int code = cv_selftest_open(&t, &shape, CV_F16, false, err);
    float *x = code ? NULL : cv_selftest_numbers(&t, CV_F16, n * COLS);
    void *in = code ? NULL : cv_selftest_encoded(&t, CV_F16, x, n * COLS), *result = code ? NULL : cv_selftest_memory(&t, n * rows * sizeof(float));
    cv_weight *w = code ? NULL : cv_selftest_weight(&t, f, 1, rows, COLS);
    double best = 0;
    if (!code) plain_batch(&t, n);
    for (int trial = 0; !code && trial <= TRIALS; trial++) { /* the first one compiles kernels and brings memory in */
        double start = now();
        if (begin(&t, &v)) {
            for (int i = 0; i < REPEATS && !code; i++) code = t.gpu->ops->linear(t.gpu, in, w, NULL, false, result);
            finish(&t, &v, code);
        }
        code = v.code;
        double seconds = (now() - start) / REPEATS;
        if (trial && (best == 0 || seconds < best)) best = seconds;
    }
    if (!code)
        snprintf(out, out_size, "name=%s, %zu token%s\nbytes=%zu\nmultiply_adds=%.0f\nseconds=%.9f\n", f->name, n, n == 1 ? "" : "s", cv_selftest_weight_bytes(w), (double)rows * COLS * (double)n, best);
    else if (v.text[0]) cv_fail(err, code, "%s", v.text);
    cv_selftest_close(&t);
    return code;
}
