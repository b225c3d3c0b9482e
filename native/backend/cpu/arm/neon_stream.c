/* neon_stream.c — the streamed quantized product on baseline NEON. Byte products are summed in pairs in 16 bits, which hold
 * them: 2 * 128 * 127 < 32768. */
#if defined(__aarch64__)
#include "neon.h"

CV_INLINE int32x4_t stream_dot(int32x4_t acc, int8x16_t codes, int8x16_t q) {
    const int16x8_t low = vmull_s8(vget_low_s8(codes), vget_low_s8(q)), high = vmull_high_s8(codes, q);
    return vpadalq_s16(acc, vpaddq_s16(low, high));
}

#define CV_STREAM cv_neon_stream
#define CV_STREAM_TARGET
#include "stream.h"

size_t cv_neon_stream_scratch(size_t cols) {
    const size_t stride = (cols + 63) & ~(size_t)63;
    return STREAM_BATCH * (stride + stride / 32 * sizeof(int32_t));
}

#endif
