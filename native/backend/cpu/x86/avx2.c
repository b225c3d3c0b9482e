/* avx2.c — the kernel set for processors with AVX2, FMA and F16C. */
#if defined(__x86_64__)
#include "vec16_avx2.h"
/* (vec16 first: the kernels are written in its words; then in the order in which they use each other) */
#include "decode_kernels.h"
#include "float_kernels.h"
#include "attention_kernels.h"

#include "avx2_qmatmul.h"
#include "cpu_features.h"

static size_t scratch_bytes(size_t cols) {
    const size_t a = fmatmul_scratch(cols), b = cv_qmatmul_avx2_scratch(cols);
    return a > b ? a : b;
}

const cv_cpu_kernels *cv_kernels_avx2(void) {
    static const cv_cpu_kernels table = {
        .level = CV_CPU_AVX2, .quantize = quantize, .qmatmul = cv_qmatmul_avx2, .decode_row = decode_row, .fmatmul = fmatmul,
        .scratch_bytes = scratch_bytes, .rms_norm = rms_norm, .swiglu = swiglu, .add = add, .rope = rope, .store_kv = store_kv,
        .attn_scores = attn_scores, .attn_softmax = attn_softmax, .attn_values = attn_values, .argmax = argmax,
    };
    return cv_x86_detect().avx2 ? &table : NULL;
}

#endif
