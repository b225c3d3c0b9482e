/* cpu_attention.c — attention over paged keys and values.
 *
 * A query at position t sees keys first … t; first is 0, or in chunked layers the start of t's chunk. Keys are taken in
 * blocks of CV_ATTN_BLOCK counted from `first`: a plain softmax inside a block, blocks joined in ascending order. That
 * order depends on t alone, so it is the same for decode, prefill, any tile and any split over threads.
 */
#include "cpu.h"

#include <string.h>

#include "scalar.h"

typedef struct {
    cv_cpu *c;
    const cv_kv_layer *kv;
    const float *q;
    float *out;
    size_t n_heads, n_kv_heads, group, d;
    bool chunked;
    float scale;
    /* tiles: consecutive tokens of one sequence and one chunk */
    size_t tokens_per_tile;
    /* split (decode over long contexts) */
    size_t blocks_per_task;
    size_t split_blocks; /* blocks reserved a token; 0 = not split */
} attn;

static size_t least(size_t a, size_t b) { return a < b ? a : b; }
static size_t most(size_t a, size_t b) { return a > b ? a : b; }

static uint64_t first_key(const attn *a, uint64_t position) {
    size_t chunk = a->c->base.shape->chunk;
    return a->chunked ? position / chunk * chunk : 0;
}

/* The page that holds `position`, and where its keys and values of head kv_head start. */
static size_t page_at(const attn *a, const cv_seq *s, uint64_t position, size_t kv_head) {
    size_t p = a->c->base.shape->page_tokens;
    uint32_t page = a->chunked ? s->chunk_pages[(position - s->chunk_base) / p] : s->full_pages[position / p];
    return page * a->kv->page_stride + kv_head * a->kv->head_stride;
}

/* n tokens of a quantized page as float32 [n, d]. */
static const void *decode_page(const attn *a, cv_cpu_scratch *s, const char *from, size_t n) {
    for (size_t t = 0; t < n; t++, from += cv_kv_token_elements(CV_Q8, a->d)) {
        const int8_t *q = (const int8_t *)from;
        const float *scale = (const float *)(const void *)(from + a->d);
        float *to = s->page + t * a->d;
        for (size_t i = 0; i < a->d; i++) to[i] = (float)q[i] * scale[i / 32];
    }
    return s->page;
}

/* One block of n_tokens consecutive tokens' queries: scores, softmax, values. len[q]: keys of the block that q sees.
 * Leaves the block's m and l in part and its unnormalised output in block_out. `follows`: the same queries' next block, all of
 * its positions up to the last query's are in pages, will be computed next. */
static void block(const attn *a, cv_cpu_scratch *s, const cv_seq *seq, size_t kv_head, uint64_t block_start, const uint32_t *len, size_t n_q, cv_attn_part *part, bool follows) {
    const cv_shape *shape = a->c->base.shape;
    const cv_cpu_kernels *k = a->c->k;
    size_t p = shape->page_tokens, d = a->d, bytes = cv_kv_element_bytes(shape->kv_type), token = cv_kv_token_elements(shape->kv_type, d), longest = 0;
    bool q8 = shape->kv_type == CV_Q8;
    uint32_t type = q8 ? CV_F32 : shape->kv_type;
    for (size_t q = 0; q < n_q; q++) longest = most(longest, len[q]);
    for (size_t at = 0; at < longest;) {
        uint64_t position = block_start + at;
        size_t in_page = (size_t)(position % p), n = least(p - in_page, longest - at);
        const char *keys = (const char *)a->kv->k + (page_at(a, seq, position, kv_head) + in_page * token) * bytes;
        /* the following keys, or the values of the first ones: pages lie anywhere, so the processor cannot guess them */
        const char *next = at + n < longest ? (const char *)a->kv->k + page_at(a, seq, position + n, kv_head) * bytes
                                            : (const char *)a->kv->v + (page_at(a, seq, block_start, kv_head) + (size_t)(block_start % p) * token) * bytes;
        if (q8) cv_prefetch(next, n * token * bytes);
        k->attn_scores(s->queries, n_q, d, q8 ? decode_page(a, s, keys, n) : keys, type, n, d, a->scale, s->scores + at, CV_ATTN_BLOCK, q8 ? NULL : next);
        at += n;
    }
    for (size_t q = 0; q < n_q; q++) {
        if (len[q]) part[q].l = k->attn_softmax(s->scores + q * CV_ATTN_BLOCK, len[q], &part[q].m);
        else part[q] = (cv_attn_part){0, 0};
    }
    memset(s->block_out, 0, n_q * d * sizeof(float));
    for (size_t at = 0; at < longest;) {
        uint64_t position = block_start + at;
        size_t in_page = (size_t)(position % p), n = least(p - in_page, longest - at);
        const char *values = (const char *)a->kv->v + (page_at(a, seq, position, kv_head) + in_page * token) * bytes;
        const char *next = at + n < longest ? (const char *)a->kv->v + page_at(a, seq, position + n, kv_head) * bytes : follows ? (const char *)a->kv->k + page_at(a, seq, position + n, kv_head) * bytes : NULL;
        if (q8) cv_prefetch(next, n * token * bytes);
        uint32_t here[CV_ATTN_QUERIES];
        for (size_t q = 0; q < n_q; q++) here[q] = (uint32_t)(len[q] > at ? least(len[q] - at, n) : 0);
        k->attn_values(s->scores + at, n_q, CV_ATTN_BLOCK, here, q8 ? decode_page(a, s, values, n) : values, type, d, s->block_out, d, q8 ? NULL : next);
        at += n;
    }
}

