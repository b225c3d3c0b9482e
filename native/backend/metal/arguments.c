/* arguments.c — weights as a kernel's arguments: their formats as function constants, their sizes, their buffers. */
#include "operations.h"

/* Formats of weights A, B, … of a kernel. */
cv_metal_constants cv_metal_formats(const cv_weight *const w[], size_t n) {
    cv_metal_constants c = no_constants();
    c.same_formats = true;
    for (size_t i = 0; i < n; i++) {
        const uint32_t f[4] = {w[i]->format, w[i]->bits, w[i]->group, w[i]->scale_type};
        memcpy(&c.formats[4 * i], f, sizeof f);
        c.same_formats = c.same_formats && !memcmp(c.formats, f, sizeof f);
    }
    return c;
}

cv_matrix cv_metal_matrix(const cv_weight *w) {
    return (cv_matrix){.row_bytes = w->row_bytes, .expert_bytes = w->expert_bytes, .scale_row_bytes = w->scale_row_bytes, .expert_scale_bytes = w->expert_scale_bytes,
                       .rows = (uint32_t)w->rows, .cols = (uint32_t)w->cols, .has_global = w->global_scale != NULL};
}

static size_t bytes_of_row(const cv_weight *w) {
    switch (w->format) {
    case CV_FORMAT_F32: return w->cols * 4;
    case CV_FORMAT_F16:
    case CV_FORMAT_BF16: return w->cols * 2;
    case CV_FORMAT_AFFINE: return w->cols * w->bits / 8;
    case CV_FORMAT_MXFP8: return w->cols;
    default: return w->cols / 2;
    }
}

static size_t scale_bytes(uint32_t type) { return type == CV_F32 ? 4 : type == CV_F16 || type == CV_BF16 ? 2 : 1; }

/* Data, scales, and biases or global scales at three indices. */
void cv_metal_bind_weight(cv_metal *m, unsigned index, const cv_weight *w) {
    size_t row = bytes_of_row(w), e = w->experts - 1, r = w->rows - 1;
    if (w->cols % 16) cv_metal_refuse(m->d, CV_E_UNSUPPORTED, "the Metal kernels need matrices whose number of columns 16 divides");
    cv_metal_bind(m->d, index, w->data, e * w->expert_bytes + r * w->row_bytes + row);
    if (w->format < CV_FORMAT_AFFINE) {
        cv_metal_bind(m->d, index + 1, m->zeros, 4);
        cv_metal_bind(m->d, index + 2, m->zeros, 4);
        return;
    }
    size_t scales = e * w->expert_scale_bytes + r * w->scale_row_bytes + w->cols / w->group * scale_bytes(w->scale_type);
    cv_metal_bind(m->d, index + 1, w->scales, scales);
    if (w->format == CV_FORMAT_AFFINE) cv_metal_bind(m->d, index + 2, w->biases, scales);
    else if (w->global_scale) cv_metal_bind(m->d, index + 2, w->global_scale, w->experts * sizeof(float));
    else cv_metal_bind(m->d, index + 2, m->zeros, 4);
}
