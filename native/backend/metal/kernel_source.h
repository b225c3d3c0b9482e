/* kernel_source.h — text of the kernel families, and which part of it a kernel needs. */
#ifndef CV_METAL_KERNEL_SOURCE_H
#define CV_METAL_KERNEL_SOURCE_H

#include <stdbool.h>

enum { CV_METAL_FAMILIES = 7 };

/* What a library has: a family's kernels of one type of activations (CV_F32 …) and, of attention, of one size of heads. 0: all. */
typedef struct {
    int family;
    unsigned type, head_dim;
} cv_metal_part;

/* The part that has the kernel: by the name's first word, its type and its last number. Kernels without a type are in every part of their
 * family: then it is `type`'s. False: there is no such family. */
bool cv_metal_part_of(const char *kernel, unsigned type, cv_metal_part *out);

/* A part's whole source (params.h, prelude.metal, the family's file), for the caller to free; NULL without memory. */
char *cv_metal_source(const cv_metal_part *part);

/* f32, f16, bf16: 1, 2, 3, as caravan.h counts types. 0: another word. */
unsigned cv_metal_type_named(const char *name);

#endif