/* Joins the next block of one query to what came before (first: nothing did). */
static void join(cv_attn_part *all, float *out, cv_attn_part next, const float *next_out, size_t d, bool first) {
    if (first) {
        *all = next;
        memcpy(out, next_out, d * sizeof(float));
        return;
    }
    float m = next.m > all->m ? next.m : all->m, old = cv_exp_scalar(all->m - m), new = cv_exp_scalar(next.m - m);
    all->m = m;
    all->l = all->l * old + next.l * new;
    for (size_t i = 0; i < d; i++) out[i] = out[i] * old + next_out[i] * new;
}

static void finish(float *out, const float *sum, float l, size_t d) {
    for (size_t i = 0; i < d; i++) out[i] = sum[i] / l;
}

static void gather(const attn *a, cv_cpu_scratch *s, size_t token, size_t n_tokens, size_t kv_head) {
    for (size_t t = 0; t < n_tokens; t++)
        memcpy(s->queries + t * a->group * a->d, a->q + ((token + t) * a->n_heads + kv_head * a->group) * a->d, a->group * a->d * sizeof(float));
}

static float *out_of(const attn *a, size_t token, size_t kv_head, size_t g) { return a->out + (token * a->n_heads + kv_head * a->group + g) * a->d; }

/* Tokens token … token+n-1 (one sequence, one chunk) of one KV head, all blocks in order. */
static void tile(const attn *a, size_t thread, size_t token, size_t n_tokens, size_t kv_head) {
    cv_cpu_scratch *s = &a->c->scratch[thread];
    const cv_batch *b = a->c->batch;
    const cv_seq *seq = &b->seqs[b->token_seq[token]];
    uint64_t first = first_key(a, b->positions[token]), last = b->positions[token + n_tokens - 1];
    size_t n_q = n_tokens * a->group, d = a->d;
    cv_attn_part all[CV_ATTN_QUERIES], part[CV_ATTN_QUERIES];
    uint32_t len[CV_ATTN_QUERIES] = {0};
    gather(a, s, token, n_tokens, kv_head);
    for (uint64_t start = first; start <= last; start += CV_ATTN_BLOCK) {
        for (size_t q = 0; q < n_q; q++) {
            uint64_t end = b->positions[token + q / a->group] + 1;
            len[q] = (uint32_t)(end > start ? (end - start < CV_ATTN_BLOCK ? end - start : CV_ATTN_BLOCK) : 0);
        }
        block(a, s, seq, kv_head, start, len, n_q, part, start + CV_ATTN_BLOCK <= last);
        for (size_t q = 0; q < n_q; q++)
            if (len[q]) join(&all[q], s->out + q * d, part[q], s->block_out + q * d, d, start == first);
    }
    for (size_t q = 0; q < n_q; q++) finish(out_of(a, token + q / a->group, kv_head, q % a->group), s->out + q * d, all[q].l, d);
}

typedef struct {
    attn a;
    size_t n_tiles;
    const uint32_t *tile_first; /* [n_tiles+1] */
} tiles;

static void run_tile(void *context, size_t task, size_t thread) {
    tiles *t = context;
    size_t i = task / t->a.n_kv_heads, kv_head = task % t->a.n_kv_heads;
    /* The longest tiles (the last tokens) first, so that the end is even. */
    i = t->n_tiles - 1 - i;
    tile(&t->a, thread, t->tile_first[i], t->tile_first[i + 1] - t->tile_first[i], kv_head);
}

