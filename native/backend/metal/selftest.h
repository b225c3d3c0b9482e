/* selftest.h — random tensors for both backends: what selftest.c compares and times. Memory lives until cv_selftest_close. */
#ifndef CV_METAL_SELFTEST_H
#define CV_METAL_SELFTEST_H

#include "../../engine/error.h"
#include "metal.h"

enum { CV_SELFTEST_TOKENS = 48, CV_SELFTEST_BLOCKS = 96, CV_SELFTEST_SEQS = 2 };

typedef struct {
    uint32_t format, bits, group, scale_type;
    const char *name;
} cv_selftest_format;

/* All that the engine reads. */
extern const cv_selftest_format cv_selftest_formats[];
enum { CV_SELFTEST_FORMATS = 14 };

typedef struct {
    uint64_t random;
    uint32_t type; /* CV_F32, CV_F16, CV_BF16: of activations and cache */
    cv_shape gpu_shape, cpu_shape;
    cv_backend *gpu, *cpu; /* cpu: exact, the reference; NULL when only times are taken */
    float inv_freq[64];
    void *blocks[CV_SELFTEST_BLOCKS];
    size_t n_blocks;
    bool no_memory;
    cv_batch batch;
    cv_seq seqs[CV_SELFTEST_SEQS];
    uint32_t tokens[CV_SELFTEST_TOKENS], token_seq[CV_SELFTEST_TOKENS];
    uint64_t positions[CV_SELFTEST_TOKENS];
} cv_selftest;

/* Opens the backends; activations, and the cache unless the shape says CV_Q8, are of `type`. */
int cv_selftest_open(cv_selftest *t, const cv_shape *shape, uint32_t type, bool with_reference, cv_err err);
void cv_selftest_close(cv_selftest *t);

/* Whole pages, zeroed; NULL (and no_memory) without memory. */
void *cv_selftest_memory(cv_selftest *t, size_t bytes);
float cv_selftest_number(cv_selftest *t);
/* n random numbers that `type` holds exactly. */
float *cv_selftest_numbers(cv_selftest *t, uint32_t type, size_t n);
/* The same numbers as `type`. */
void *cv_selftest_encoded(cv_selftest *t, uint32_t type, const float *x, size_t n);
/* A random matrix. */
cv_weight *cv_selftest_weight(cv_selftest *t, const cv_selftest_format *f, size_t experts, size_t rows, size_t cols);
/* Bytes that a product reads of it. */
size_t cv_selftest_weight_bytes(const cv_weight *w);
size_t cv_selftest_element(uint32_t type);

#endif
