/* metal.h — the Metal backend. Opened like the CPU backend; works where libobjc and Metal.framework can be loaded. */
#ifndef CV_METAL_H
#define CV_METAL_H

#include "../backend.h"

/* CV_E_UNSUPPORTED where there is no Metal device or the shape has something that the kernels lack, CV_E_MEMORY when the
 * memory does not fit into what the GPU may use; err says what.
 * shared: all memory of the caller that operations will point into (weights, cache pools), in any order, kept where it is until close.
 * It is wrapped without copying and made resident before the first step; nothing of it is cut, however small the GPU's buffers. */
int cv_backend_metal_open(const cv_shape *shape, const cv_memory *shared, size_t n_shared, cv_backend **out, char *err, size_t err_size);

#endif