/* Split: task = (token, kv head, part of the blocks); every block's part is kept and joined afterwards. */
static void run_split(void *context, size_t task, size_t thread) {
    attn *a = context;
    cv_cpu_scratch *s = &a->c->scratch[thread];
    const cv_batch *b = a->c->batch;
    size_t parts = (a->split_blocks + a->blocks_per_task - 1) / a->blocks_per_task;
    size_t part_index = task % parts, kv_head = task / parts % a->n_kv_heads, token = task / parts / a->n_kv_heads;
    uint64_t position = b->positions[token], first = first_key(a, position), n_keys = position + 1 - first;
    size_t n_blocks = (size_t)((n_keys + CV_ATTN_BLOCK - 1) / CV_ATTN_BLOCK), from = part_index * a->blocks_per_task;
    if (from >= n_blocks) return;
    gather(a, s, token, 1, kv_head);
    for (size_t i = from; i < least(from + a->blocks_per_task, n_blocks); i++) {
        uint64_t start = first + (uint64_t)i * CV_ATTN_BLOCK;
        uint32_t len[CV_ATTN_QUERIES];
        for (size_t g = 0; g < a->group; g++) len[g] = (uint32_t)(position + 1 - start < CV_ATTN_BLOCK ? position + 1 - start : CV_ATTN_BLOCK);
        size_t at = ((token * a->n_kv_heads + kv_head) * a->split_blocks + i) * a->group;
        block(a, s, &b->seqs[b->token_seq[token]], kv_head, start, len, a->group, a->c->parts + at, i + 1 < least(from + a->blocks_per_task, n_blocks));
        memcpy(a->c->part_out + at * a->d, s->block_out, a->group * a->d * sizeof(float));
    }
}

static void join_split(void *context, size_t task, size_t thread) {
    attn *a = context;
    const cv_batch *b = a->c->batch;
    size_t kv_head = task % a->n_kv_heads, token = task / a->n_kv_heads;
    uint64_t n_keys = b->positions[token] + 1 - first_key(a, b->positions[token]);
    size_t n_blocks = (size_t)((n_keys + CV_ATTN_BLOCK - 1) / CV_ATTN_BLOCK);
    float *sum = a->c->scratch[thread].out;
    for (size_t g = 0; g < a->group; g++) {
        cv_attn_part all = {0, 0};
        for (size_t i = 0; i < n_blocks; i++) {
            size_t at = ((token * a->n_kv_heads + kv_head) * a->split_blocks + i) * a->group + g;
            join(&all, sum, a->c->parts[at], a->c->part_out + at * a->d, a->d, i == 0);
        }
        finish(out_of(a, token, kv_head, g), sum, all.l, a->d);
    }
}

/* Blocks to reserve a token when splitting pays (few tokens, long contexts, threads to spare) and fits; else 0. */
static size_t split_blocks(const attn *a) {
    const cv_batch *b = a->c->batch;
    size_t threads = cv_threads_count(a->c->threads), longest = 0;
    for (size_t t = 0; t < b->n_tokens; t++) {
        size_t n = (size_t)((b->positions[t] + CV_ATTN_BLOCK - first_key(a, b->positions[t])) / CV_ATTN_BLOCK);
        longest = most(longest, n);
    }
    if (threads == 1 || b->n_tokens * a->n_kv_heads >= threads * 4 || longest < 4 || a->group > CV_ATTN_QUERIES) return 0;
    return b->n_tokens * a->n_heads * longest <= a->c->max_parts ? longest : 0;
}

int cv_cpu_attention(cv_backend *base, uint32_t flags, size_t n_heads, size_t n_kv_heads, const void *q, const cv_kv_layer *kv, void *out) {
    cv_cpu *c = (cv_cpu *)base;
    const cv_shape *shape = base->shape;
    const cv_batch *b = c->batch;
    size_t d = shape->head_dim;
    tiles t = {.a = {.c = c, .kv = kv, .q = q, .out = out, .n_heads = n_heads, .n_kv_heads = n_kv_heads, .group = n_heads / n_kv_heads, .d = d,
                     .chunked = (flags & CV_LAYER_CHUNKED) != 0, .scale = 1.0f / __builtin_sqrtf((float)d)}};
    attn *a = &t.a;
    a->split_blocks = split_blocks(a);
    if (a->split_blocks) {
        a->blocks_per_task = most(1, a->split_blocks * b->n_tokens * n_kv_heads / (cv_threads_count(c->threads) * 4));
        size_t parts = (a->split_blocks + a->blocks_per_task - 1) / a->blocks_per_task;
        cv_threads_run(c->threads, b->n_tokens * n_kv_heads * parts, run_split, a);
        cv_parallel(c, b->n_tokens * n_kv_heads, 8, join_split, a);
        return CV_OK;
    }
    size_t per_tile = most(1, least(CV_ATTN_QUERIES / 2, 40) / a->group);
    uint32_t *first = c->tile_first;
    size_t n = 0;
    for (size_t token = 0; token < b->n_tokens;) {
        first[n++] = (uint32_t)token;
        size_t end = token + 1;
        while (end < b->n_tokens && end - token < per_tile && b->token_seq[end] == b->token_seq[token] &&
               first_key(a, b->positions[end]) == first_key(a, b->positions[token]))
            end++;
        token = end;
    }
    first[n] = (uint32_t)b->n_tokens;
    t.n_tiles = n;
    t.tile_first = first;
    cv_parallel(c, n * n_kv_heads, 2, run_tile, &t);
    return CV_OK;
}
