/* cpu_activations.c — activations in the forms that matrices read: float32 rows and int8 by group. */
#include "cpu.h"

#include <stdlib.h>
#include <string.h>

void *cv_alloc_array(size_t count, size_t size) {
    if (size && count > (SIZE_MAX - 64) / size) return NULL;
    size_t bytes = (count * size + 63) & ~(size_t)63;
    if (!bytes) bytes = 64;
    void *p = NULL;
    if (posix_memalign(&p, 64, bytes)) return NULL;
    memset(p, 0, bytes);
    return p;
}

uint32_t cv_needs_of(const cv_cpu *c, const cv_weight *w) {
    if (c->base.shape->exact || w->format != CV_FORMAT_AFFINE || (w->bits != 4 && w->bits != 6 && w->bits != 8)) return CV_NEED_FLOAT;
    for (size_t i = 0; i < CV_N_GROUPS; i++)
        if (w->group == cv_group_columns(i)) return 2u << i;
    return CV_NEED_FLOAT;
}

void *cv_cpu_reserve(cv_cpu *c, size_t count, size_t size) {
    void *p = cv_alloc_array(count, size);
    if (p) c->base.scratch_bytes += count * size;
    return p;
}

int cv_act_open(cv_cpu *c, cv_act *a, size_t rows, size_t cols) {
    *a = (cv_act){.max_rows = rows, .max_cols = cols};
    a->x = cv_cpu_reserve(c, rows, cv_pad16(cols) * sizeof(float));
    bool ok = a->x != NULL;
    for (size_t i = 0; i < CV_N_GROUPS; i++) {
        size_t groups = cv_pad16(cols / cv_group_columns(i) + 1);
        a->q[i] = cv_cpu_reserve(c, rows, cv_pad64(cols));
        a->scale[i] = cv_cpu_reserve(c, rows, groups * sizeof(float));
        a->sum[i] = cv_cpu_reserve(c, rows, groups * sizeof(float));
        ok = ok && a->q[i] && a->scale[i] && a->sum[i];
    }
    return ok ? CV_OK : CV_E_MEMORY;
}

void cv_act_close(cv_act *a) {
    free(a->x);
    for (size_t i = 0; i < CV_N_GROUPS; i++) {
        free(a->q[i]);
        free(a->scale[i]);
        free(a->sum[i]);
    }
    *a = (cv_act){0};
}

void cv_act_shape(cv_act *a, size_t cols) {
    a->cols = cols;
    a->ldx = cv_pad16(cols);
    a->q_stride = cv_pad64(cols);
}

void cv_act_store(const cv_cpu *c, cv_act *a, size_t r, size_t c0, size_t c1, const float *x, uint32_t needs) {
    bool last = c1 == a->cols;
    if (needs & CV_NEED_FLOAT) {
        float *row = a->x + r * a->ldx;
        if (row + c0 != x) memcpy(row + c0, x, (c1 - c0) * sizeof(float));
        if (last && a->ldx > c1) memset(row + c1, 0, (a->ldx - c1) * sizeof(float));
    }
    for (size_t i = 0; i < CV_N_GROUPS; i++) {
        if (!(needs & (2u << i))) continue;
        size_t group = cv_group_columns(i), g_stride = cv_pad16(a->cols / group);
        int8_t *q = a->q[i] + r * a->q_stride;
        c->k->quantize(x, c1 - c0, group, q + c0, a->scale[i] + r * g_stride + c0 / group, a->sum[i] + r * g_stride + c0 / group);
        if (last && a->q_stride > c1) memset(q + c1, 0, a->q_stride - c1);
    }
}

typedef struct {
    cv_cpu *c;
    const float *h, *norm;
    const uint32_t *rows;
    size_t ldh;
    float eps;
    uint32_t needs;
} fill_job;

static void fill_row(void *context, size_t t, size_t thread) {
    (void)thread;
    fill_job *f = context;
    cv_act *a = &f->c->in;
    const float *h = f->h + (f->rows ? f->rows[t] : t) * f->ldh;
    if (f->norm) {
        float *x = a->x + t * a->ldx;
        f->c->k->rms_norm(h, f->norm, a->cols, f->eps, x);
        h = x;
    }
    cv_act_store(f->c, a, t, 0, a->cols, h, f->needs);
}

void cv_act_fill(cv_cpu *c, const float *h, size_t ldh, size_t n, const uint32_t *rows, const float *norm, float eps, size_t cols, uint32_t needs) {
    cv_act_shape(&c->in, cols);
    fill_job f = {c, h, norm, rows, ldh, eps, needs};
    cv_parallel(c, n, 4, fill_row, &f);
}
