/* test_kernels.c — compares every kernel set of this machine with scalar.c, bit for bit, over many shapes and kinds of
 * numbers (ordinary, zero, subnormal, huge; no infinities or NaN unless a test says so). Prints a line a test and set, then
 * "N passed, N failed"; exits with 1 if any failed. Buffers come from
 * kernel_cases.h. */
#include "kernel_cases.h"
#include "qmatmul_cases.h"

/* ---- tests of the slots ---- */

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
            if (weight_kinds[kind].format == CV_FORMAT_MXFP8 && i % 4 == 3) m.data.p[e * m.w.expert_bytes + r * m.w.row_bytes + below(c, m.w.row_bytes)] = 0x7f; /* NaN */
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
        c->scalar->attn_scores(q, n_q, ldq, keys, type, len, d, 0.088388f, want, lds, NULL);
        c->set->attn_scores(q, n_q, ldq, keys, type, len, d, 0.088388f, got, lds, below(c, 2) ? keys : NULL);
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
        c->scalar->attn_values(p, n_q, ldp, len, values, type, d, want, ldo, NULL);
        c->set->attn_values(p, n_q, ldp, len, values, type, d, got, ldo, below(c, 2) ? values : NULL);
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
