/* avx512.c — the three kernel sets with 512-bit float kernels. They differ in the quantized product: without VNNI it is the
 * AVX2 one; with VNNI it is streamed for few activation rows (transposed on
 * the way for several) and tiled for many; with AMX the processor's tiles make it for many. */
#if defined(__x86_64__)
#include "vec16_avx512.h"
/* (vec16 first: the kernels are written in its words; then in the order in which they use each other) */
#include "decode_kernels.h"
#include "float_kernels.h"
#include "attention_kernels.h"

#include "amx.h"
#include "avx2_qmatmul.h"
#include "cpu_features.h"
#include "vnni.h"

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static size_t scratch_bytes(size_t cols) { return larger(fmatmul_scratch(cols), cv_qmatmul_avx2_scratch(cols)); }

static size_t scratch_bytes_vnni(size_t cols) {
    return larger(fmatmul_scratch(cols), larger(larger(cv_vnni_stream_scratch(cols), cv_vnni_batch_scratch(cols)), cv_vnni_tile_scratch(cols)));
}

static void qmatmul_vnni(const cv_weight *w, size_t e, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch) {
    if (w->bits == 4 && a->n >= CV_VNNI_BATCH_FROM && a->n <= CV_VNNI_BATCH_TO) cv_vnni_batch(w, e, row0, row1, a, out, ldo, scratch);
    else if (a->n <= CV_VNNI_STREAM_ROWS) cv_vnni_stream(w, e, row0, row1, a, out, ldo, scratch);
    else cv_vnni_tile(w, e, row0, row1, a, out, ldo, scratch);
}

static size_t scratch_bytes_amx(size_t cols) { return larger(scratch_bytes_vnni(cols), cv_amx_tile_scratch(cols)); }

static void qmatmul_amx(const cv_weight *w, size_t e, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch) {
    (a->n >= CV_AMX_FROM ? cv_amx_tile : qmatmul_vnni)(w, e, row0, row1, a, out, ldo, scratch);
}

#define FLOAT_SLOTS \
    .quantize = quantize, .decode_row = decode_row, .fmatmul = fmatmul, .rms_norm = rms_norm, .swiglu = swiglu, .add = add, .rope = rope, \
    .store_kv = store_kv, .attn_scores = attn_scores, .attn_softmax = attn_softmax, .attn_values = attn_values, .argmax = argmax

const cv_cpu_kernels *cv_kernels_avx512(void) {
    static const cv_cpu_kernels table = {.level = CV_CPU_AVX512, .qmatmul = cv_qmatmul_avx2, .scratch_bytes = scratch_bytes, FLOAT_SLOTS};
    return cv_x86_detect().avx512 ? &table : NULL;
}

const cv_cpu_kernels *cv_kernels_avx512_vnni(void) {
    static const cv_cpu_kernels table = {.level = CV_CPU_AVX512_VNNI, .qmatmul = qmatmul_vnni, .scratch_bytes = scratch_bytes_vnni, FLOAT_SLOTS};
    return cv_x86_detect().avx512_vnni ? &table : NULL;
}

const cv_cpu_kernels *cv_kernels_amx(void) {
    static const cv_cpu_kernels table = {.level = CV_CPU_AMX, .qmatmul = qmatmul_amx, .scratch_bytes = scratch_bytes_amx, FLOAT_SLOTS};
    return cv_amx_find() == CV_AMX_READY ? &table : NULL;
}

#endif
