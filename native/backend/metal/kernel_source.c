/* kernel_source.c — the kernels' text, embedded by metal.mk. */
#include "kernel_source.h"

#include <stdio.h>
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

static const char *const types[] = {"", "f32", "f16", "bf16"};
enum { TYPES = sizeof types / sizeof types[0], ATTENTION = 3 };

unsigned cv_metal_type_named(const char *name) {
    for (unsigned i = 1; i < TYPES; i++)
        if (!strcmp(name, types[i])) return i;
    return 0;
}

bool cv_metal_part_of(const char *kernel, unsigned type, cv_metal_part *out) {
    *out = (cv_metal_part){-1, type, 0};
    for (int i = 0; i < CV_METAL_FAMILIES && out->family < 0; i++)
        if (!strncmp(kernel, families[i].prefix, strlen(families[i].prefix))) out->family = i;
    for (const char *at = strchr(kernel, '_'); at; at = strchr(at + 1, '_')) {
        char word[8];
        size_t n = strcspn(at + 1, "_");
        if (n >= sizeof word) continue;
        memcpy(word, at + 1, n);
        word[n] = 0;
        unsigned named = cv_metal_type_named(word);
        if (named) out->type = named;
        if (out->family == ATTENTION && !at[1 + n]) out->head_dim = (unsigned)strtoul(word, NULL, 10);
    }
    return out->family >= 0;
}

char *cv_metal_source(const cv_metal_part *part) {
    char first[96];
    snprintf(first, sizeof first, "#define CV_ONLY_TYPE %u\n#define CV_ONLY_DIM %u\n", part->type, part->head_dim);
    const char *parts[] = {first, params_text, prelude_text, families[part->family].text};
    enum { PARTS = sizeof parts / sizeof parts[0] };
    size_t n = 1;
    for (size_t p = 0; p < PARTS; p++) n += strlen(parts[p]);
    char *all = malloc(n);
    if (!all) return NULL;
    *all = 0;
    for (size_t p = 0; p < PARTS; p++) strcat(all, parts[p]);
    return all;
}
