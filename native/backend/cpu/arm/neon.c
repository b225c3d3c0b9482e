/* neon.c — the three arm kernel sets: baseline NEON, with dot products, with int8 matrix products.
 *
 * Where the regimes of qmatmul change over is counted in vector instructions, not measured on hardware: a column of 64 codes
 * costs a streamed row about 7.5 of them an activation row, a tiled one 5.3 (sdot) or 3.5 (usmmla) plus 20 once. */
#if defined(__aarch64__)
#include "neon.h"

#include "arm_features.h"

enum { DOT_STREAM_ROWS = 8, I8MM_STREAM_ROWS = 4 };

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static size_t scratch_bytes(size_t cols) { return larger(cv_neon_fmatmul_scratch(cols), cv_neon_stream_scratch(cols)); }

static size_t scratch_bytes_tile(size_t cols) { return larger(scratch_bytes(cols), cv_neon_tile_scratch(cols)); }

static void qmatmul_dot(const cv_weight *w, size_t e, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch) {
    if (a->n <= DOT_STREAM_ROWS) cv_dot_stream(w, e, row0, row1, a, out, ldo, scratch);
    else cv_dot_tile(w, e, row0, row1, a, out, ldo, scratch);
}

static void qmatmul_i8mm(const cv_weight *w, size_t e, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch) {
    if (a->n <= I8MM_STREAM_ROWS) cv_dot_stream(w, e, row0, row1, a, out, ldo, scratch);
    else cv_i8mm_tile(w, e, row0, row1, a, out, ldo, scratch);
}

#define FLOAT_SLOTS \
    .quantize = cv_neon_quantize, .decode_row = cv_neon_decode_row, .fmatmul = cv_neon_fmatmul, .rms_norm = cv_neon_rms_norm, .swiglu = cv_neon_swiglu, \
    .add = cv_neon_add, .rope = cv_neon_rope, .store_kv = cv_neon_store_kv, .attn_scores = cv_neon_attn_scores, .attn_softmax = cv_neon_attn_softmax, \
    .attn_values = cv_neon_attn_values, .argmax = cv_neon_argmax

const cv_cpu_kernels *cv_kernels_neon(void) {
    static const cv_cpu_kernels table = {.level = CV_CPU_NEON, .qmatmul = cv_neon_stream, .scratch_bytes = scratch_bytes, FLOAT_SLOTS};
    return &table;
}

const cv_cpu_kernels *cv_kernels_neon_dot(void) {
    static const cv_cpu_kernels table = {.level = CV_CPU_NEON_DOT, .qmatmul = qmatmul_dot, .scratch_bytes = scratch_bytes_tile, FLOAT_SLOTS};
    return cv_arm_detect().dot ? &table : NULL;
}

const cv_cpu_kernels *cv_kernels_neon_i8mm(void) {
    static const cv_cpu_kernels table = {.level = CV_CPU_NEON_I8MM, .qmatmul = qmatmul_i8mm, .scratch_bytes = scratch_bytes_tile, FLOAT_SLOTS};
    return cv_arm_detect().i8mm ? &table : NULL;
}

#endif
