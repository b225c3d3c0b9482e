/* amx_tile.c — quantized product for many activation rows (prefill), on AMX's tiles. As in vnni_tile.c 32 weight rows at a time are
 * unpacked to the cache as bytes and used for every activation row; here 32 activation rows at once: 16 x 64 of them are a tile, 64
 * columns of 16 weight rows another, and one tdpbsud sums all their products into a tile of 16 x 16 int32. A group's sums are exact;
 * they go through memory to the float registers, where each gets the operations of the contract (kernels.h). So the bits are
 * scalar.c's.
 *
 * Why it pays, by calculation for Sapphire Rapids (nothing here was measured on hardware): 16 weight rows x 64 columns of an activation row
 * are 1,024 multiply-adds, 8 cycles of vpdpbusd on two ports or 1 cycle of the tile unit. Either way their group (of 64) costs five float
 * operations on the same two ports, 2.5 cycles; the tile's row is stored and loaded beside these. 1,024 / (8 + 2.5) = 98 multiply-adds a cycle
 * become at most 1,024 / 2.5 = 410, half of that for groups of 32, twice for groups of 128. Unpacking 64 columns of 16 rows costs some 50 cycles,
 * as in vnni_tile.c; of 4-bit codes vnni_batch.c needs none: 10.5 cycles an activation row against 50 + 3.5, so from about 8 rows on tiles
 * need fewer cycles. But up to 16 rows the batch kernel, which prefetches better, waits for memory about as long as it computes (576 bytes, some 100
 * cycles); beyond, it goes over the weights again.
 *
 * Tiles: 0-3 sums [activation half][weight half], 4-5 activations, 6-7 codes. While the sums of a group are made those of the group
 * before are scaled: they have left for the first cache by then.
 *
 * Scratch, from its start:
 *   codes  [columns/4, 2, 16 rows, 4]   uint8
 *   scale, bias  [groups padded to 16, 2, 16 rows]   float32
 *   chain  [4, TOKENS, 2, 16 rows]   float32, the contract's four chains of each result
 *   sums   [2, TOKENS, 2, 16 rows]   int32, of the last two groups
 */
#if defined(__x86_64__)
#include "vnni.h"

#include <string.h>

#include "amx.h"
#ifndef CV_X86_TILES_H /* else the software model of them, in tests */
#include "tiles.h"
#endif

enum { ROWS = 32, TOKENS = 32, HALF = 16 };

typedef struct {
    uint8_t *codes;
    float *scale, *bias, *chain;
    int32_t *sums;
    size_t groups, group;
    const uint8_t *next; /* packed codes of the next weight rows, `next_step` bytes of them prefetched each group */
    size_t next_step;
} tile_rows;

/* Activation rows: the first one's. */
typedef struct {
    const int8_t *q;
    const float *scale, *sum;
    size_t q_stride, g_stride, n;
} tile_acts;

static size_t pad(size_t n, size_t to) { return (n + to - 1) / to * to; }

static tile_rows tile_rows_at(void *scratch, size_t cols, size_t group) {
    tile_rows t = {.codes = scratch, .groups = cols / group, .group = group};
    t.scale = (float *)(void *)(t.codes + pad(cols, 128) * ROWS);
    t.bias = t.scale + pad(t.groups, 16) * ROWS;
    t.chain = t.bias + pad(t.groups, 16) * ROWS;
    t.sums = (int32_t *)(void *)(t.chain + (size_t)4 * TOKENS * ROWS);
    return t;
}

