/* avx2_qmatmul.h — the quantized product without VNNI, for the AVX2 set and for the AVX-512 set that has no better. */
#ifndef CV_X86_AVX2_QMATMUL_H
#define CV_X86_AVX2_QMATMUL_H

#include "../kernels.h"

/* As cv_cpu_kernels.qmatmul. */
void cv_qmatmul_avx2(const cv_weight *w, size_t expert, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch);
size_t cv_qmatmul_avx2_scratch(size_t cols);

#endif
