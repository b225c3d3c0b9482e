/* amx.c — whether this process uses AMX: the processor must have it, the system must permit it, and its products must have been right
 * here. The last because the tile kernel may meet a processor, a hypervisor or a system that nobody has tried it on: a difference then costs
 * speed, not answers. */
#if defined(__x86_64__)
#include "amx.h"

#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../number_formats.h"
#include "cpu_features.h"
#include "vnni.h"

/* Linux gives tiles only to processes that ask (5.16 and later): their threads' saved registers grow by 8 KB. Asking again changes nothing. */
static bool permitted(void) {
#if defined(__linux__)
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM; the number of the state in XCR0 */
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

/* The trial's shapes: one and a half tiles of activation rows past a whole one, weight rows that end inside a tile. */
enum { TRIAL_ROWS = 45, TRIAL_TOKENS = 41, TRIAL_COLUMNS = 384, TRIAL_GROUPS = TRIAL_COLUMNS / 32 };

/* 64-byte aligned parts of one block of zeros. */
typedef struct {
    uint8_t data[TRIAL_ROWS * TRIAL_COLUMNS + 64];
    int8_t q[TRIAL_TOKENS * TRIAL_COLUMNS];
    float scale[TRIAL_TOKENS * 16], sum[TRIAL_TOKENS * 16]; /* 16: TRIAL_GROUPS padded */
    float scales[TRIAL_ROWS * TRIAL_GROUPS], biases[TRIAL_ROWS * TRIAL_GROUPS];
    float want[TRIAL_TOKENS * TRIAL_ROWS], got[TRIAL_TOKENS * TRIAL_ROWS];
} trial;

static uint32_t next_random(uint32_t *state) {
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

static float next_float(uint32_t *state) { return (float)(int32_t)(next_random(state) - (1u << 23)) * 0x1p-23f; }

/* Any codes, activations from -127 to 127, scales of both signs; sums as quantize() makes them. */
static void fill(trial *t) {
    uint32_t random = 1;
    for (size_t i = 0; i < sizeof t->data; i++) t->data[i] = (uint8_t)next_random(&random);
    for (size_t i = 0; i < sizeof t->q; i++) t->q[i] = (int8_t)((int32_t)(next_random(&random) % 255) - 127);
    for (size_t i = 0; i < sizeof t->scale / sizeof t->scale[0]; i++) {
        t->scale[i] = next_float(&random);
        t->sum[i] = next_float(&random) * 100.0f;
    }
    for (size_t i = 0; i < sizeof t->scales / sizeof t->scales[0]; i++) {
        t->scales[i] = next_float(&random);
        t->biases[i] = next_float(&random);
    }
}

static bool same_product(trial *t, cv_qmatmul_fn product, uint32_t bits, uint32_t group, void *scratch) {
    const cv_weight w = {.format = CV_FORMAT_AFFINE, .bits = bits, .group = group, .scale_type = CV_F32, .experts = 1, .rows = TRIAL_ROWS, .cols = TRIAL_COLUMNS,
                         .data = t->data, .row_bytes = TRIAL_COLUMNS * bits / 8, .expert_bytes = TRIAL_ROWS * TRIAL_COLUMNS * bits / 8,
                         .scales = (const uint8_t *)t->scales, .biases = (const uint8_t *)t->biases,
                         .scale_row_bytes = TRIAL_COLUMNS / group * sizeof(float), .expert_scale_bytes = TRIAL_ROWS * TRIAL_COLUMNS / group * sizeof(float)};
    const cv_qact a = {.q = t->q, .scale = t->scale, .sum = t->sum, .n = TRIAL_TOKENS, .cols = TRIAL_COLUMNS, .group = group, .q_stride = TRIAL_COLUMNS, .g_stride = 16};
    memset(t->want, 0xff, sizeof t->want);
    memset(t->got, 0xff, sizeof t->got);
    cv_vnni_tile(&w, 0, 0, TRIAL_ROWS, &a, t->want, TRIAL_ROWS, scratch);
    product(&w, 0, 0, TRIAL_ROWS, &a, t->got, TRIAL_ROWS, scratch);
    return memcmp(t->want, t->got, sizeof t->want) == 0;
}

bool cv_amx_agrees(cv_qmatmul_fn product) {
    static const uint32_t bits[] = {4, 6, 8}, groups[] = {32, 64, 128};
    const size_t vnni = cv_vnni_tile_scratch(TRIAL_COLUMNS), own = cv_amx_tile_scratch(TRIAL_COLUMNS);
    const size_t trial_bytes = (sizeof(trial) + 63) / 64 * 64, scratch_bytes = ((vnni > own ? vnni : own) + 63) / 64 * 64;
    uint8_t *memory = aligned_alloc(64, trial_bytes + scratch_bytes);
    if (!memory) return false;
    trial *t = (trial *)(void *)memory;
    fill(t);
    bool same = true;
    for (size_t b = 0; b < 3; b++)
        for (size_t g = 0; g < 3; g++) same = same && same_product(t, product, bits[b], groups[g], memory + trial_bytes);
    free(memory);
    return same;
}

cv_amx_state cv_amx_find(void) {
    const cv_x86_features f = cv_x86_detect();
    if (!f.amx_int8) return CV_AMX_ABSENT;
    if (!permitted()) return CV_AMX_REFUSED;
    return cv_amx_agrees(cv_amx_tile) ? CV_AMX_READY : CV_AMX_WRONG;
}

#endif
