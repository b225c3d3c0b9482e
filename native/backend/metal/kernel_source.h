/* kernel_source.h — text of the kernel families. */
#ifndef CV_METAL_KERNEL_SOURCE_H
#define CV_METAL_KERNEL_SOURCE_H

enum { CV_METAL_FAMILIES = 7 };

/* A family's whole source (params.h, prelude.metal, its file), for the caller to free; NULL without memory. */
char *cv_metal_source(int family);

/* The family that has the kernel: by the name's first word. -1: none. */
int cv_metal_family_of(const char *kernel);

#endif
