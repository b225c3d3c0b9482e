/* qmatmul_cases.h — the quantized product of one kernel set against scalar.c's, bit for bit: all formats, odd shapes, extremes. For test_kernels.c and test_amx.c. */
#ifndef CV_TEST_QMATMUL_CASES_H
#define CV_TEST_QMATMUL_CASES_H

#include "kernel_cases.h"

static void one_qmatmul(context *c, unsigned bits, size_t group, uint32_t type, size_t groups, size_t n, size_t rows, size_t row0, size_t row1, int kind) {
    const size_t cols = groups * group, ldo = rows + below(c, 3);
    weight m = take_weight(c, CV_FORMAT_AFFINE, bits, group, type, rows, cols, kind);
    cv_qact a = take_qact(c, n, cols, group, kind == SUBNORMAL ? ORDINARY : kind);
    if (below(c, 2)) a.next = cv_weight_rows_at(&m.w, 0, 0); /* what is prefetched changes no bit */
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

static inline void test_qmatmul_4(context *c) { qmatmul_bits(c, 4); }
static inline void test_qmatmul_6(context *c) { qmatmul_bits(c, 6); }
static inline void test_qmatmul_8(context *c) { qmatmul_bits(c, 8); }

/* The largest codes and activations everywhere: integer paths must not saturate. */
static inline void test_qmatmul_extremes(context *c) {
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

#endif
