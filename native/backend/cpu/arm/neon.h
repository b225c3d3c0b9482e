/* neon.h — the pieces of the arm kernel sets, each as its slot of cv_cpu_kernels says. Float kernels are baseline aarch64 and
 * the same in every set; the sets differ in qmatmul. */
#ifndef CV_ARM_NEON_H
#define CV_ARM_NEON_H

#include <arm_neon.h>

#include "../kernels.h"

/* Target attributes a function, so that the build needs no flags a file. Intrinsics of an extension can be used in functions
 * of its target only. */
#if defined(__clang__)
#define CV_TARGET_DOT __attribute__((target("dotprod")))
#define CV_TARGET_I8MM __attribute__((target("dotprod,i8mm")))
#else
#define CV_TARGET_DOT __attribute__((target("arch=armv8.2-a+dotprod")))
#define CV_TARGET_I8MM __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))
#endif
#define CV_INLINE static inline __attribute__((always_inline))

void cv_neon_quantize(const float *x, size_t n, size_t group, int8_t *q, float *scale, float *sum);
void cv_neon_decode_row(const cv_weight *w, size_t expert, size_t row, float *out);
void cv_neon_fmatmul(const cv_weight *w, size_t expert, size_t row0, size_t row1, const float *x, size_t n, size_t ldx, float *out, size_t ldo, void *scratch);
size_t cv_neon_fmatmul_scratch(size_t cols);
void cv_neon_rms_norm(const float *x, const float *w, size_t n, float eps, float *y);
void cv_neon_swiglu(const float *gate, const float *up, float *out, size_t n);
void cv_neon_add(float *x, const float *y, size_t n);
void cv_neon_rope(float *x, const float *cos, const float *sin, size_t d, int interleaved);
void cv_neon_store_kv(const float *x, void *out, uint32_t kv_type, size_t n);
void cv_neon_attn_scores(const float *queries, size_t n_q, size_t ldq, const void *keys, uint32_t kv_type, size_t len, size_t d, float scale, float *s, size_t lds, const void *next);
float cv_neon_attn_softmax(float *s, size_t len, float *m);
void cv_neon_attn_values(const float *p, size_t n_q, size_t ldp, const uint32_t *len, const void *values, uint32_t kv_type, size_t d, float *out, size_t ldo, const void *next);
size_t cv_neon_argmax(const float *x, size_t n);

/* Quantized products that stream weights in the checkpoint's layout (decode): any number of activation rows. */
void cv_neon_stream(const cv_weight *w, size_t expert, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch);
void cv_dot_stream(const cv_weight *w, size_t expert, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch);
size_t cv_neon_stream_scratch(size_t cols);

/* Quantized products that unpack tiles of weights once for many activation rows (prefill). */
void cv_dot_tile(const cv_weight *w, size_t expert, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch);
void cv_i8mm_tile(const cv_weight *w, size_t expert, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch);
size_t cv_neon_tile_scratch(size_t cols);

#endif
