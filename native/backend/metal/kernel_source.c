/* kernel_source.c — the kernels' text, embedded by metal.mk. */
#include "kernel_source.h"

#include <stdlib.h>
#include <string.h>

#include "../../../build/gen/metal_kernels.h"

typedef struct {
    const char *prefix; /* of its kernels' names */
    const char *text;
} family;

static const family families[CV_METAL_FAMILIES] = {
    {"matvec", matvec_text}, {"matmul", matmul_text}, {"experts", experts_text}, {"attention", attention_text}, {"head", head_text}, {"hand_over", handover_text},
    {"", rows_text}, /* embed, rms_norm, rope_store */
};

char *cv_metal_source(int i) {
    const char *parts[] = {params_text, prelude_text, families[i].text};
    size_t n = 1;
    for (size_t p = 0; p < 3; p++) n += strlen(parts[p]);
    char *all = malloc(n);
    if (!all) return NULL;
    *all = 0;
    for (size_t p = 0; p < 3; p++) strcat(all, parts[p]);
    return all;
}

int cv_metal_family_of(const char *kernel) {
    for (int i = 0; i < CV_METAL_FAMILIES; i++)
        if (!strncmp(kernel, families[i].prefix, strlen(families[i].prefix))) return i;
    return -1;
}
