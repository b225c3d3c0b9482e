/* dot_stream.c — the streamed quantized product with sdot. */
#if defined(__aarch64__)
#include "neon.h"

CV_INLINE CV_TARGET_DOT int32x4_t stream_dot(int32x4_t acc, int8x16_t codes, int8x16_t q) { return vdotq_s32(acc, codes, q); }

#define CV_STREAM cv_dot_stream
#define CV_STREAM_TARGET CV_TARGET_DOT
#include "stream.h"

#endif