size_t cv_amx_tile_scratch(size_t cols) {
    return pad(cols, 128) * ROWS + (2 * pad(cols / 32 + 1, 16) * ROWS + (size_t)(4 + 2) * TOKENS * ROWS) * sizeof(float);
}

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* Tiles for n activation rows and 64 columns, or 32 where groups have no more. */
static void configure(size_t n, size_t group) {
    const size_t columns = least(group, CV_TILE_ROW_BYTES);
    cv_tile_config c = {.palette = CV_TILE_PALETTE};
    const uint8_t rows[2] = {(uint8_t)least(n, HALF), (uint8_t)(n > HALF ? n - HALF : 0)};
    for (size_t t = 0; t < 2 && rows[t]; t++) {
        for (size_t h = 0; h < 2; h++) {
            c.rows[2 * t + h] = rows[t];
            c.row_bytes[2 * t + h] = HALF * sizeof(int32_t);
        }
        c.rows[4 + t] = rows[t];
        c.row_bytes[4 + t] = (uint16_t)columns;
    }
    for (size_t h = 0; h < 2; h++) {
        c.rows[6 + h] = (uint8_t)(columns / 4);
        c.row_bytes[6 + h] = HALF * 4;
    }
    cv_tiles_configure(&c);
}

/* Group g's sums: of the first 16 activation rows or, `wide`, of more; of 16 weight rows or 32. Constants where this is inlined. */
CV_INLINE_VNNI void sum_group(const tile_rows *w, const tile_acts *a, size_t g, bool wide, int halves) {
    const int8_t *q = a->q + g * w->group;
    const uint8_t *codes = w->codes + g * w->group * ROWS;
    cv_tile_zero(0);
    if (halves == 2) cv_tile_zero(1);
    if (wide) cv_tile_zero(2);
    if (wide && halves == 2) cv_tile_zero(3);
    for (size_t k = 0; k < w->group; k += CV_TILE_ROW_BYTES) {
        cv_tile_load(4, q + k, a->q_stride);
        if (wide) cv_tile_load(5, q + k + HALF * a->q_stride, a->q_stride);
        cv_tile_load(6, codes + k * ROWS, 4 * ROWS);
        if (halves == 2) cv_tile_load(7, codes + k * ROWS + 4 * HALF, 4 * ROWS);
        cv_tile_dot(0, 4, 6);
        if (halves == 2) cv_tile_dot(1, 4, 7);
        if (wide) cv_tile_dot(2, 5, 6);
        if (wide && halves == 2) cv_tile_dot(3, 5, 7);
    }
}

/* Adds group g's terms of activation rows t0 … t1-1 to their chains. */
CV_INLINE_VNNI void scale_sums(const tile_rows *w, const tile_acts *a, size_t g, size_t t0, size_t t1, int halves) {
    const int32_t *sums = w->sums + (g & 1) * TOKENS * ROWS;
    float *chain = w->chain + (g & 3) * TOKENS * ROWS;
    const float *scale = a->scale + g, *sum = a->sum + g;
    const size_t g_stride = a->g_stride;
    __m512 sw[2], bw[2];
    for (int h = 0; h < halves; h++) {
        sw[h] = _mm512_load_ps(w->scale + g * ROWS + h * HALF);
        bw[h] = _mm512_load_ps(w->bias + g * ROWS + h * HALF);
    }
#pragma GCC unroll 4
    for (size_t t = t0; t < t1; t++) {
        const __m512 sa = _mm512_set1_ps(scale[t * g_stride]), suma = _mm512_set1_ps(sum[t * g_stride]);
#pragma GCC unroll 2
        for (int h = 0; h < halves; h++) {
            const __m512 s = _mm512_mul_ps(sw[h], sa), b = _mm512_mul_ps(bw[h], suma);
            const __m512 dot = _mm512_cvtepi32_ps(_mm512_load_si512(sums + t * ROWS + h * HALF));
            float *c = chain + t * ROWS + h * HALF;
            _mm512_store_ps(c, _mm512_add_ps(_mm512_load_ps(c), _mm512_fmadd_ps(s, dot, b)));
        }
    }
}

