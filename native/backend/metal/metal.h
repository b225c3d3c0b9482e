/* metal.h — the Metal backend. Opened like the CPU backend; works where libobjc and Metal.framework can be loaded. */
#ifndef CV_METAL_H
#define CV_METAL_H

#include "../backend.h"

/* Memory of the caller that operations will point into (cache pools): page-aligned, kept mapped until close. */
typedef struct {
    void *memory;
    size_t bytes;
} cv_metal_memory;

/* CV_E_UNSUPPORTED where there is no Metal device or the shape has something that the kernels lack, CV_E_MEMORY when the
 * memory does not fit into what the GPU may use; err says what. Weights are wrapped without copying when they are first used. */
int cv_backend_metal_open(const cv_shape *shape, const cv_metal_memory *shared, size_t n_shared, cv_backend **out, char *err, size_t err_size);

#endif
