/* scalar.h — pieces of the definition that faster kernel sets may call for their rare cases. */
#ifndef CV_CPU_SCALAR_H
#define CV_CPU_SCALAR_H

#include "kernels.h"

float cv_exp_scalar(float x);
void cv_decode_row_scalar(const cv_weight *w, size_t expert, size_t row, float *out);

#endif