/* All groups of at most TOKENS activation rows: their four chains in w->chain. */
CV_INLINE_VNNI void multiply(const tile_rows *w, const tile_acts *a, bool wide, int halves) {
    const size_t first = wide ? HALF : a->n;
    memset(w->chain, 0, (size_t)4 * TOKENS * ROWS * sizeof(float));
    for (size_t g = 0; g < w->groups; g++) {
        int32_t *sums = w->sums + (g & 1) * TOKENS * ROWS;
        for (size_t i = 0; i < w->next_step; i += 64) _mm_prefetch((const char *)w->next + g * w->next_step + i, _MM_HINT_T1);
        sum_group(w, a, g, wide, halves);
        cv_tile_store(0, sums, 4 * ROWS);
        if (halves == 2) cv_tile_store(1, sums + HALF, 4 * ROWS);
        if (g) scale_sums(w, a, g - 1, 0, first, halves);
        if (!wide) continue;
        cv_tile_store(2, sums + HALF * ROWS, 4 * ROWS);
        if (halves == 2) cv_tile_store(3, sums + HALF * ROWS + HALF, 4 * ROWS);
        if (g) scale_sums(w, a, g - 1, HALF, a->n, halves);
    }
    scale_sums(w, a, w->groups - 1, 0, a->n, halves);
}

#define MULTIPLY(name, wide, halves) \
    CV_TARGET_VNNI static void name(const tile_rows *w, const tile_acts *a) { multiply(w, a, wide, halves); }
MULTIPLY(multiply_16_16, false, 1)
MULTIPLY(multiply_16_32, false, 2)
MULTIPLY(multiply_32_16, true, 1)
MULTIPLY(multiply_32_32, true, 2)

CV_TARGET_VNNI void cv_amx_tile(const cv_weight *w, size_t e, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch) {
    static void (*const kernels[2][2])(const tile_rows *w, const tile_acts *a) = {{multiply_16_16, multiply_16_32}, {multiply_32_16, multiply_32_32}};
    tile_rows tl = tile_rows_at(scratch, w->cols, w->group);
    const uint8_t *data = w->data + e * w->expert_bytes;
    const size_t pieces = (a->n + TOKENS - 1) / TOKENS, last = row1 - 1;
    size_t configured = 0; /* activation rows that the tiles have now */
    for (size_t r = row0; r < row1; r += ROWS) {
        const size_t halves = row1 - r > HALF ? 2 : 1;
        for (size_t h = 0; h < halves; h++) {
            cv_vnni_unpack(w, e, r + h * HALF, last, h, tl.codes);
            cv_vnni_scales(w->scales + e * w->expert_scale_bytes, w->scale_row_bytes, r + h * HALF, last, w->scale_type, tl.groups, tl.scale + h * HALF, ROWS);
            cv_vnni_scales(w->biases + e * w->expert_scale_bytes, w->scale_row_bytes, r + h * HALF, last, w->scale_type, tl.groups, tl.bias + h * HALF, ROWS);
        }
        const size_t next_rows = r + ROWS >= row1 ? 0 : least(row1 - r - ROWS, ROWS);
        tl.next_step = next_rows ? pad(next_rows * w->row_bytes / (pieces * tl.groups) + 1, 64) : 0;
        for (size_t piece = 0, t = 0; piece < pieces; piece++) { /* pieces as even as can be: 33 rows are 16 and 17 */
            const size_t end = (piece + 1) * a->n / pieces;
            const tile_acts act = {.q = a->q + t * a->q_stride, .scale = a->scale + t * a->g_stride, .sum = a->sum + t * a->g_stride,
                                   .q_stride = a->q_stride, .g_stride = a->g_stride, .n = end - t};
            if (configured != act.n) configure(configured = act.n, w->group);
            tl.next = data + (r + ROWS) * w->row_bytes + piece * tl.groups * tl.next_step;
            kernels[act.n > HALF][halves - 1](&tl, &act);
            for (size_t i = 0; i < act.n; i++)
                for (size_t h = 0; h < halves; h++) {
                    const float *c = tl.chain + i * ROWS + h * HALF;
                    const size_t chain = TOKENS * ROWS, left = row1 - r - h * HALF;
                    const __m512 sum = _mm512_add_ps(_mm512_add_ps(_mm512_load_ps(c), _mm512_load_ps(c + chain)), _mm512_add_ps(_mm512_load_ps(c + 2 * chain), _mm512_load_ps(c + 3 * chain)));
                    _mm512_mask_storeu_ps(out + (t + i) * ldo + r + h * HALF, left >= HALF ? 0xffff : (__mmask16)((1u << left) - 1), sum);
                }
            t = end;
        }
    }
    cv_tiles_release();
}

#endif
